"""The errors of a detector in one image, in the kinds of TIDE (Bolya et al., 2020).

Arrays in, arrays out; what is done with them is `noise`.

Shapes: D detections, G annotations and E errors of one image.
"""

from typing import NamedTuple, Tuple

import numpy as np
from detectron2.structures import Boxes, Instances, pairwise_ioa, pairwise_iou

#: IoU from which on a detection has found an annotation, and up to which it lies on background.
FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ("localisation", "classification", "duplicate", "background", "both", "missed")


class ImageErrors(NamedTuple):
    """The errors of one detector in one image, missed annotations last.

    Attributes:
        kinds: (E,) entries of KINDS.
        classes: (E,) the detection's class; of a missed annotation, its own.
        boxes: (E, 4) XYXY_ABS, likewise.
        scores: (E,) NaN for a missed annotation.
    """

    kinds: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def match(found: Instances, truth: Instances) -> Tuple[np.ndarray, np.ndarray]:
    """Say of each detection what it is, and of each annotation whether it was missed.

    A detection belongs to the annotation of its class that it overlaps most. With IoU 0.5 it has
    found it; of several, the one of the highest score is "correct" and the others are a
    "duplicate". The other kinds: "localisation" (IoU 0.1 to 0.5 with an annotation of its class),
    "classification" (IoU 0.5 with one of another class), "background" (IoU below 0.1 with any) and
    "both" (the rest). What is no hit and lies for half of its area in an ignored annotation is
    "ignored". An annotation is missed if no detection is correct, mislocalised or misclassified
    for it.

    Args:
        found: D detections.
        truth: G annotations, from `annotated_instances`.

    Returns:
        (D,) of "correct", "ignored" and the entries of KINDS but "missed"; (G,) bool.
    """
    counted = truth[~truth.ignored]
    # A last column for no annotation keeps argmax defined where there is none.
    iou = np.pad(pairwise_iou(found.pred_boxes, counted.gt_boxes).numpy(), ((0, 0), (0, 1)))
    same = found.pred_classes[:, None] == counted.gt_classes[None]
    same = np.pad(same.numpy(), ((0, 0), (0, 1)), constant_values=True)
    own, other = np.where(same, iou, 0.0), np.where(same, 0.0, iou)
    rows = np.arange(len(found))
    own_target, other_target = own.argmax(1), other.argmax(1)
    own, other = own[rows, own_target], other[rows, other_target]
    hits = own >= FOREGROUND
    first = _best_of_each(found.scores.numpy(), own_target, hits)
    in_ignored = pairwise_ioa(truth[truth.ignored].gt_boxes, found.pred_boxes).numpy()
    conditions = {
        "correct": first,
        "ignored": ~hits & (in_ignored.max(axis=0, initial=0.0) >= 0.5),
        "localisation": ~hits & (own >= BACKGROUND),
        "classification": other >= FOREGROUND,
        "duplicate": hits,
        "background": iou.max(axis=1) < BACKGROUND,
    }
    kinds = np.select(list(conditions.values()), list(conditions), default="both")
    covered = np.zeros(len(counted) + 1, dtype=bool)
    covered[own_target[first | (kinds == "localisation")]] = True
    covered[other_target[kinds == "classification"]] = True
    missed = ~truth.ignored.numpy()
    missed[missed] = ~covered[:-1]
    return kinds, missed


def _best_of_each(scores: np.ndarray, target: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """(D,) bool, the hit of the highest score on each target."""
    order = np.argsort(-scores, kind="stable")
    order = order[hits[order]]
    best = np.zeros(len(scores), dtype=bool)
    best[order[np.unique(target[order], return_index=True)[1]]] = True
    return best


def image_errors(found: Instances, truth: Instances) -> ImageErrors:
    """The errors of a detector in one image; see `match`."""
    kinds, missed = match(found, truth)
    wrong = np.isin(kinds, KINDS)
    classes = found.pred_classes.numpy(), truth.gt_classes.numpy()
    boxes = found.pred_boxes.tensor.numpy(), truth.gt_boxes.tensor.numpy()
    return ImageErrors(
        kinds=np.concatenate([kinds[wrong], np.full(missed.sum(), "missed")]),
        classes=np.concatenate([classes[0][wrong], classes[1][missed]]),
        boxes=np.concatenate([boxes[0][wrong], boxes[1][missed]]),
        scores=np.concatenate([found.scores.numpy()[wrong], np.full(missed.sum(), np.nan)]),
    )


def inherited(teacher: ImageErrors, student: ImageErrors) -> np.ndarray:
    """(E,) bool for each of the teacher's errors in an image, whether the student makes it too."""
    iou = pairwise_iou(Boxes(teacher.boxes), Boxes(student.boxes)).numpy()
    same = teacher.kinds[:, None] == student.kinds[None]
    same &= teacher.classes[:, None] == student.classes[None]
    return (same & (iou >= FOREGROUND)).any(axis=1)
