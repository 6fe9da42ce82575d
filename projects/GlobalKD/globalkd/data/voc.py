"""Reads a folder in Pascal VOC layout: any class names, .jpg, .jpeg or .png images.

Here: files -> Detectron2 dataset dicts. Not here: the catalogs (`registration.py`) and the metric
(`engine/voc_evaluation.py`). Against Detectron2's own loader, which serves the VOC datasets that
Detectron2 registers, it keeps the "difficult" flag, accepts fractional coordinates and missing
optional tags, and names the file in every error.
"""

import os
import xml.etree.ElementTree as ET
from collections import Counter
from typing import Dict, List, Sequence

from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from .coco_checks import leaves_folder

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")
DIFFICULT = {"0": False, "1": True, "false": False, "true": True}


def split_file(folder: str, split: str) -> str:
    """Path of the text file that lists the images of a split."""
    return os.path.join(folder, "ImageSets", "Main", split + ".txt")


def load_voc_folder(folder: str, split: str, class_names: Sequence[str]) -> List[Dict]:
    """Read one split of a VOC folder.

    Args:
        folder: holds Annotations/, ImageSets/Main/ and JPEGImages/.
        split: name of a file in ImageSets/Main/, without ".txt". It names images, without their
            extension and with their subfolder, if they are in one.
        class_names: the classes; their order gives the contiguous ids.

    Returns:
        One dict an image, in the split's order: file_name, image_id (the name in the split file),
        height, width, annotations. A box is XYXY_ABS, zero-based: the file's one-based inclusive
        (1, 1, W, H) becomes (0, 0, W, H). Each annotation carries "difficult" (bool). An image
        without objects has an empty list.

    Raises:
        FileNotFoundError: an image or annotation file of the split is missing.
        ValueError: an image is listed twice, or an annotation file is malformed, has no image size,
            an unknown class or boxes of no object.
    """
    annotations = PathManager.get_local_path(os.path.join(folder, "Annotations"))
    class_ids = {name: index for index, name in enumerate(class_names)}
    # A byte order mark, as editors on Windows write it, is no part of the first name.
    with PathManager.open(split_file(folder, split), encoding="utf-8-sig") as lines:
        names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"{split_file(folder, split)} names {len(twice)} images twice: {twice[:3]}"
        )
    images = {}
    for part in {os.path.dirname(name) for name in names if not leaves_folder(name)}:
        images.update(_image_files(os.path.join(folder, "JPEGImages"), part))
    records = []
    hidden = None if comm.is_main_process() else True  # None: only on a terminal
    for name in tqdm(names, desc=f"annotations, {split}", unit="file", disable=hidden):
        if name not in images:
            expected = os.path.join(folder, "JPEGImages", name + ".jpg")
            hint = ""
            if " " in name or os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS:
                hint = " A line of a split holds an image's name without its ending, alone."
            raise FileNotFoundError(
                f"There is no {expected} (or .jpeg, .png), which split '{split}' lists.{hint}"
            )
        record = _read_annotation(os.path.join(annotations, name + ".xml"), class_ids)
        records.append({"file_name": images[name], "image_id": name, **record})
    return records


def _image_files(folder: str, part: str) -> Dict[str, str]:
    """Name in a split -> path; .jpg goes before .jpeg before .png.

    Args:
        folder: JPEGImages.
        part: the subfolder whose images are wanted; "": those of the folder itself.
    """
    path = os.path.join(folder, part) if part else folder
    if not PathManager.isdir(path):
        return {}
    found, files = PathManager.ls(path), {}
    for extension in reversed(IMAGE_EXTENSIONS):
        for file in found:
            stem, other = os.path.splitext(file)
            if other.lower() == extension:
                files[os.path.join(part, stem)] = os.path.join(path, file)
    return files


def _read_annotation(path: str, class_ids: Dict[str, int]) -> Dict:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: every image of a split needs an annotation file")
    try:
        root = ET.parse(path).getroot()
        width, height = int(_number(root, "size/width")), int(_number(root, "size/height"))
        objects = [_read_object(element, class_ids) for element in root.findall("object")]
        _require_all_read(root, len(objects))
    except KeyError as error:
        known = list(class_ids)
        raise ValueError(f"{path}: unknown class {error}; DATASETS.VOC lists {known}") from error
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not a VOC annotation: {error}") from error
    if width <= 0 or height <= 0:
        raise ValueError(f"{path}: <size> is {width} x {height}; write the image's size there")
    return {"height": height, "width": width, "annotations": objects}


def _read_object(element: ET.Element, class_ids: Dict[str, int]) -> Dict:
    name = (element.findtext("name") or "").strip()
    label = class_ids[name]
    difficult = (element.findtext("difficult") or "0").strip().lower()
    if difficult not in DIFFICULT:
        raise ValueError(f"<difficult> is {difficult!r}; it must be one of {', '.join(DIFFICULT)}")
    left, top = _number(element, "bndbox/xmin"), _number(element, "bndbox/ymin")
    right, bottom = _number(element, "bndbox/xmax"), _number(element, "bndbox/ymax")
    # One-based and inclusive. A box without area would become one pixel: leave it as it is, to be
    # dropped and counted like any other.
    shift = 1.0 if right > left and bottom > top else 0.0
    return {
        "category_id": label,
        "bbox": [left - shift, top - shift, right, bottom],
        "bbox_mode": BoxMode.XYXY_ABS,
        "difficult": DIFFICULT[difficult],
    }


def _require_all_read(root: ET.Element, count: int) -> None:
    """Raise a ValueError where boxes stand elsewhere than in the objects of the root.

    A misspelt tag or a level between would otherwise make the image look empty. Boxes of an
    object's parts do not count.
    """
    boxes, elements = 0, [root]
    while elements:
        element = elements.pop()
        boxes += element.tag.lower() == "bndbox"
        elements.extend(child for child in element if child.tag != "part")
    if boxes != count:
        raise ValueError(
            f"it has {boxes} <bndbox>, but {count} <object> of <{root.tag}>: each must stand in an "
            "<object> of its own, directly in the root"
        )


def _number(element: ET.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"<{element.tag}> has no <{path}>")
    return float(text)
