"""What must hold in a COCO JSON before anything is made of it.

Whole columns at a time: all of COCO takes seconds. Here, too: segmentations that cannot be used,
whose boxes are kept. Not here: boxes without area inside their image, which are dropped and counted
(`registration`), and images that cannot be read (`unreadable`).
"""

import logging
import os
from collections import defaultdict
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

logger = logging.getLogger(__name__)

_SHOWN = 3


def check_coco(content: Dict[str, Any]) -> None:
    """Check the parsed content of a COCO JSON of boxes.

    Ids of categories must be integers. Those of images and annotations may be text, too, as far as
    training goes; `config_checks` and the evaluator ask for more.

    A file name must lie in the image folder by its text: not absolute, and not out of the folder
    by "..". Symbolic links in the folder are followed, as they are the work of its owner.

    Raises:
        ValueError: the message says what is wrong, where, and how often.
    """
    images = _table(content, "images", ("id", "file_name", "height", "width"))
    annotations = _table(
        {"annotations": [], **content}, "annotations", ("id", "image_id", "category_id", "bbox")
    )
    _table(content, "categories", ("id", "name"))
    check_ids(images, "images", (int, str))
    check_ids(annotations, "annotations", (int, str))
    check_ids(content["categories"], "categories")
    check_class_names(content["categories"])
    strange = [a["id"] for a in annotations if type(a["image_id"]) not in (int, str)]
    _refuse(strange, "annotations whose image_id is no integer or text; ids")
    outside = [x["file_name"] for x in images if leaves_folder(x["file_name"])]
    _refuse(outside, "file names that are absolute or lead out of the image folder")
    small = [x["file_name"] for x in images if not (_is_size(x["height"]) and _is_size(x["width"]))]
    _refuse(small, "images whose height or width is no number above 0")
    known = {category["id"] for category in content["categories"]}
    strange = [a["id"] for a in annotations if a["category_id"] not in known]
    _refuse(strange, 'annotations whose category_id is not in "categories"; ids')
    check_crowds(annotations)
    _check_boxes(annotations)


def leave_out_segmentations(annotations: List[dict], name: str) -> None:
    """Remove segmentations without a polygon of three points, in place; one warning counts them."""
    lost = [a for a in annotations if a.get("segmentation") and not _is_shape(a["segmentation"])]
    for annotation in lost:
        del annotation["segmentation"]
    if lost:
        logger.warning(
            f"{name}: left out {len(lost)} segmentations that have no polygon of 3 points or more; "
            "their boxes are kept"
        )


def drop_without_segmentation(content: Dict[str, Any], name: str) -> int:
    """Remove annotations that have no segmentation, in place; a warning tells their number.

    Returns:
        The number.
    """
    annotations = content.get("annotations", [])
    kept = [a for a in annotations if a.get("segmentation")]
    dropped = len(annotations) - len(kept)
    if dropped:
        logger.warning(
            f"{name}: left out {dropped} of {len(annotations)} annotations that have no "
            "segmentation, which MODEL.MASK_ON needs"
        )
        content["annotations"] = kept
    return dropped


def _is_shape(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):  # run-length encoding
        return {"counts", "size"} <= set(segmentation)
    if not isinstance(segmentation, list) or not all(isinstance(p, list) for p in segmentation):
        return False
    return any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation)


def _table(content: Any, name: str, keys: Sequence[str]) -> List[dict]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'"{name}" should be a list of {{{", ".join(keys)}, ...}}')
    for key in keys:
        lacking = [row.get("id", i) for i, row in enumerate(rows) if key not in row]
        _refuse(lacking, f'entries of "{name}" without "{key}"; ids')
    return rows


def check_ids(rows: List[dict], name: str, types: Tuple[type, ...] = (int,)) -> None:
    """Raise a ValueError where ids of a table are of another type, or stand twice."""
    ids = [row["id"] for row in rows]
    said = " or text" if str in types else ""
    _refuse([x for x in ids if type(x) not in types], f'ids in "{name}" that are no integers{said}')
    if len(set(ids)) == len(ids):
        return
    seen = set()
    twice = [x for x in ids if x in seen or seen.add(x)]
    _refuse(twice, f'ids that stand twice in "{name}"')


def leaves_folder(name: Any) -> bool:
    """Whether a file name is no text, absolute, or leads out of its folder by ".."."""
    if not isinstance(name, str) or not name or "\0" in name:
        return True
    return os.path.isabs(name) or ".." in name.replace("\\", "/").split("/")


def check_class_names(categories: List[dict]) -> None:
    """Raise a ValueError where a category's name is no text, or empty."""
    strange = [
        c["id"] for c in categories if not (isinstance(c["name"], str) and c["name"].strip())
    ]
    _refuse(strange, "categories whose name is no text or empty; ids")


def warn_of_equal_names(categories: List[dict], name: str) -> None:
    """Warn where categories share a name: labels stay apart, and results by class do not."""
    if shared := _shared(categories, "name"):
        first, ids = next(iter(shared.items()))
        logger.warning(
            f"{name}: {len(shared)} names stand for several categories, such as '{first}' for "
            f"those of ids {', '.join(map(str, ids))}; they are trained apart, and of their AP "
            "only one is reported"
        )


def warn_of_equal_files(images: List[dict], name: str) -> None:
    """Warn where a file has several ids: in each, the objects of the others are not annotated."""
    if shared := _shared(images, "file_name"):
        first, ids = next(iter(shared.items()))
        logger.warning(
            f"{name}: {len(shared)} image files have several ids, such as {first} with "
            f"{', '.join(map(str, ids))}; each is an image of its own, without the others' boxes"
        )


def _shared(rows: List[dict], key: str) -> Dict[Any, List]:
    """Values of a key that several rows have -> their ids, in the order of the table."""
    ids = defaultdict(list)
    for row in rows:
        ids[row[key]].append(row["id"])
    return {value: own for value, own in ids.items() if len(own) > 1}


def check_crowds(annotations: List[dict]) -> None:
    """Raise a ValueError where training and COCO's metric would not agree on what is a crowd."""
    strange = [a["id"] for a in annotations if a.get("iscrowd", 0) not in (0, 1)]
    _refuse(strange, "annotations whose iscrowd is not 0 or 1; ids")


def _check_boxes(annotations: List[dict]) -> None:
    try:
        boxes = np.array([a["bbox"] for a in annotations])
    except ValueError:  # of different lengths
        boxes = np.zeros(())
    if len(annotations) and (boxes.shape[1:] != (4,) or boxes.dtype.kind not in "iuf"):
        wrong = [a["id"] for a in annotations if not _is_box(a["bbox"])]
        _refuse(wrong, "annotations whose bbox is not [left, top, width, height]; ids")


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def _refuse(examples: List, problem: str) -> None:
    if examples:
        shown = ", ".join(repr(x) for x in examples[:_SHOWN])
        more = ", ..." if len(examples) > _SHOWN else ""
        raise ValueError(f"{len(examples)} {problem}: {shown}{more}")
