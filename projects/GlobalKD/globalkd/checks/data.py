"""What the datasets of a configuration hold, before anything is trained on them."""

import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from typing import Dict, List

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from ..data import register_datasets
from ..data.config_checks import (
    check_classes,
    check_num_classes,
    check_registered,
    detector_classes,
    require_images,
)
from ..data.voc import split_file
from ..meta_arch import is_distilled
from ..prototypes.extraction import usable_boxes
from .images import ImageSample, check_images, open_images
from .report import CheckReport, shortened

DATASET_KEYS = ("COCO", "VOC")
#: Longer tables of classes are cut to the rarest ones.
CLASSES_SHOWN = 25


@dataclass
class DatasetSummary:
    """What one registered dataset holds.

    Attributes:
        images, empty_images: their number, and of those without a box.
        missing: image files that are not there.
        sample: what some of the images show.
        instances: class name -> its boxes without crowds and difficult ones.
        candidates: of those, how many are large enough to become prototypes.
    """

    name: str
    images: int = 0
    empty_images: int = 0
    missing: List[str] = field(default_factory=list)
    sample: ImageSample = field(default_factory=ImageSample)
    instances: Dict[str, int] = field(default_factory=dict)
    candidates: Dict[str, int] = field(default_factory=dict)


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
    """Read a registered dataset's annotations and look for its image files.

    Args:
        name: a registered dataset.
        num_classes: of the student; counted where the dataset does not name its classes.
        min_box_size: MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE.
    """
    records = DatasetCatalog.get(name)
    summary = DatasetSummary(name, images=len(records))
    summary.empty_images = sum(not record.get("annotations") for record in records)
    summary.missing = [r["file_name"] for r in records if not os.path.exists(r["file_name"])]
    summary.sample = open_images(records)
    labels = list(MetadataCatalog.get(name).get("thing_classes", []))
    labels = labels or [f"class {i}" for i in range(num_classes)]
    summary.instances, summary.candidates = (
        _count(usable_boxes(records, size).classes, labels) for size in (0.0, min_box_size)
    )
    return summary


def _count(label_ids: np.ndarray, labels: List[str]) -> Dict[str, int]:
    counts = np.bincount(label_ids, minlength=len(labels)).tolist()
    found = dict.fromkeys(labels, 0)  # two classes of one name are counted together
    for i, count in enumerate(counts):
        label = labels[i] if i < len(labels) else f"class {i}"
        found[label] = found.get(label, 0) + count
    return found


def check_datasets(cfg: CfgNode, report: CheckReport, num_gpus: int) -> bool:
    """Read the annotations of all datasets; whether they can be trained on.

    Test sets that cannot be read, or lack images, are taken out of `cfg`: the rest of the check
    does without them.
    """
    if not cfg.DATASETS.TRAIN:
        report.problem("Datasets: DATASETS.TRAIN is empty; it must name a dataset to train on.")
    if not cfg.DATASETS.TEST:
        report.warn("DATASETS.TEST is empty: nothing is evaluated, in training or afterwards.")
    summaries = _summarize_each(cfg, report)
    names = {s.name for s in summaries}
    usable = bool(cfg.DATASETS.TRAIN) and names >= {*cfg.DATASETS.TRAIN}
    cfg.DATASETS.TEST = tuple(name for name in cfg.DATASETS.TEST if name in names)
    for check in (check_classes, check_num_classes):
        fits = False
        with report.part("Datasets"):
            check(cfg)
            fits = True
        usable = usable and fits
    most = cfg.DATALOADER.MAX_UNREADABLE_IMAGES
    for summary in summaries:
        _check_dataset(summary, report, most)
        check_images(summary.sample, summary.name, report, most=most)
    _check_overlap(summaries, cfg, report)
    lacking = {s.name for s in summaries if len(s.missing) > most}  # a trainer would refuse them
    usable = usable and not lacking.intersection(cfg.DATASETS.TRAIN)
    cfg.DATASETS.TEST = tuple(name for name in cfg.DATASETS.TEST if name not in lacking)
    train = [s for s in summaries if s.name in cfg.DATASETS.TRAIN]
    if train:
        images = sum(
            s.images - s.empty_images * cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS for s in train
        )
        with report.part("Datasets"):
            _check_prototype_counts(train, cfg, report)
            _report_datasets(summaries, images, cfg, report, num_gpus)
        if images == 0:
            report.problem("Datasets: no image of DATASETS.TRAIN has a box.")
            usable = False
    return usable


