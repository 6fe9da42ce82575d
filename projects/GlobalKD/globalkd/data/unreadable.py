"""Images that cannot be read: the end of the run, or, by key, passed over and counted.

`ReadableImages` is for training, where another image can take the place; `BlankIfUnreadable` for
evaluation, where each has its own. The extraction of instance features leaves such images out.
"""

import logging
from typing import Any, Callable, Optional

import torch
from detectron2.data import ToIterableDataset
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.utils.file_io import PathManager
from PIL import Image
from PIL.Image import DecompressionBombError
from torch.utils.data import Dataset

from .resumable_loader import inner_loader

logger = logging.getLogger(__name__)

#: What Pillow and Detectron2 raise for a file that is missing, damaged, huge, or of another size.
UNREADABLE = (OSError, SyntaxError, SizeMismatchError, DecompressionBombError)
_ORIENTATION = 0x0112  # the EXIF tag


class ReadableImages(Dataset):
    """Detectron2's `MapDataset`; where an image cannot be read, the next of its orientation.

    The orientation decides in which batch an image is, so that the stream of batches can be
    repeated without reading. Detectron2's own way, a random other image, cannot.

    Attributes:
        unreadable: (N,) bool, shared by the workers: the images that could not be read.
    """

    def __init__(self, dataset: Dataset, most: int):
        """
        Args:
            dataset: a `MapDataset` over dataset dicts.
            most: DATALOADER.MAX_UNREADABLE_IMAGES.
        """
        self.dataset = dataset
        self.most = most
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def _dataset(self) -> Dataset:
        """The dataset dicts, by the name that `MapDataset` has for them."""
        return self.dataset._dataset

    def __getitem__(self, index: int) -> dict:
        found = self._read(index)
        others = (i % len(self) for i in range(index + 1, index + len(self)))
        while found is None:
            other = next((i for i in others if self._is_wide(i) == self._is_wide(index)), None)
            if other is None:
                raise ValueError("DATASETS.TRAIN: no image of this orientation can be read.")
            found = self._read(other)
        return found

    def _read(self, index: int) -> Optional[dict]:
        if self.unreadable[index]:
            return None
        try:
            return self.dataset[index]
        except UNREADABLE as error:
            self.unreadable[index] = True
            pass_over(self._dataset[index], error, int(self.unreadable.sum()), self.most)
        return None

    def _is_wide(self, index: int) -> bool:
        record = self._dataset[index]
        return record.get("width", 0) > record.get("height", 0)


class BlankIfUnreadable:
    """A mapper that gives a black image of the same size in place of one that cannot be read."""

    def __init__(self, mapper: Callable[[dict], dict], most: int):
        """
        Args:
            mapper: dataset dict -> model input.
            most: DATALOADER.MAX_UNREADABLE_IMAGES.
        """
        self.mapper = mapper
        self.most = most
        self.count = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, record: dict) -> dict:
        try:
            return self.mapper(record)
        except UNREADABLE as error:
            self.count += 1
            pass_over(record, error, int(self.count), self.most)
        image = torch.zeros(3, record["height"], record["width"], dtype=torch.uint8)
        return {**record, "image": image}


def exif_orientation(file: str) -> int:
    """How an image is to be turned to be seen upright, from 2 to 8; 1: as it is, or not known."""
    try:
        with PathManager.open(file, "rb") as stream, Image.open(stream) as image:
            orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # as Detectron2 does: a damaged tag is no tag
        return 1
    return orientation if orientation in range(2, 9) else 1


def reading_problem(file: str, error: BaseException) -> str:
    """What is said of an image of which `error`, such as one of `UNREADABLE`, was raised.

    No full stop ends it.
    """
    text = f"{file} cannot be read: {type(error).__name__}: {error}".rstrip(".")
    orientation = exif_orientation(file) if isinstance(error, SizeMismatchError) else 1
    if orientation == 1:
        return text
    return (
        f"{text}. Its EXIF orientation is {orientation}, which Detectron2 applies: annotate the "
        "turned image, or remove the tag"
    )


def pass_over(record: dict, error: BaseException, count: int, most: int) -> None:
    """Warn of an image that cannot be read, or raise where there have been too many.

    Raises:
        ValueError: `count` is above `most`.
    """
    problem = reading_problem(record["file_name"], error)
    key = f"DATALOADER.MAX_UNREADABLE_IMAGES is {most}"
    if count > most:
        raise ValueError(
            f"{problem}. It is number {count} that cannot be read, and {key}: mend or remove it, "
            "or raise the key to pass over so many."
        ) from error
    logger.warning(f"{problem}. It is passed over, number {count}; {key}.")


def pass_over_unreadable(loader: Any, most: int) -> None:
    """Let a training loader of Detectron2 read through `ReadableImages`."""
    stream = inner_loader(loader).dataset
    if isinstance(stream, ToIterableDataset):  # else the dataset has no index
        stream.dataset = ReadableImages(stream.dataset, most)


def readable_images(loader: Any) -> Optional[ReadableImages]:
    """The `ReadableImages` under a training loader; None where its dataset is of another kind."""
    loader = getattr(loader, "_loader", loader)  # of a `ResumableLoader`
    while loader is not None and not isinstance(loader, ReadableImages):
        loader = getattr(loader, "dataset", None)
    return loader
