"""Pictures of boxes, and what a training step shows on TensorBoard at VIS_PERIOD.

Here: drawing boxes on one image, a grid of such panels, and the reliability weights of a step as
histograms and as an image. Not here: scalars, which the distiller writes, and figures of finished
runs (`analysis`). Images are (H, W, 3) uint8 in RGB order.
"""

from typing import Dict, Sequence

import cv2
import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from matplotlib import colormaps

WHITE = (255, 255, 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[str],
    colours: Sequence[Sequence[int]],
    *,
    height: int = 256,
) -> np.ndarray:
    """Boxes with labels on an image that is scaled to a height first, with a white rim.

    Args:
        boxes: (R, 4) XYXY_ABS in pixels of the given image.
        labels: R texts; an empty one is not drawn.
        colours: R colours, RGB in [0, 255].
        height: of the result, without its rim of 2 pixels.
    """
    scale = height / image.shape[0]
    size = (max(round(image.shape[1] * scale), 1), height)
    canvas = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    corners = np.rint(np.asarray(boxes, dtype=float).reshape(-1, 4) * scale).astype(int).tolist()
    for (x1, y1, x2, y2), label, colour in zip(corners, labels, colours):
        colour = tuple(map(int, colour))
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, 2)
        _put_label(canvas, label, (x1, y1), colour)
    return cv2.copyMakeBorder(canvas, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=WHITE)


def _put_label(canvas: np.ndarray, label: str, corner, colour) -> None:
    """The label on a patch of the box's colour, above its corner where the image leaves room."""
    if not label:
        return
    width, height = cv2.getTextSize(label, 0, 0.4, 1)[0]
    left, bottom = corner[0], max(corner[1], height + 4)
    cv2.rectangle(canvas, (left, bottom - height - 4), (left + width + 3, bottom), colour, -1)
    ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else WHITE
    cv2.putText(canvas, label, (left + 2, bottom - 2), 0, 0.4, ink, 1, cv2.LINE_AA)


def panel_grid(columns: Dict[str, Sequence[np.ndarray]]) -> np.ndarray:
    """Panels side by side under the columns' names, one row for each image, in cells of one size.

    Args:
        columns: name -> panels, the same number in each.
    """
    panels = [panel for column in columns.values() for panel in column]
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    headers = [np.full((24, width, 3), 255, np.uint8) for _ in columns]
    for header, name in zip(headers, columns):
        cv2.putText(header, name, (6, 17), 0, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    rows = [
        np.hstack([_pad(panel, height, width) for panel in row]) for row in zip(*columns.values())
    ]
    return np.vstack([np.hstack(headers), *rows])


def _pad(panel: np.ndarray, height: int, width: int) -> np.ndarray:
    below, right = height - panel.shape[0], width - panel.shape[1]
    return cv2.copyMakeBorder(panel, 0, below, 0, right, cv2.BORDER_CONSTANT, value=WHITE)


@torch.no_grad()
def put_reliability(storage: EventStorage, context, input_format: str) -> None:
    """Put a step's reliability weights into the storage, for writers that show pictures.

    Histograms "kd/reliability/<level>" of all instances of the batch, and as an image,
    "kd/reliability_boxes", its first image with annotated boxes, each in the colour of its weight:
    the mean over the levels, from red for 0 to green for 1. Nothing where there is no such row, and
    on processes other than the first, whose storage no writer empties.

    Args:
        storage: where to put them.
        context: the step's `DistillContext`.
        input_format: channel order of its images.
    """
    if not comm.is_main_process():
        return
    if len(context.instances):
        for level, weight in context.reliability.items():
            storage.put_histogram(f"kd/reliability/{level}", weight, bins=50)
    truth = context.ground_truth
    if len(truth) == 0:
        return
    first = int(truth.image_index[0])
    rows = truth.image_index == first
    weights = torch.stack(list(context.on_ground_truth.reliability.values())).mean(dim=0)[rows]
    weights = weights.cpu().numpy()
    pixels = context.batched_inputs[first]["image"].permute(1, 2, 0)
    panel = draw_boxes(
        np.ascontiguousarray(convert_image_to_rgb(pixels, input_format)),
        truth.boxes[rows].cpu().numpy(),
        [f"{weight:.2f}" for weight in weights],
        colormaps["RdYlGn"](weights, bytes=True)[:, :3],
        height=512,
    )
    storage.put_image("kd/reliability_boxes", panel.transpose(2, 0, 1))
