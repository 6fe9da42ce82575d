"""What a sample of a dataset's images shows: files that training cannot use, or reads otherwise."""

import math
import os
from dataclasses import dataclass, field
from typing import Dict, List, Sequence

from detectron2.data.detection_utils import check_image_size, read_image
from PIL import Image

from ..data.unreadable import UNREADABLE, exif_orientation, reading_problem
from .report import CheckReport

#: Images of a dataset that are read.
IMAGES_OPENED = 100


@dataclass
class ImageSample:
    """Images that were read before the run.

    Attributes:
        size: their number.
        unreadable: what is said of those that training cannot use.
        turned: those with an EXIF orientation.
        deep: those with more than 8 bits a value.
    """

    size: int = 0
    unreadable: List[str] = field(default_factory=list)
    turned: List[str] = field(default_factory=list)
    deep: List[str] = field(default_factory=list)


def open_images(records: Sequence[Dict]) -> ImageSample:
    """Read at most `IMAGES_OPENED` images, evenly spaced; those that are missing are left out."""
    sample = ImageSample()
    for record in records[:: math.ceil(len(records) / IMAGES_OPENED) or 1]:
        if os.path.exists(record["file_name"]):
            _open_image(record, sample)
    return sample


def _open_image(record: Dict, sample: ImageSample) -> None:
    file = record["file_name"]
    sample.size += 1
    try:
        with Image.open(file) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                sample.deep.append(file)
        if exif_orientation(file) != 1:
            sample.turned.append(file)
        check_image_size(dict(record), read_image(file))  # as training does
    except (*UNREADABLE, ValueError) as error:
        sample.unreadable.append(reading_problem(file, error))


def check_images(sample: ImageSample, name: str, report: CheckReport, *, most: int) -> None:
    """Report what a sample shows.

    Args:
        sample: of `open_images`.
        name: the dataset's.
        report: gets a problem where images cannot be used, and warnings.
        most: DATALOADER.MAX_UNREADABLE_IMAGES; up to so many are a warning, as the run passes over
            them.
    """
    if sample.unreadable:
        say = report.problem if len(sample.unreadable) > most else report.warn
        say(
            f"{name}: {len(sample.unreadable)} of {sample.size} images opened cannot be used, such "
            f"as {sample.unreadable[0]}."
        )
    if sample.turned:
        report.warn(
            f"{name}: {len(sample.turned)} images of a sample have an EXIF orientation, such as "
            f"{sample.turned[0]}: Detectron2 turns them, and boxes must be of the turned image."
        )
    if sample.deep:
        report.warn(
            f"{name}: {len(sample.deep)} images of a sample have more than 8 bits a value, such "
            f"as {sample.deep[0]}: Detectron2 reads every value above 255 as white. Convert them "
            "to 8 bits, or read them by a mapper of your own."
        )
