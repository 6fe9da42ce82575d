"""Instance features of a whole dataset in both spaces: the input of prototype generation.

A deterministic choice of images, each forwarded once for all its classes, in evaluation mode and
without gradient. Not here: which instances become prototypes.
"""

import logging
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator, List, Sequence

import numpy as np
import torch
from detectron2.data import build_detection_test_loader
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.samplers import InferenceSampler
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import Tensor, nn
from tqdm import tqdm

from ..data.resumable_loader import shield_workers
from ..data.unreadable import UNREADABLE, pass_over
from ..features import InstancePooler, LevelPair, align_levels, to_rois
from ..random_state import isolated_rng
from ..teacher import Teacher
from .structures import PairedFeatures

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

    Cut off at their image's edges, as in training. Left out: crowds, boxes marked difficult, and
    boxes with a side shorter than `min_box_size` then.
    """
    rows, modes, sizes = [], [], []
    for image_id, record in enumerate(dataset_dicts):
        sizes.append((record.get("width", np.inf), record.get("height", np.inf)))
        for annotation_id, annotation in enumerate(record.get("annotations", [])):
            if annotation.get("iscrowd", 0) or annotation.get("difficult", 0):
                continue
            box, mode = annotation["bbox"], annotation["bbox_mode"]
            if len(box) != 4:  # rotated
                box, mode = BoxMode.convert(list(box), mode, BoxMode.XYXY_ABS), BoxMode.XYXY_ABS
            rows.append((*box, annotation["category_id"], image_id, annotation_id))
            modes.append(mode)
    table = np.asarray(rows, dtype=np.float64).reshape(-1, 7)
    modes = np.asarray(modes, dtype=np.int64)
    for mode in np.unique(modes):  # all boxes of a mode at once: there may be millions
        rows_of_mode = modes == mode
        table[rows_of_mode, :4] = BoxMode.convert(
            table[rows_of_mode, :4], BoxMode(mode), BoxMode.XYXY_ABS
        )
    corners = table[:, :4].reshape(-1, 2, 2)
    limits = np.asarray(sizes, dtype=np.float64).reshape(-1, 1, 2)[table[:, 5].astype(np.int64)]
    table[:, :4] = np.clip(corners, 0, limits).reshape(-1, 4)
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

    def __init__(
        self, augmentations: Sequence[T.Augmentation], image_format: str, max_unreadable: int = 0
    ):
        """
        Args:
            max_unreadable: DATALOADER.MAX_UNREADABLE_IMAGES; of such an image no box is pooled.
        """
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.max_unreadable = max_unreadable
        self.unreadable = torch.zeros((), dtype=torch.int64).share_memory_()  # by the workers

    def __call__(self, record: dict) -> dict:
        try:
            image = utils.read_image(record["file_name"], format=self.image_format)
            utils.check_image_size(record, image)
        except UNREADABLE as error:
            self.unreadable += 1
            pass_over(record, error, int(self.unreadable), self.max_unreadable)
            image = np.zeros((record["height"], record["width"], 3), dtype=np.uint8)
            rows = {key: record[key][:0] for key in ("boxes", "classes", "annotation_ids")}
            record = {**record, **rows}
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
    num_workers: int = 0,
    folder: str = "",
) -> PairedFeatures:
    """Pool every box of every record on every level in both detectors.

    The student is put into evaluation mode and back. Each process handles its share of the
    records, in their order: the first process the first ones.

    Args:
        student: the student detector, with `backbone`, `preprocess_image` and `input_format`, the
            channel order of the mapper's images.
        records: from `extraction_records`.
        mapper: an `ExtractionMapper`.
        folder: where to keep the features as memory-mapped temporary files; empty: in memory.

    Returns:
        This process's rows, on the CPU.
    """
    sampler = InferenceSampler(len(records))
    loader = build_detection_test_loader(
        records, mapper=mapper, sampler=sampler, batch_size=1, num_workers=num_workers
    )
    features = _allocate(sum(len(records[i]["boxes"]) for i in sampler), levels, folder)
    start = 0
    shield_workers(loader)
    hidden = None if comm.is_main_process() else True  # None: only on a terminal
    with _evaluation_mode(student), isolated_rng():
        for batch in tqdm(loader, desc="instance features", unit="batch", disable=hidden):
            part = _extract_batch(student, teacher, batch, levels, pooler)
            features.write(start, part)
            start += len(part)
    return features.select(slice(start))  # fewer than expected where an image could not be read


def _extract_batch(student, teacher, batch, levels, pooler) -> PairedFeatures:
    images = student.preprocess_image(batch).tensor
    teacher_maps = teacher.features(batch, student.input_format, once=True)
    teacher_maps = teacher.on_input_grid(teacher_maps)
    sizes = [tuple(x["image"].shape[-2:]) for x in batch]
    maps = align_levels(levels, student.backbone(images), teacher_maps, sizes, teacher.input_scale)
    rois = to_rois([x["boxes"] for x in batch]).to(images.device)
    pooled = {
        who: {p.student: pooler(own[p.student], rois, p.stride).cpu() for p in levels}
        for who, own in zip(("student", "teacher"), maps)
    }
    counts = torch.tensor([len(x["boxes"]) for x in batch])
    image_ids = torch.tensor([x["image_id"] for x in batch])
    return PairedFeatures(
        **pooled,
        classes=torch.cat([x["classes"] for x in batch]),
        image_ids=image_ids.repeat_interleave(counts),
        boxes=torch.cat([x["original_boxes"] for x in batch]),
        annotation_ids=torch.cat([x["annotation_ids"] for x in batch]),
    )


def _allocate(rows: int, levels: Sequence[LevelPair], folder: str) -> PairedFeatures:
    """Room for so many instances; their features in files of a folder, if one is given."""

    def features(channels: int) -> Tensor:
        if not folder or rows == 0:
            return torch.zeros(rows, channels)
        os.makedirs(folder, exist_ok=True)
        # The file has no name once this returns: it lives as long as the tensor.
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            _claim(file.fileno(), 4 * rows * channels, folder)
            mapped = torch.from_file(file.name, shared=True, size=rows * channels)
        return mapped.view(rows, channels)

    ids = torch.zeros(rows, dtype=torch.int64)
    return PairedFeatures(
        teacher={p.student: features(p.teacher_channels) for p in levels},
        student={p.student: features(p.student_channels) for p in levels},
        classes=ids,
        image_ids=ids.clone(),
        boxes=torch.zeros(rows, 4),
        annotation_ids=ids.clone(),
    )


def _claim(descriptor: int, size: int, folder: str) -> None:
    """Have the disk's room for a whole file: where it ran out later, the process would be killed.

    Raises:
        OSError: there is not so much.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise OSError(
            f"MODEL.GLOBALKD.PROTOTYPES.FEATURE_DIR is {folder}, where a file of "
            f"{size / 2**20:.0f} MiB cannot be made: {error}."
        ) from error


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