def _report_datasets(
    summaries: List[DatasetSummary], images: int, cfg: CfgNode, report: CheckReport, num_gpus: int
) -> None:
    per_step = cfg.SOLVER.IMS_PER_BATCH * num_gpus
    epochs = cfg.SOLVER.MAX_ITER * per_step / max(images, 1)
    report.section(
        "Datasets",
        *(f"{s.name}: {s.images} images, {sum(s.instances.values())} boxes" for s in summaries),
        f"{cfg.SOLVER.MAX_ITER} steps of {per_step} images are {epochs:.2f} epochs",
        _class_table(summaries),
    )


def _summarize_each(cfg: CfgNode, report: CheckReport) -> List[DatasetSummary]:
    """Those datasets that can be read and, of a test set, have images; the others are problems."""
    keys = {name: key for key in ("TEST", "TRAIN") for name in cfg.DATASETS[key]}
    summaries = []
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        with report.part("Datasets"):
            check_registered(name, f"DATASETS.{keys[name]}")
            summary = summarize_dataset(
                name,
                num_classes=detector_classes(cfg)[1] or 0,
                min_box_size=cfg.MODEL.GLOBALKD.PROTOTYPES.MIN_BOX_SIZE,
            )
            if name in cfg.DATASETS.TEST:
                require_images(summary.images, name)
            summaries.append(summary)
    return summaries


def _check_dataset(summary: DatasetSummary, report: CheckReport, most: int) -> None:
    name = summary.name
    if summary.missing:
        say = report.problem if len(summary.missing) > most else report.warn
        say(
            f"{name}: {len(summary.missing)} of {summary.images} image files are missing, such as "
            f"{summary.missing[0]}."
        )
    absent = [label for label, count in summary.instances.items() if count == 0]
    if absent:
        report.warn(f"{name} has no box of these classes: {shortened(absent)}.")
    if summary.empty_images:
        report.warn(f"{name}: {summary.empty_images} of {summary.images} images have no box.")


def _check_overlap(summaries: List[DatasetSummary], cfg: CfgNode, report: CheckReport) -> None:
    """Warn where a training set and a test set are read from one file of annotations."""
    files = {s.name: _annotation_file(s.name) for s in summaries}
    for train, test in product(cfg.DATASETS.TRAIN, cfg.DATASETS.TEST):
        file = files.get(train)
        if file and file == files.get(test):
            report.warn(
                f"DATASETS.TRAIN '{train}' and DATASETS.TEST '{test}' are the same data, {file}: "
                "the metric would be that of images trained on."
            )


def _annotation_file(name: str) -> str:
    """The file that lists a dataset's images: the COCO JSON or VOC split; "" if not known."""
    metadata = MetadataCatalog.get(name)
    file = metadata.get("json_file", "")
    if metadata.get("evaluator_type") == "pascal_voc":
        file = split_file(metadata.get("dirname", ""), metadata.get("split", ""))
    return os.path.realpath(file) if os.path.isfile(file) else ""


def _check_prototype_counts(train: List[DatasetSummary], cfg: CfgNode, report: CheckReport) -> None:
    node = cfg.MODEL.GLOBALKD.PROTOTYPES
    instances, candidates = Counter(), Counter()
    for summary in train:
        instances.update(summary.instances)
        candidates.update(summary.candidates)
    few = [f"{x} ({candidates[x]})" for x in instances if instances[x] and candidates[x] < node.NUM]
    if few and is_distilled(cfg):
        report.warn(
            f"Classes with fewer boxes of at least MIN_BOX_SIZE ({node.MIN_BOX_SIZE:g}) than "
            f"MODEL.GLOBALKD.PROTOTYPES.NUM ({node.NUM}), and so with fewer prototypes: "
            f"{shortened(few)}."
        )


def _class_table(summaries: List[DatasetSummary]) -> str:
    """A row for each class name of any dataset; "-" where a dataset does not have it."""
    labels = list(dict.fromkeys(label for s in summaries for label in s.instances))
    title = ""
    if len(labels) > CLASSES_SHOWN:
        labels.sort(key=lambda label: summaries[0].instances.get(label, 0))
        labels = labels[:CLASSES_SHOWN]
        title = f"the {CLASSES_SHOWN} rarest classes:\n"
    rows = [
        [label, *(t.get(label, "-") for s in summaries for t in (s.instances, s.candidates))]
        for label in labels
    ]
    heads = [head for s in summaries for head in (s.name, "large enough")]
    return title + tabulate(rows, headers=["class", *heads])
