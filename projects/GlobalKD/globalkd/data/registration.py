"""Registers the datasets that a config lists under DATASETS.COCO and DATASETS.VOC.

Here: checks of the entries, the two Detectron2 catalogs, and the removal of boxes that cannot be
learnt. Not here: the file formats (`voc.py`, `coco_files.py`) and the metrics
(`engine/coco_evaluation.py`, `engine/voc_evaluation.py`). Files of annotations are read when a
dataset is first asked for.
"""

import json
import logging
import os
from contextlib import contextmanager
from functools import partial
from typing import Dict, Iterator, List, Optional, Sequence, Tuple
from unittest import mock

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .coco_checks import warn_of_equal_names
from .coco_files import CheckedCOCO, read_categories
from .garbage_collection import paused_collection
from .voc import load_voc_folder, split_file

logger = logging.getLogger(__name__)

#: Fields of an annotation, beyond those that Detectron2 reads, that are kept: its id; how ambiguous
#: it is, and why; what tools/plant_errors.py did to it.
EXTRA_KEYS = ["id", "ambiguity", "ambiguity_kind", "planted_error"]

COCO_ENTRY = "[name, annotation JSON, image folder]"
VOC_ENTRY = "[name, folder, split, [class names]]"
IMAGES_NAMED_IN_WARNING = 5


def register_datasets(cfg: CfgNode, names: Optional[Sequence[str]] = None) -> None:
    """Register the datasets of DATASETS.COCO and DATASETS.VOC.

    A second call with the same entries changes nothing. Class names stand in the MetadataCatalog
    afterwards; images and boxes are read when the dataset is first used.

    Args:
        cfg: a config with the keys of `add_globalkd_config`. MODEL.MASK_ON says whether an
            annotation without a usable segmentation is dropped (True) or keeps its box; of several
            registrations of a name the first decides.
        names: those to register, such as DATASETS.TEST where the training data are on another
            machine; None: all.

    Raises:
        FileNotFoundError: a file or folder of an entry does not exist.
        ValueError: an entry has another form, its classes cannot be read, or its name stands for
            other data already.
    """

    def is_wanted(entry: Sequence) -> bool:
        return names is None or not entry or entry[0] in names

    for entry in filter(is_wanted, cfg.DATASETS.COCO):
        _register_coco(entry, masks=cfg.MODEL.MASK_ON)
    for entry in filter(is_wanted, cfg.DATASETS.VOC):
        _register_voc(entry)


def coco_entry(entry: Sequence) -> Tuple[str, str, str]:
    """The parts of an entry of DATASETS.COCO; a ValueError where it has another form."""
    if len(entry) != 3 or not all(isinstance(part, str) for part in entry):
        raise ValueError(f"DATASETS.COCO: {entry!r} should be {COCO_ENTRY}")
    return tuple(entry)


def voc_entry(entry: Sequence) -> Tuple[str, str, str, List[str]]:
    """The parts of an entry of DATASETS.VOC; a ValueError where it has another form."""
    if len(entry) != 4 or not all(isinstance(part, str) for part in entry[:3]):
        raise ValueError(f"DATASETS.VOC: {entry!r} should be {VOC_ENTRY}")
    name, folder, split, classes = entry
    if isinstance(classes, str) or not classes or not all(isinstance(c, str) for c in classes):
        raise ValueError(
            f"DATASETS.VOC: entry {entry!r}: the class names should be a list of strings"
        )
    if len(set(classes)) != len(classes):
        raise ValueError(f"DATASETS.VOC: entry {entry!r} names a class twice")
    return name, folder, split, list(classes)


def _register_coco(entry: Sequence[str], *, masks: bool) -> None:
    key = "DATASETS.COCO"
    name, json_file, image_root = coco_entry(entry)
    _require_exists(key, entry, json_file)
    _require_exists(key, entry, image_root)
    source = [os.path.abspath(json_file), os.path.abspath(image_root)]
    if _is_registered(key, name, source):
        return
    try:
        categories = read_categories(json_file)
    except ValueError as error:
        raise ValueError(f"{key}: entry {entry!r}: {json_file}: {error}") from error
    warn_of_equal_names(categories, name)
    MetadataCatalog.get(name).set(
        evaluator_type="coco",
        globalkd_source=source,
        json_file=json_file,
        image_root=image_root,
        thing_classes=[category["name"] for category in categories],
        thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        **_keypoint_metadata(categories),
    )
    DatasetCatalog.register(name, partial(_load_coco, name, json_file, image_root, masks))


