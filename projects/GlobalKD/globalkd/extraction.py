"""Instance features of a whole dataset in both spaces: the input of prototype generation.

A deterministic choice of images, each forwarded once for all its classes, in evaluation mode and
without gradient. Not here: which instances become prototypes.
"""

import copy
import logging
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterator, List, Sequence

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import Tensor, nn
from tqdm import tqdm

from .features import InstancePooler, LevelPair, crop_to_common, to_rois
from .structures import PairedFeatures
from .teacher import Teacher

logger = logging.getLogger(__name__)


@dataclass
class BoxTable:
    """All usable boxes of a dataset, one row each; `image_ids` are positions in its dict list."""

    boxes: np.ndarray  # (B, 4) XYXY_ABS in the original image
    classes: np.ndarray  # (B,)
    image_ids: np.ndarray  # (B,)
    annotation_ids: np.ndarray  # (B,)


def usable_boxes(dataset_dicts: Sequence[dict], min_box_size: float) -> BoxTable:
    """Collect the boxes that may take part in prototype generation.

    Left out: crowds, boxes marked difficult, and boxes with a side shorter than `min_box_size`.
    """
    rows = []
    for image_id, record in enumerate(dataset_dicts):
        for annotation_id, annotation in enumerate(record.get("annotations", [])):
            if annotation.get("iscrowd", 0) or annotation.get("difficult", 0):
                continue
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            rows.append((*box, annotation["category_id"], image_id, annotation_id))
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    sides = np.minimum(table[:, 2] - table[:, 0], table[:, 3] - table[:, 1])
    table = table[(sides >= min_box_size) & (sides > 0)]
    ids = table[:, 4:].astype(np.int64)
    return BoxTable(table[:, :4], ids[:, 0], ids[:, 1], ids[:, 2])


def choose_images(table: BoxTable, *, max_images_per_class: int, seed: int) -> np.ndarray:
    """Choose images so that each class is seen in at least min(cap, all) of its images.

    The order is a seeded permutation of the images; of it, each class takes its first images up to
    the cap, and the union is chosen. An image serves every class in it, so that a class can have
    more images than the cap.

    Args:
        max_images_per_class: the cap; 0 for none.

    Returns:
        Sorted image ids.
    """
    pairs = np.unique(np.stack([table.classes, table.image_ids], axis=1), axis=0)
    if max_images_per_class <= 0 or len(pairs) == 0:
        return np.unique(pairs[:, 1])
    rank = np.random.default_rng(seed).permutation(int(pairs[:, 1].max()) + 1)
    pairs = pairs[np.lexsort((rank[pairs[:, 1]], pairs[:, 0]))]
    starts = np.flatnonzero(np.r_[True, pairs[1:, 0] != pairs[:-1, 0]])
    lengths = np.diff(np.r_[starts, len(pairs)])
    position = np.arange(len(pairs)) - np.repeat(starts, lengths)
    return np.unique(pairs[position < max_images_per_class, 1])


class ExtractionMapper:
    """Dataset dict -> model input without random augmentation, with the boxes to pool."""

    def __init__(self, augmentations: Sequence[T.Augmentation], image_format: str):
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format

    def __call__(self, record: dict) -> dict:
        image = utils.read_image(record["file_name"], format=self.image_format)
        utils.check_image_size(record, image)
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        boxes = np.asarray(record["boxes"], dtype=np.float64).reshape(-1, 4)
        scaled = transforms.apply_box(boxes)
        pixels = np.ascontiguousarray(aug_input.image.transpose(2, 0, 1))
        return {
            "image": torch.from_numpy(pixels),
            "height": image.shape[0],
            "width": image.shape[1],
            "boxes": torch.as_tensor(scaled, dtype=torch.float32),
            "original_boxes": torch.as_tensor(boxes, dtype=torch.float32),
            "classes": torch.as_tensor(record["classes"], dtype=torch.int64),
            "annotation_ids": torch.as_tensor(record["annotation_ids"], dtype=torch.int64),
            "image_id": record["image_index"],
        }


