"""Reads COCO JSON files: whole and checked, or one of their lists alone.

Here: what pycocotools and Detectron2's loader do not do. Not here: what must hold in a file
(`coco_checks`) and what becomes of it (`registration`).
"""

import json
import mmap
import re
from typing import Any, Dict, List

from detectron2.utils.file_io import PathManager
from pycocotools.coco import COCO

from .coco_checks import (
    check_class_names,
    check_coco,
    check_ids,
    drop_without_segmentation,
    leave_out_segmentations,
    leaves_folder,
    warn_of_equal_files,
)


class COCOFile(COCO):
    """pycocotools' `COCO` for JSON in any of Unicode's encodings, with a byte order mark or not."""

    def __init__(self, annotation_file: str):
        super().__init__()
        with open(annotation_file, "rb") as file:
            self.dataset = json.loads(file.read())
        self.createIndex()

    @property
    def cat_img_map(self) -> Dict[int, List[int]]:
        """Images by class. Of its keys faster-coco-eval makes the classes of keypoints: of all."""
        return {category: self.catToImgs[category] for category in self.cats}


class CheckedCOCO(COCOFile):
    """pycocotools' `COCO`, which checks its content before it indexes it."""

    def __init__(self, annotation_file: str, *, name: str, masks: bool):
        """
        Args:
            annotation_file: a COCO JSON.
            name: the dataset's, for warnings.
            masks: whether masks are trained. If so, annotations without a segmentation are left
                out. If not, an unusable segmentation is; Detectron2 would leave out the whole
                annotation.
        """
        self._name, self._masks = name, masks
        super().__init__(annotation_file)

    def createIndex(self) -> None:
        check_coco(self.dataset)
        warn_of_equal_files(self.dataset["images"], self._name)
        if self._masks:
            drop_without_segmentation(self.dataset, self._name)
        else:
            leave_out_segmentations(self.dataset.get("annotations", []), self._name)
        super().createIndex()


def read_categories(json_file: str) -> List[Dict]:
    """The "categories" of a COCO JSON, without parsing the rest of a large file.

    Args:
        json_file: path of an annotation file.

    Returns:
        The category dicts in the order of their labels, by id; never empty.

    Raises:
        ValueError: the file is not JSON or lists no categories, their ids are no integers or
            their names no text.
    """
    categories = _read_list(json_file, "categories")
    is_list = isinstance(categories, list) and bool(categories)
    if not is_list or not all(isinstance(c, dict) and {"id", "name"} <= set(c) for c in categories):
        raise ValueError('a COCO JSON needs "categories": [{"id": ..., "name": ...}, ...]')
    check_ids(categories, "categories")
    check_class_names(categories)
    return sorted(categories, key=lambda category: category["id"])


def read_file_names(json_file: str) -> List[str]:
    """The file names of the "images" of a COCO JSON, without parsing its annotations.

    What is not as it should be is passed over: the whole file is checked when it is loaded.
    """
    try:
        images = _read_list(json_file, "images")
    except ValueError:  # not JSON
        return []
    images = images if isinstance(images, list) else []
    names = [image.get("file_name") for image in images if isinstance(image, dict)]
    return [name for name in names if not leaves_folder(name)]


def _read_list(json_file: str, key: str) -> Any:
    """The value of a key of a JSON file; None where it has none."""
    with open(PathManager.get_local_path(json_file), "rb") as file:
        content = file.read(1) and mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts = [match.end() for match in re.finditer(rb'"%s"\s*:\s*' % key.encode(), content)]
        # A key inside a string would have escaped quotes; a second match is a nested key.
        found = _decode_list(content, starts[0]) if len(starts) == 1 else None
        if found is None:
            whole = json.loads(content[:])
            found = whole.get(key) if isinstance(whole, dict) else None
    return found


def _decode_list(content, start: int):
    """Decode the JSON list that begins at `start`; None where there is no complete list."""
    size = 1 << 16
    while start < len(content):
        text = content[start : start + size].decode("utf-8", errors="ignore")
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except json.JSONDecodeError:
            if start + size >= len(content):
                return None
            size *= 4
    return None
