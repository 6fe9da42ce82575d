"""Whether an exported student detects what the run does, on test images.

Not here: how it is written (`student`, `graphs`).
"""

import logging
from dataclasses import dataclass
from itertools import chain, islice
from typing import Callable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from torch import Tensor

from ..data import register_datasets
from .graphs import Detections

logger = logging.getLogger(__name__)


@dataclass
class Agreement:
    """How an exported student's detections compare with the run's.

    Attributes:
        images: inputs compared.
        detections: the run's detections on them; 0 where nothing could be compared.
        box: largest difference of a coordinate, in pixels of the network's input.
        score: largest difference of a score.
    """

    images: int = 0
    detections: int = 0
    box: float = 0.0
    score: float = 0.0


def comparison_images(cfg: CfgNode, count: int) -> Iterator[Tensor]:
    """The first images of the first test data set, (3, H, W) uint8 as a detector gets them.

    Raises:
        FileNotFoundError: at the first image, where the data set is not on this machine.
    """
    if not cfg.DATASETS.TEST:
        raise FileNotFoundError("DATASETS.TEST is empty.")
    name = cfg.DATASETS.TEST[0]
    register_datasets(cfg, names=[name])  # the other data sets need not be here
    if name not in DatasetCatalog:
        raise FileNotFoundError(f"No dataset {name!r} (DATASETS.TEST) is registered.")
    loader = build_detection_test_loader(cfg, name)
    yield from (inputs[0]["image"] for _, inputs in zip(range(count), loader))


def none_if_not_here(images: Iterator[Tensor]) -> Iterator[Tensor]:
    """What `comparison_images` gives; nothing, with a warning, where the data cannot be read."""
    try:
        first = list(islice(images, 1))
    except (FileNotFoundError, ValueError, AssertionError) as error:  # also: an empty data set
        logger.warning(
            f"Comparing detections on test images is skipped, they cannot be read: {error}. "
            "--opts DATASETS.COCO ... says where they are."
        )
        return iter(())
    return chain(first, images)


def with_hard_cases(first: Tensor, others: Iterator[Tensor]) -> Iterator[Tensor]:
    """What a traced graph may have frozen: the values, the size and the number of detections."""
    yield first
    yield from others
    yield first[:, : first.shape[1] * 3 // 4, : first.shape[2] * 5 // 8]
    yield torch.zeros_like(first)


def compare(
    ours: Callable[[Tensor], Detections],
    theirs: Callable[[Tensor], Detections],
    images: Iterator[Tensor],
    box_tolerance: float,
    score_tolerance: float,
) -> Agreement:
    """Compare two detectors on images, whatever order equal scores came in.

    Every detection must have a partner of its class within the tolerances in the other's. Where a
    score lies within its tolerance of the lowest that was kept, rounding decides whether the
    detection is kept at all: such a one may have none.

    Raises:
        RuntimeError: a detection has no partner.
    """
    agreement = Agreement()
    for index, image in enumerate(images):
        a, b = ours(image), theirs(image)
        box = (a.boxes[:, None] - b.boxes[None]).abs().amax(dim=2)
        score = (a.scores[:, None] - b.scores[None]).abs()
        fits = (box <= box_tolerance) & (score <= score_tolerance)
        fits &= a.classes[:, None] == b.classes[None]
        lowest = min([x.scores.min() for x in (a, b) if len(x.scores)], default=0.0)
        surely_kept = [x.scores - score_tolerance >= lowest for x in (a, b)]
        if (surely_kept[0] & ~fits.any(dim=1)).any() or (surely_kept[1] & ~fits.any(dim=0)).any():
            raise RuntimeError(
                f"The exported student detects otherwise on image {index}, {tuple(image.shape)}: "
                f"{len(b.scores)} detections, the run {len(a.scores)}; not equal within "
                f"{box_tolerance:g} pixels and {score_tolerance:g} of score."
            )
        agreement.images += 1
        agreement.detections += len(a.scores)
        if fits.any():
            nearest = box.masked_fill(~fits, torch.inf).min(dim=1)
            found = nearest.values.isfinite()
            agreement.box = max(agreement.box, nearest.values[found].max().item())
            rows = torch.arange(len(found))[found.cpu()]
            matched = score[rows, nearest.indices[found]]
            agreement.score = max(agreement.score, matched.max().item())
    return agreement
