"""What the datasets of a configuration hold, before anything is trained on them."""

import os
from dataclasses import dataclass, field
from typing import List

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ...data import register_datasets
from ...prototypes.extraction import usable_boxes
from .report import CheckReport, shortened

DATASET_KEYS = ("COCO", "VOC")
#: Longer tables of classes are cut to the rarest ones.
CLASSES_SHOWN = 25


@dataclass
class DatasetSummary:
    """What one registered dataset holds.

    Attributes:
        classes: its class names; empty where they are not known.
        images, empty_images: their number, and of those without a box.
        missing: image files that are not there.
        instances: (K,) boxes of each class without crowds and difficult ones.
        candidates: (K,) of those, how many are large enough to become prototypes.
    """

    name: str
    classes: List[str]
    images: int = 0
    empty_images: int = 0
    missing: List[str] = field(default_factory=list)
    instances: np.ndarray = None
    candidates: np.ndarray = None


def register_each(cfg: CfgNode) -> List[Exception]:
    """Register the datasets of DATASETS.COCO and DATASETS.VOC; the errors of those that fail."""
    errors = []
    for key in DATASET_KEYS:
        for entry in cfg.DATASETS[key]:
            single = cfg.clone()
            single.defrost()
            for other in DATASET_KEYS:
                single.DATASETS[other] = [entry] if other == key else []
            try:
                register_datasets(single)
            except (FileNotFoundError, ValueError) as error:
                errors.append(error)
    return errors


def summarize_dataset(name: str, *, num_classes: int, min_box_size: float) -> DatasetSummary:
    """Read a dataset's annotations and look for its image files.

    Args:
        name: a registered dataset.
        num_classes: K of the student; classes beyond it are counted, too.
        min_box_size: MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE.

    Raises:
        KeyError: no dataset of this name is registered.
    """
    if name not in DatasetCatalog:
        raise KeyError(
            f"DATASETS names '{name}', which is not registered: neither in DATASETS.COCO or "
            "DATASETS.VOC nor one of Detectron2's own."
        )
    records = DatasetCatalog.get(name)
    classes = list(MetadataCatalog.get(name).get("thing_classes", []))
    summary = DatasetSummary(name, classes, images=len(records))
    summary.empty_images = sum(not record.get("annotations") for record in records)
    summary.missing = [r["file_name"] for r in records if not os.path.exists(r["file_name"])]
    length = max(num_classes, len(classes))
    summary.instances, summary.candidates = (
        np.bincount(usable_boxes(records, size).classes, minlength=length)
        for size in (0.0, min_box_size)
    )
    return summary


def check_datasets(cfg: CfgNode, report: CheckReport, num_gpus: int) -> bool:
    """Read the annotations of all datasets; whether training and test data can be read."""
    num_classes, key = _num_classes(cfg)
    summaries = []
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        with report.part("Datasets"):
            size = cfg.MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE
            summaries.append(summarize_dataset(name, num_classes=num_classes, min_box_size=size))
    for summary in summaries:
        _check_dataset(summary, report, num_classes, key)
    names = {s.name for s in summaries}
    train = [s for s in summaries if s.name in cfg.DATASETS.TRAIN]
    if train:
        _check_prototype_counts(train, cfg, report)
        images = sum(
            s.images - s.empty_images * cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS for s in train
        )
        per_step = cfg.SOLVER.IMS_PER_BATCH * num_gpus
        epochs = cfg.SOLVER.MAX_ITER * per_step / max(images, 1)
        report.section(
            "Datasets",
            *(f"{s.name}: {s.images} images, {s.instances.sum()} boxes" for s in summaries),
            f"{cfg.SOLVER.MAX_ITER} steps of {per_step} images are {epochs:.2f} epochs",
            _class_table(summaries),
        )
        if images == 0:
            report.problem("Datasets: no image of DATASETS.TRAIN has a box.")
    if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
        report.problem("Datasets: DATASETS.TRAIN and DATASETS.TEST must each name a dataset.")
        return False
    return names >= {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}


def _num_classes(cfg: CfgNode):
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        return cfg.MODEL.RETINANET.NUM_CLASSES, "MODEL.RETINANET.NUM_CLASSES"
    return cfg.MODEL.ROI_HEADS.NUM_CLASSES, "MODEL.ROI_HEADS.NUM_CLASSES"


def _check_dataset(summary: DatasetSummary, report: CheckReport, num_classes: int, key: str):
    name, count = summary.name, len(summary.classes)
    if count > num_classes:
        report.problem(f"{name} has {count} classes, but {key} is {num_classes}.")
    elif count and count < num_classes:
        report.warn(f"{name} has {count} classes, {key} is {num_classes}: some outputs are unused.")
    if summary.missing:
        report.problem(
            f"{name}: {len(summary.missing)} of {summary.images} image files are missing, such as "
            f"{summary.missing[0]}."
        )
    absent = [_label(summary, i) for i, n in enumerate(summary.instances) if n == 0]
    if absent:
        report.warn(f"{name} has no box of these classes: {shortened(absent)}.")
    if summary.empty_images:
        report.warn(f"{name}: {summary.empty_images} of {summary.images} images have no box.")


def _check_prototype_counts(train: List[DatasetSummary], cfg: CfgNode, report: CheckReport):
    node = cfg.MODEL.GLOBALKD.PROTOTYPES
    candidates = sum(s.candidates for s in train)
    few = [
        f"{_label(train[0], i)} ({n})"
        for i, n in enumerate(candidates)
        if n < node.NUM and sum(s.instances[i] for s in train) > 0
    ]
    if few and cfg.MODEL.GLOBALKD.ENABLED:
        report.warn(
            f"Classes with fewer boxes of at least MIN_BOX_SIZE ({node.MIN_BOX_SIZE:g}) than "
            f"MODEL.GLOBALKD.PROTOTYPES.NUM ({node.NUM}), and so with fewer prototypes: "
            f"{shortened(few)}."
        )


def _label(summary: DatasetSummary, index: int) -> str:
    return summary.classes[index] if index < len(summary.classes) else f"class {index}"


def _class_table(summaries: List[DatasetSummary]) -> str:
    order = range(len(summaries[0].instances))
    title = ""
    if len(order) > CLASSES_SHOWN:
        order = sorted(order, key=lambda i: summaries[0].instances[i])[:CLASSES_SHOWN]
        title = f"the {CLASSES_SHOWN} rarest classes:\n"
    rows = [
        [_label(summaries[0], i)]
        + [n for s in summaries for n in (s.instances[i], s.candidates[i])]
        for i in order
    ]
    heads = [head for s in summaries for head in (s.name, "large enough")]
    return title + tabulate(rows, headers=["class", *heads])
