"""How suspicious an annotation is: scores from the two feature spaces and from predictions.

Every score is larger for a more suspicious annotation. Not here: which of them `audit` ranks by,
and how well they find planted errors (`audit_measure`).

Shapes: R annotations, K classes, M detections of one image.
"""

from typing import Dict, List, Tuple

import numpy as np
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn
from torchvision.ops import nms

from ..prototypes.sparse_coding import unit_rows
from ..prototypes.structures import PairedFeatures
from .discrepancy import instance_discrepancy
from .explained_share import explained_shares
from .reliability import level_reliability

#: A detection that overlaps an annotation by less than this IoU is of something else (as in TIDE).
RELATED_IOU = 0.1
#: A detection that overlaps every annotation by less than this IoU stands for an object of its own.
FREE_IOU = 0.3
#: Two such detections that overlap by more than this IoU are one object.
SAME_IOU = 0.5


def space_scores(model: nn.Module, features: PairedFeatures) -> Dict[str, np.ndarray]:
    """Scores from the features and the prototypes in the model's bank.

    Returns:
        Means over levels: "disagreement", |w_t - w_s| on the prototypes of the annotated class;
        "unreliability", 1 - omega of Eq. (8); "unexplained", the share of the teacher's feature
        outside the span of the annotated class's prototypes; "other_class", by how much more of it
        the prototypes of the best other class explain, in [-1, 1]. On the finest level alone, which
        sees most detail: "other_class_finest". Each (R,).
    """
    shares = class_shares(model, features)
    own = shares.gather(2, features.classes[None, :, None].expand(len(shares), -1, 1))
    return {
        "disagreement": np.mean(list(instance_discrepancy(model, features).values()), axis=0),
        "unreliability": 1 - np.mean(list(level_reliability(model, features).values()), axis=0),
        "unexplained": (1 - own).mean(dim=(0, 2)).numpy(),
        "other_class": best_other_margin(shares.mean(dim=0), features.classes).numpy(),
        "other_class_finest": best_other_margin(shares[0], features.classes).numpy(),
    }


def class_shares(model: nn.Module, features: PairedFeatures) -> Tensor:
    """(L, R, K): the share of each teacher feature that each class's prototypes explain."""
    bank = model.distiller.bank
    levels = []
    for level in features.levels:
        atoms, valid = bank.levels[level].teacher_prototypes.cpu(), bank.valid(level).cpu()
        x = unit_rows(features.teacher[level])
        zero = atoms.new_zeros(1, atoms.shape[2])  # a class without prototypes explains nothing
        shares = [
            explained_shares(x, torch.cat([zero, own[ok]]))[:, -1] for own, ok in zip(atoms, valid)
        ]
        levels.append(torch.stack(shares, dim=1))
    return torch.stack(levels)


def best_other_margin(values: Tensor, classes: Tensor) -> Tensor:
    """Best value of another class minus that of the own one: (R, K) >= 0, (R,) -> (R,).

    With one class only, minus the own value.
    """
    own = values.gather(1, classes[:, None]).squeeze(1)
    return values.scatter(1, classes[:, None], 0.0).amax(dim=1) - own


def class_support(
    features: PairedFeatures, detections: List[Instances], num_classes: int
) -> Tuple[Tensor, Tensor, Tensor]:
    """What a detector's detections say of the annotations.

    A detection supports an annotation by its score times their IoU.

    Args:
        detections: one for each record that `features.image_ids` points to, in pixels of the
            original image.
        num_classes: K.

    Returns:
        (R, K) the best support by each class, in [0, 1]; (R,) score times (1 - IoU) of the
        detection that supports most, whatever its class: how sure the detector is of another box;
        and (R, 4) the box of that detection. 0 and NaN where even that one overlaps by less than
        `RELATED_IOU`.
    """
    support = torch.zeros(len(features), num_classes)
    moved = torch.zeros(len(features))
    boxes = torch.full((len(features), 4), float("nan"))
    order = features.image_ids.argsort(stable=True)
    image_ids, counts = features.image_ids[order].unique_consecutive(return_counts=True)
    for image_id, rows in zip(image_ids.tolist(), order.split(counts.tolist())):
        found = detections[image_id]
        if len(found) == 0:
            continue
        iou = pairwise_iou(Boxes(features.boxes[rows].float()), found.pred_boxes)
        each = iou * found.scores
        index = found.pred_classes.expand(len(rows), -1)
        support[rows] = support[rows].scatter_reduce(1, index, each, "amax")
        best = each.argmax(dim=1)
        overlap = iou.gather(1, best[:, None]).squeeze(1)
        related = overlap >= RELATED_IOU
        moved[rows] = found.scores[best] * (1 - overlap) * related
        boxes[rows[related]] = found.pred_boxes.tensor[best[related]]
    return support, moved, boxes


def unannotated_objects(annotated: Instances, teacher: Instances, student: Instances) -> Instances:
    """Detections of the teacher, in one image, where nothing is annotated; one an object.

    Args:
        annotated: with gt_boxes, ignored ones too.
        teacher: its detections.
        student: the student's.

    Returns:
        The detections, with `agreed`: the score times the student's best support for it in the
        same class, in [0, 1].
    """
    if len(annotated):
        overlap = pairwise_iou(teacher.pred_boxes, annotated.gt_boxes).amax(dim=1)
        teacher = teacher[overlap < FREE_IOU]
    teacher = teacher[nms(teacher.pred_boxes.tensor, teacher.scores, SAME_IOU)]
    teacher.agreed = torch.zeros(len(teacher))
    if len(student):
        iou = pairwise_iou(teacher.pred_boxes, student.pred_boxes)
        same = teacher.pred_classes[:, None] == student.pred_classes[None]
        teacher.agreed = teacher.scores * (iou * student.scores * same).amax(dim=1)
    return teacher
