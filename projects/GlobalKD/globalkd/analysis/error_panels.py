"""Images with detections in the colours of their kinds of error, detectors side by side."""

from typing import Dict, List, Sequence

import cv2
import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.structures import Instances
from PIL import Image

from ..visualization import draw_boxes, panel_grid
from .detection_errors import match

COLOURS = {
    "correct": (60, 180, 60),
    "localisation": (255, 160, 0),
    "classification": (220, 40, 40),
    "duplicate": (170, 90, 220),
    "background": (40, 110, 230),
    "both": (160, 100, 40),
    "missed": (150, 150, 150),
    "ignored": (220, 220, 220),
}


def draw_error_grid(
    path,
    records: Sequence[dict],
    truth: Sequence[Instances],
    found: Dict[str, List[Instances]],
    names: Sequence[str],
) -> None:
    """Write a picture: one row an image, the annotations and each detector side by side.

    Args:
        path: the file.
        records: dataset dicts.
        truth: their annotations, from `annotated_instances`.
        found: detector -> its detections in each image.
        names: of the classes.
    """
    columns = {"annotations": [_annotations(*image, names) for image in zip(records, truth)]}
    for detector, detections in found.items():
        columns[detector] = [_errors(*x, names) for x in zip(records, truth, detections)]
    grid = panel_grid(columns)
    Image.fromarray(np.vstack([grid, _legend(grid.shape[1])])).save(path)


def _annotations(record: dict, truth: Instances, names: Sequence[str]) -> np.ndarray:
    colours = [COLOURS["ignored" if ignored else "correct"] for ignored in truth.ignored]
    return _panel(record, truth.gt_boxes.tensor, truth.gt_classes, colours, names)


def _errors(record: dict, truth: Instances, found: Instances, names: Sequence[str]) -> np.ndarray:
    kinds, missed = match(found, truth)
    boxes = np.concatenate([truth.gt_boxes.tensor[missed], found.pred_boxes.tensor])
    classes = np.concatenate([truth.gt_classes[missed], found.pred_classes])
    colours = [COLOURS[kind] for kind in ["missed"] * int(missed.sum()) + list(kinds)]
    return _panel(record, boxes, classes, colours, names)


def _panel(record, boxes, classes, colours, names) -> np.ndarray:
    image = read_image(record["file_name"], "RGB")
    return draw_boxes(image, boxes, [names[label] for label in classes], colours)


def _legend(width: int) -> np.ndarray:
    """A strip with the kinds in their colours."""
    strip = np.full((26, width, 3), 255, np.uint8)
    x = 6
    for kind, colour in COLOURS.items():
        cv2.putText(strip, kind, (x, 18), 0, 0.45, colour, 1, cv2.LINE_AA)
        x += cv2.getTextSize(kind, 0, 0.45, 1)[0][0] + 14
    return strip