def extraction_records(
    dataset_dicts: Sequence[dict], table: BoxTable, image_ids: Sequence[int]
) -> List[dict]:
    """One small record for each chosen image, with the boxes of `table` that lie in it."""
    order = np.argsort(table.image_ids, kind="stable")
    bounds = np.searchsorted(table.image_ids[order], np.asarray(image_ids)[:, None] + [0, 1])
    records = []
    for image_id, (start, stop) in zip(image_ids, bounds):
        rows = order[start:stop]
        source = dataset_dicts[image_id]
        record = {k: source[k] for k in ("file_name", "height", "width") if k in source}
        record.update(
            image_index=int(image_id),
            boxes=table.boxes[rows],
            classes=table.classes[rows],
            annotation_ids=table.annotation_ids[rows],
        )
        records.append(record)
    return records


@torch.no_grad()
def extract_features(
    student: nn.Module,
    teacher: Teacher,
    records: List[dict],
    *,
    levels: Sequence[LevelPair],
    pooler: InstancePooler,
    mapper: Callable[[dict], dict],
    input_format: str,
    batch_size: int = 1,
    num_workers: int = 0,
    progress: bool = True,
) -> PairedFeatures:
    """Pool every box of every record on every level in both detectors.

    The student is put into evaluation mode and back. Each process handles its share of the
    records; see `gather_features`.

    Args:
        student: the student detector, with `backbone` and `preprocess_image`.
        records: from `extraction_records`.
        mapper: an `ExtractionMapper`.
        input_format: channel order of the mapper's images.
        progress: show a progress bar (main process, and only on a terminal).

    Returns:
        This process's rows, on the CPU.
    """
    loader = build_detection_test_loader(
        records, mapper=mapper, batch_size=batch_size, num_workers=num_workers
    )
    parts = [_empty_features(levels)]
    hidden = None if progress and comm.is_main_process() else True  # None: only on a terminal
    with _evaluation_mode(student), isolated_rng():
        for batch in tqdm(loader, desc="instance features", unit="batch", disable=hidden):
            parts.append(_extract_batch(student, teacher, batch, levels, pooler, input_format))
    return PairedFeatures.cat(parts)


def _extract_batch(student, teacher, batch, levels, pooler, input_format) -> PairedFeatures:
    student_maps = student.backbone(student.preprocess_image(batch).tensor)
    teacher_maps = teacher.features(batch, input_format)
    pooled: Dict[str, Dict[str, Tensor]] = {"student": {}, "teacher": {}}
    device = next(iter(student_maps.values())).device
    rois = to_rois([x["boxes"] for x in batch]).to(device)
    for pair in levels:
        s, t = crop_to_common(student_maps[pair.student], teacher_maps[pair.teacher])
        pooled["student"][pair.student] = pooler(s, rois, pair.stride).cpu()
        pooled["teacher"][pair.student] = pooler(t, rois, pair.stride).cpu()
    counts = torch.tensor([len(x["boxes"]) for x in batch])
    image_ids = torch.tensor([x["image_id"] for x in batch])
    return PairedFeatures(
        **pooled,
        classes=torch.cat([x["classes"] for x in batch]),
        image_ids=image_ids.repeat_interleave(counts),
        boxes=torch.cat([x["original_boxes"] for x in batch]),
        annotation_ids=torch.cat([x["annotation_ids"] for x in batch]),
    )


def _empty_features(levels: Sequence[LevelPair]) -> PairedFeatures:
    ids = torch.zeros(0, dtype=torch.int64)
    return PairedFeatures(
        teacher={p.student: torch.zeros(0, p.teacher_channels) for p in levels},
        student={p.student: torch.zeros(0, p.student_channels) for p in levels},
        classes=ids,
        image_ids=ids,
        boxes=torch.zeros(0, 4),
        annotation_ids=ids,
    )


def gather_features(features: PairedFeatures) -> PairedFeatures:
    """All processes' rows in the order of the records, on the main process; empty elsewhere."""
    parts = comm.gather(features)
    return PairedFeatures.cat(parts) if parts else features.select(torch.zeros(0, dtype=torch.long))


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Leave every random state as it was, so that a pass over data does not change training."""
    states = copy.deepcopy(random.getstate()), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
