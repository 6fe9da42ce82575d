"""The training loader: every batch follows from the seed and its number."""

import random
import signal
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.data import build, build_detection_train_loader
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

from globalkd.data.resumable_loader import ResumableLoader, shield_workers

SAMPLERS = {
    "plain": lambda: TrainingSampler(13),
    "repeat_factor": lambda: RepeatFactorTrainingSampler(torch.linspace(1, 2.5, 13)),
    "subset": lambda: RandomSubsetTrainingSampler(13, 0.7),
}
every_sampler = pytest.mark.parametrize("sampler", list(SAMPLERS))
grouped_or_not = pytest.mark.parametrize("grouped", [False, True])


def augment(record):
    """Draws from all generators, as augmentations may."""
    draws = (random.random(), np.random.rand(), torch.rand(()).item())
    return {**record, **size(record["id"]), "draws": draws}


def size(number):
    return {"width": 40, "height": 30} if number % 3 else {"width": 30, "height": 40}


def make(sampler="plain", *, grouped=True, workers=0, seed=3, batch=4, sized=True):
    records = [{"id": i, **(size(i) if sized else {})} for i in range(13)]
    return ResumableLoader(
        lambda known: build_detection_train_loader(
            DatasetFromList(records) if known is None else known,
            mapper=augment,
            sampler=SAMPLERS[sampler](),
            total_batch_size=batch,
            aspect_ratio_grouping=grouped,
            num_workers=workers,
        ),
        seed,
    )


def take(loader, count):
    batches = iter(loader)
    return [next(batches) for _ in range(count)]


@contextmanager
def in_process(rank, world_size):
    """As if this were one of several processes."""
    with (
        mock.patch.object(comm, "get_rank", lambda: rank),
        mock.patch.object(comm, "get_world_size", lambda: world_size),
        mock.patch.object(build, "get_world_size", lambda: world_size),
        mock.patch.object(comm, "shared_random_seed", lambda: 9),
    ):
        yield


@every_sampler
@grouped_or_not
@pytest.mark.parametrize("start", [0, 1, 5, 23])
def test_starting_anywhere_equals_reading_up_to_there(sampler, grouped, start):
    whole = take(make(sampler, grouped=grouped), start + 6)
    loader = make(sampler, grouped=grouped)
    loader.start_at(start)
    assert take(loader, 6) == whole[start:]


def test_images_whose_size_the_mapper_adds_are_found_in_their_groups(caplog):
    whole = take(make(sized=False), 8)
    loader = make(sized=False)
    state = torch.get_rng_state()
    loader.start_at(5)
    assert torch.equal(torch.get_rng_state(), state)
    assert take(loader, 3) == whole[5:]
    assert caplog.text.count("DATASETS.TRAIN gives images without width and height") == 1


@grouped_or_not
def test_the_number_of_workers_changes_nothing(grouped):
    expected = take(make(grouped=grouped), 9)
    for workers in (1, 2):
        assert take(make(grouped=grouped, workers=workers), 3) == expected[:3]
        loader = make(grouped=grouped, workers=workers)
        loader.start_at(4)
        assert take(loader, 5) == expected[4:]


@grouped_or_not
def test_each_process_starts_anywhere_in_its_part(grouped):
    for rank in (0, 1):
        with in_process(rank, 2):
            whole = take(make(grouped=grouped), 9)
            loader = make(grouped=grouped)
            loader.start_at(4)
            assert take(loader, 5) == whole[4:]


def test_processes_share_the_images_of_one():
    """Without groups, a step's images do not even depend on the number of processes."""
    with in_process(0, 1):
        alone = take(make(grouped=False), 5)
    parts = []
    for rank in (0, 1):
        with in_process(rank, 2):
            parts.append(take(make(grouped=False), 5))
    for batch, first, second in zip(alone, *parts):
        assert batch == [x for pair in zip(first, second) for x in pair]


def test_the_stream_of_another_seed_is_found_again():
    other = make(seed=8)
    loader = make(seed=3)
    assert take(loader, 2) != take(make(seed=8), 2)
    loader.start_at(2, seed=8)
    assert take(loader, 3) == take(other, 5)[2:]


@grouped_or_not
def test_an_image_is_augmented_differently_each_time_it_comes(grouped):
    images = [x for batch in take(make(grouped=grouped), 20) for x in batch]
    assert len({x["draws"] for x in images}) == len(images)


@grouped_or_not
def test_training_draws_the_same_numbers_as_without_loading(grouped):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    loader = make(grouped=grouped)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    take(loader, 3)
    after = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    assert after == draw()


@pytest.mark.faults
def test_a_dataset_without_index_names_the_key():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {}

    with pytest.raises(ValueError, match="EXACT_RESUME False"):
        ResumableLoader(
            lambda _: build_detection_train_loader(
                Endless(), mapper=augment, total_batch_size=1, aspect_ratio_grouping=False
            ),
            0,
        )


def test_workers_begin_deaf_to_signals(tmp_path):
    """One that came before they are shielded would end them."""

    def mask():
        return signal.pthread_sigmask(signal.SIG_BLOCK, [])

    loader = torch.utils.data.DataLoader([1, 2], num_workers=2)
    shield_workers(loader)
    shield = loader.worker_init_fn

    def first(worker):
        (tmp_path / str(worker)).write_text(" ".join(x.name for x in mask()))
        shield(worker)

    loader.worker_init_fn = first
    before = mask()
    assert len(list(loader)) == 2 and mask() == before
    for worker in ("0", "1"):
        assert {"SIGTERM", "SIGINT"} <= set((tmp_path / worker).read_text().split())
