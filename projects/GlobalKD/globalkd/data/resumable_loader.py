"""A training loader that can start anywhere in its stream, as if it had been read up to there.

Detectron2's samplers shuffle one infinite stream of images from a seed; process r of W reads the
positions r, r + W, ... of it. Here every image knows its position, its augmentations are drawn
from (seed, position), and reading can start after any number of batches. What a step sees does not
depend on the number of loader workers.
"""

import logging
import os
import signal
import threading
from functools import partial
from itertools import count, islice
from typing import Callable, Iterator, List, Optional, Sequence, Tuple

from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torch.utils.data import DataLoader, Dataset, Sampler

from ..random_state import IMAGES, isolated_rng, seed_cpu


class ResumableLoader:
    """Detectron2's training loader with batches that follow from the seed and their number.

    Attributes:
        drawn: number of batches of the stream before the next one; a step may draw several.
    """

    def __init__(self, build: Callable, seed: int):
        """
        Args:
            build: (dataset dicts or None: to be read) -> what
                `detectron2.data.build_detection_train_loader` returns.
            seed: of the order and of the augmentations; the same in all processes.
        """
        self._build = build
        self.seed = seed
        self._first = self.drawn = 0
        self._loader, self._stream = self._make(None)

    @property
    def records(self) -> Optional[Sequence[dict]]:
        """The dataset dicts, one for each image; None of a dataset that is not Detectron2's."""
        return self._stream.dataset.records

    def _make(self, records: Optional[Sequence[dict]]):
        with isolated_rng():
            seed_cpu(self.seed)  # Detectron2 draws the seeds of its samplers when it builds them
            loader = self._build(records)
        inner = inner_loader(loader)
        stream = inner.dataset
        if not isinstance(stream, ToIterableDataset):
            raise ValueError(
                "DATALOADER.EXACT_RESUME needs datasets with an index, and DATASETS.TRAIN gives a "
                f"{type(stream).__name__}. Set DATALOADER.EXACT_RESUME False."
            )
        stream.dataset = _SeededDataset(stream.dataset, self.seed)
        stream.sampler = _PositionSampler(stream.sampler)
        if loader is not inner:
            stream.shard_chunk_size = 1  # images, not batches, come out of the workers in turn
        return loader, stream

    def __iter__(self) -> Iterator[list]:
        with isolated_rng():
            batches = iter(self._loader)
        self.drawn = self._first
        while True:
            with isolated_rng():
                batch = next(batches)
            self.drawn += 1
            yield batch

    def start_at(self, batch: int, seed: Optional[int] = None) -> None:
        """Let the iteration begin with a batch of the stream; call it before the first one.

        Args:
            batch: number of batches before it.
            seed: the stream's, if it is another one than this loader's.
        """
        if seed is not None and seed != self.seed:
            self.seed = seed
            self._loader, self._stream = self._make(self.records)
        self._first = self.drawn = batch
        sampler, size = self._stream.sampler, self._loader.batch_size
        sampler.waiting, sampler.skipped = [], 0
        if isinstance(self._loader, AspectRatioGroupedDataset):
            is_wide = self._stream.dataset.is_wide
            sampler.waiting, sampler.skipped = _read_in_groups(sampler, is_wide, size, batch)
        else:
            sampler.skipped = batch * size


def inner_loader(loader) -> DataLoader:
    """The `DataLoader` of a training loader, whether or not it groups by aspect ratio."""
    return loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader


def shield_workers(loader) -> None:
    """Let loader workers outlive the signals that a cluster sends to all processes of a job.

    A SIGTERM of the training process, which it sends when it ends, still ends them.
    """
    inner = inner_loader(loader)
    inner.worker_init_fn = partial(_shield, inner.worker_init_fn)
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        inner._get_iterator = partial(_with_signals_blocked, inner._get_iterator)


def _with_signals_blocked(start: Callable):
    """Start workers that do not see a signal before `_shield` has run in them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shield(then: Optional[Callable], worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # or the training could not end them either
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    if then is not None:
        then(worker_id)


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class _PositionSampler(Sampler):
    """(position in the stream of all processes, image index) from a sampler of Detectron2.

    Attributes:
        waiting: what was read before and is in no batch yet; comes first.
        skipped: how much of this process's part of the stream was read before.
    """

    def __init__(self, sampler: Sampler):
        self.sampler = sampler
        self.rank, self.world_size = comm.get_rank(), comm.get_world_size()
        self.waiting: List[Tuple[int, int]] = []
        self.skipped = 0

    def __iter__(self) -> Iterator[Tuple[int, int]]:
        yield from self.waiting
        stream = zip(count(self.rank, self.world_size), self.sampler)
        yield from islice(stream, self.skipped, None)


class _SeededDataset(Dataset):
    """Maps each image with random numbers of its position."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Tuple[int, int]) -> dict:
        position, index = item
        seed_cpu(self.seed, IMAGES, position)
        return self.dataset[index]

    @property
    def records(self) -> Optional[Sequence[dict]]:
        return getattr(self.dataset, "_dataset", None)

    def is_wide(self, index: int) -> bool:
        """The group of an image, as `AspectRatioGroupedDataset` tells it.

        Without reading it, if the dataset tells its size.
        """
        record = self.records[index]
        if "width" not in record or "height" not in record:
            log_first_n(
                logging.WARNING,
                "DATASETS.TRAIN gives images without width and height: to resume with "
                "DATALOADER.ASPECT_RATIO_GROUPING, those that were read before are read again.",
            )
            with isolated_rng():
                record = self.dataset[index]  # Detectron2's mapper adds them
        return record["width"] > record["height"]


def _read_in_groups(stream, is_wide: Callable, batch_size: int, batches: int):
    """Repeat the grouping up to a number of batches: (what waits in groups, number read)."""
    groups = ([], [])
    wide = {}
    read = 0
    items = iter(stream)
    while batches > 0:
        item = next(items)
        read += 1
        if item[1] not in wide:
            wide[item[1]] = is_wide(item[1])
        group = groups[wide[item[1]]]
        group.append(item)
        if len(group) == batch_size:
            group.clear()
            batches -= 1
    return sorted(groups[0] + groups[1]), read