def _keypoint_metadata(categories: Sequence[Dict]) -> Dict[str, List]:
    """What Detectron2 must know of keypoints to mirror an image: their names, left and right."""
    names = next((list(c["keypoints"]) for c in categories if c.get("keypoints")), [])
    pairs = [(name, name.replace("left", "right")) for name in names if "left" in name]
    flipped = [pair for pair in pairs if pair[1] in names]
    return {"keypoint_names": names, "keypoint_flip_map": flipped} if names else {}


@paused_collection()
def _load_coco(name: str, json_file: str, image_root: str, masks: bool) -> List[Dict]:
    reader = partial(CheckedCOCO, name=name, masks=masks)
    try:
        # Detectron2's loader takes the class from there; exchanged for this call only.
        with mock.patch("pycocotools.coco.COCO", reader), _without_remark_on_ids():
            records = load_coco_json(json_file, image_root, name, extra_annotation_keys=EXTRA_KEYS)
    except json.JSONDecodeError as error:
        raise ValueError(f"DATASETS.COCO: {json_file} is not complete JSON: {error}") from error
    except (ValueError, AssertionError) as error:
        raise ValueError(f"DATASETS.COCO: '{name}', {json_file}: {error}") from error
    make_coordinates_floats(records)
    return drop_empty_boxes(records, name)


@contextmanager
def _without_remark_on_ids() -> Iterator[None]:
    """Without Detectron2's remark, at each reading, that category ids are no labels."""
    detectron2_logger = logging.getLogger("detectron2.data.datasets.coco")

    def is_other(record: logging.LogRecord) -> bool:
        return "Category ids in annotations are not" not in record.getMessage()

    detectron2_logger.addFilter(is_other)
    try:
        yield
    finally:
        detectron2_logger.removeFilter(is_other)


def _register_voc(entry: Sequence) -> None:
    key = "DATASETS.VOC"
    name, folder, split, classes = voc_entry(entry)
    _require_exists(key, entry, split_file(folder, split))
    _require_exists(key, entry, os.path.join(folder, "Annotations"))
    _require_exists(key, entry, os.path.join(folder, "JPEGImages"))
    source = [os.path.abspath(folder), split, classes]
    if _is_registered(key, name, source):
        return
    # dirname, split and year are what Detectron2's own VOC evaluator reads.
    MetadataCatalog.get(name).set(
        evaluator_type="pascal_voc",
        globalkd_source=source,
        dirname=folder,
        split=split,
        year=2012,
        thing_classes=classes,
    )
    DatasetCatalog.register(name, partial(_load_voc, name, folder, split, classes))


@paused_collection()
def _load_voc(name: str, folder: str, split: str, class_names: Sequence[str]) -> List[Dict]:
    return drop_empty_boxes(load_voc_folder(folder, split, class_names), name)


def _require_exists(key: str, entry: Sequence, path: str) -> None:
    if not PathManager.exists(path):
        raise FileNotFoundError(
            f"{key}: entry {entry!r}: there is no {path} (seen from {os.getcwd()})"
        )


def _is_registered(key: str, name: str, source: List) -> bool:
    """True where `name` stands for exactly this source already; an error where for another."""
    if name not in DatasetCatalog:
        return False
    known = MetadataCatalog.get(name).get("globalkd_source")
    if known != source:
        owner = f"stands for {known}" if known else "is registered outside this config"
        raise ValueError(f"{key}: the name '{name}' already {owner}; {source} needs another name")
    return True


