"""Trainings begin as soon as what they need is there, and no failure stops the others."""

import threading

import pytest

from globalkd.experiments.scheduling import NeededTaskFailed, execute_in_order

NEEDS = {"teacher": [], "start": [], "plain": ["start"], "ours": ["teacher", "start"], "late": []}


def needs(task):
    return NEEDS[task]


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_each_runs_once_and_after_what_it_needs(jobs):
    done, lock = [], threading.Lock()

    def execute(task, lane):
        assert 0 <= lane < jobs
        with lock:
            assert set(needs(task)) <= set(done)
            done.append(task)

    assert (
        execute_in_order(["ours", "plain", "late", "teacher", "start"], needs, execute, jobs) == {}
    )
    assert sorted(done) == sorted(NEEDS)


def test_nothing_waits_for_what_it_does_not_need():
    plain_is_done = threading.Event()

    def execute(task, lane):
        if task == "teacher":  # ends only once the plain student has been trained beside it
            assert plain_is_done.wait(timeout=20)
        if task == "plain":
            plain_is_done.set()

    assert execute_in_order(["teacher", "start", "plain"], needs, execute, jobs=2) == {}


def test_two_at_a_time_never_share_a_lane():
    busy, lock = set(), threading.Lock()

    def execute(task, lane):
        with lock:
            assert lane not in busy and len(busy) < 2
            busy.add(lane)
        threading.Event().wait(0.005)
        with lock:
            busy.remove(lane)

    assert execute_in_order(list(range(20)), lambda task: [], execute, jobs=2) == {}


def test_a_failure_stops_what_needs_it_and_nothing_else():
    done = []

    def execute(task, lane):
        if task == "teacher":
            raise ValueError("no such file")
        done.append(task)

    failures = execute_in_order(["teacher", "start", "plain", "ours"], needs, execute)
    assert done == ["start", "plain"]
    assert isinstance(failures["teacher"], ValueError)
    assert isinstance(failures["ours"], NeededTaskFailed)


def test_what_is_not_asked_for_counts_as_done():
    done = []
    assert execute_in_order(["plain"], needs, lambda task, lane: done.append(task)) == {}
    assert done == ["plain"]


def test_no_tasks_are_no_work():
    assert execute_in_order([], needs, None) == {}
