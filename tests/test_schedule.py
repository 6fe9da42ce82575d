"""The course of the distillation weights."""

import pytest

from globalkd.schedule import WeightSchedule


def factors(**changed):
    return list(map(WeightSchedule(max_iter=100, **changed), range(100)))


def test_without_settings_the_factor_is_one():
    assert set(factors()) == {1.0}


def test_the_weight_multiplies_the_whole_course():
    course = {"warmup_iters": 9, "decay": "cosine", "stop_iter": 80}
    assert factors(weight=3.0, **course) == pytest.approx([3 * x for x in factors(**course)])


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_falls_from_one_towards_zero(decay):
    course = factors(decay=decay)
    assert course[0] == 1.0 and course[-1] < 0.011
    assert all(a > b for a, b in zip(course, course[1:]))
    assert course[25] == pytest.approx({"linear": 0.75, "cosine": 0.5 + 0.5**1.5}[decay])


def test_warmup_rises_in_a_line_and_is_never_zero():
    course = factors(warmup_iters=9)
    assert course[:11] == pytest.approx([0.1 * i for i in range(1, 11)] + [1.0])


def test_warmup_multiplies_the_decay():
    course = factors(warmup_iters=9, decay="linear")
    assert course[4] == pytest.approx(0.5 * 0.96) and course[50] == 0.5


@pytest.mark.faults
def test_a_decay_towards_no_end_is_refused():
    with pytest.raises(ValueError, match="DECAY is 'linear'.*'none' where there is no `max_iter`"):
        WeightSchedule(decay="linear")


def test_after_the_stop_the_factor_is_zero():
    course = factors(stop_iter=40)
    assert course[39] == 1.0 and set(course[40:]) == {0.0}