def first_images(dataset: str, count: int) -> str:
    """Register the first images of a dataset under a name of their own; return the name."""
    name = f"{dataset}_first_{count}"
    if name not in DatasetCatalog.list():
        DatasetCatalog.register(name, lambda: DatasetCatalog.get(dataset)[:count])
        metadata = MetadataCatalog.get(dataset).as_dict()
        dropped = ("name", "json_file")  # the evaluator writes its own JSON of what is there
        kept = {k: v for k, v in metadata.items() if k not in dropped}
        if metadata.get("evaluator_type") == "pascal_voc":
            # Detectron2's own evaluator would count the whole split as missed.
            kept.setdefault("globalkd_source", [dataset, count])
        MetadataCatalog.get(name).set(**kept)
    return name


def make_coordinates_floats(records: List[Dict]) -> None:
    """Make boxes and polygons of whole numbers floats, in place.

    Detectron2 resizes within the array that it makes of them: one of integers would lose every
    fraction. Keypoints are floats by its own loader.
    """
    for record in records:
        for annotation in record["annotations"]:
            annotation["bbox"] = _as_floats(annotation["bbox"])
            if isinstance(annotation.get("segmentation"), list):
                annotation["segmentation"] = [_as_floats(p) for p in annotation["segmentation"]]


def _as_floats(numbers: List) -> List:
    """Integers as floats. A list with a float in it stays: NumPy makes an array of floats of it."""
    if numbers and isinstance(numbers[0], float):  # the usual case, in which nothing is looked at
        return numbers
    return list(map(float, numbers)) if all(isinstance(x, int) for x in numbers) else numbers


def drop_empty_boxes(records: List[Dict], name: str) -> List[Dict]:
    """Remove boxes that are not finite or have no area inside their image; a warning counts them.

    Another one counts those that reach beyond their image.

    Args:
        records: Detectron2 dataset dicts with boxes in XYWH_ABS or XYXY_ABS; changed in place.
        name: the dataset's name, for the warning.

    Returns:
        `records`. Images stay, also those that lose their last box.
    """
    annotations = [a for record in records for a in record["annotations"]]
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
    counts = np.array([len(record["annotations"]) for record in records], dtype=np.int64)
    image_ids = np.repeat(np.arange(len(records)), counts)
    sizes = np.array([(r["width"], r["height"]) for r in records]).reshape(-1, 2)[image_ids]
    is_xywh = [a["bbox_mode"] == BoxMode.XYWH_ABS for a in annotations]
    boxes[is_xywh, 2:] += boxes[is_xywh, :2]
    inside = np.minimum(boxes[:, 2:], sizes) > np.maximum(boxes[:, :2], 0)
    lost = ~(inside.all(axis=1) & np.isfinite(boxes).all(axis=1))
    beyond = np.maximum(-boxes[:, :2], boxes[:, 2:] - sizes).max(axis=1, initial=0) > 1
    dropped, reaching = (
        [records[i]["file_name"] for i in image_ids[rows]] for rows in (lost, beyond & ~lost)
    )
    lost = iter(lost)
    for record in records if dropped else ():
        record["annotations"] = [a for a in record["annotations"] if not next(lost)]
    extent = boxes[:, 2:] - boxes[:, :2]
    if len(boxes) and extent.max() <= 1:
        logger.warning(
            f"{name}: no box is larger than one pixel, such as {annotations[0]['bbox']}. Are they "
            "fractions of the image? They must be pixels."
        )
    if dropped:
        logger.warning(
            f"{name}: dropped {len(dropped)} boxes of no area, outside their image or not finite, "
            f"in {_named(dropped)}"
        )
    if reaching:
        logger.warning(
            f"{name}: {len(reaching)} of {len(annotations)} boxes reach more than a pixel beyond "
            "their image, and are cut off there in training"
            f"{' (a COCO box is x, y, width, height)' * any(is_xywh)}, in {_named(reaching)}"
        )
    return records


def _named(files: List[str]) -> str:
    """How many images, and the first ones' names."""
    images = list(dict.fromkeys(files))
    more = ", ..." if len(images) > IMAGES_NAMED_IN_WARNING else ""
    return f"{len(images)} images: {', '.join(images[:IMAGES_NAMED_IN_WARNING])}{more}"
