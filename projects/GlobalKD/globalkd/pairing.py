"""Whether two detectors can be compared, and what the student may take over from the teacher.

Matched feature levels are in `features.py`; here are the heads.
"""

import logging
from typing import List, Mapping, Sequence, Tuple

import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.proposal_generator.rrpn import RRPN
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from torch import nn

from .dense_head import find_dense_head, tower_widths
from .teacher import Teacher

logger = logging.getLogger(__name__)


class UnfitLosses(ValueError):
    """Losses that cannot compare a pair of detectors.

    Attributes:
        losses: their names.
    """

    def __init__(self, losses: Sequence[str], reason: str):
        super().__init__(f"{list(losses)} {reason}")
        self.losses = list(losses)


def check_pair(
    student: nn.Module,
    teacher: Teacher,
    losses: Mapping[str, nn.Module],
    *,
    levels: Sequence[str],
    num_classes: int,
) -> None:
    """Check that a pair of detectors offers what the losses read.

    Args:
        losses: name -> loss.
        levels: the student's names of the levels that are distilled.
        num_classes: the student's.

    Raises:
        UnfitLosses: it does not.
        ValueError: it is of no kind that can be distilled.
    """

    def reading(*parts: str) -> List[str]:
        return [n for n, loss in losses.items() if loss.reads & set(parts)]

    for who, model in (("student", student), ("teacher", teacher.model)):
        if isinstance(getattr(model, "proposal_generator", None), RRPN):
            raise ValueError(
                f"The {who} detects rotated boxes (MODEL.PROPOSAL_GENERATOR.NAME RRPN): such "
                "detectors cannot be distilled here."
            )
    for stages, kind in (("one", "dense"), ("two", "box")):
        defined = [n for n, loss in losses.items() if loss.stages == stages]
        if defined and _head_kind(student) != kind:
            raise UnfitLosses(
                defined,
                f"are defined for {stages}-stage detectors, but the student "
                f"({type(student).__name__}) has {_head_kind(student)} heads. Take them out of "
                "MODEL.GLOBALKD.LOSSES, or distil "
                f"{'a RetinaNet' if stages == 'one' else 'a Faster R-CNN'}.",
            )
    comparing = reading("responses", "predictions")
    by_anchor = reading("teacher_dense")
    if _head_kind(student) == "dense":
        by_anchor += comparing
    if by_anchor and teacher.input_scale != 1:
        raise UnfitLosses(
            by_anchor,
            f"compare anchor by anchor, but with MODEL.GLOBALKD.TEACHER.INPUT_SCALE = "
            f"{teacher.input_scale:g} the teacher's anchors are others. Set it to 1, or take the "
            "losses out of MODEL.GLOBALKD.LOSSES.",
        )
    if by_anchor:
        _check_padding(student, teacher.model, by_anchor)
    if comparing:
        check_comparable(student, teacher, comparing, num_classes=num_classes)
    if dense := reading("teacher_dense"):
        _check_dense_heads(student, teacher, dense)
        if _head_kind(student) == "dense":  # an RPN has no classes
            classes = [n for n in dense if losses[n].compares_classes]
            _check_num_classes(teacher, classes, num_classes)
    for name, loss in losses.items():
        if loss.hidden_depth:
            _check_towers(student, teacher, name, loss.hidden_depth)
    if anchored := reading("student_dense", "teacher_dense"):
        _check_anchored(student, levels, anchored)


def check_comparable(
    student: nn.Module, teacher: Teacher, losses: Sequence[str], *, num_classes: int
) -> None:
    """Check that class predictions of teacher and student mean the same, row by row.

    Args:
        losses: the losses that compare class predictions, for the message.
        num_classes: the student's.

    Raises:
        UnfitLosses: other number of classes, heads of another kind, or other anchors.
    """
    _check_num_classes(teacher, losses, num_classes)
    if _head_kind(student) != _head_kind(teacher.model) or _head_kind(student) == "unknown":
        raise UnfitLosses(
            losses,
            f"compare class predictions of heads of one kind, but the student "
            f"({type(student).__name__}) has {_head_kind(student)} heads and the teacher "
            f"({type(teacher.model).__name__}) {_head_kind(teacher.model)} ones. Take them out of "
            "MODEL.GLOBALKD.LOSSES.",
        )
    if _head_kind(student) == "dense":
        _check_dense_heads(student, teacher, losses)
    elif any(_scores_classes_alone(model) for model in (student, teacher.model)):
        raise UnfitLosses(
            losses,
            "compare class predictions by a softmax over classes and background, but a "
            "box head here is trained with MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE, where nobody reads "
            "the background's score. Take them out of MODEL.GLOBALKD.LOSSES.",
        )


def _padding(model: nn.Module) -> Tuple[int, int]:
    """What a detector pads its images to: a multiple, and the side of a square; 0 for none."""
    limits = model.backbone.padding_constraints
    multiple = limits.get("size_divisibility", model.backbone.size_divisibility)
    return multiple, limits.get("square_size", 0)


def _check_padding(student: nn.Module, teacher: nn.Module, losses: Sequence[str]) -> None:
    ours, theirs = _padding(student), _padding(teacher)
    if ours != theirs:
        raise UnfitLosses(
            losses,
            f"compare anchor by anchor, but the detectors pad images to other sizes: to "
            f"multiples of {ours[0]} (student) and {theirs[0]} (teacher), to squares of {ours[1]} "
            f"and {theirs[1]} (the backbone's square_pad; 0 for none). Give both the same, or take "
            "the losses out of MODEL.GLOBALKD.LOSSES.",
        )


def _check_num_classes(teacher: Teacher, losses: Sequence[str], num_classes: int) -> None:
    if losses and teacher.num_classes != num_classes:
        raise UnfitLosses(
            losses,
            f"compare class predictions, but the teacher has {teacher.num_classes} "
            f"classes and the student {num_classes}. Give both the NUM_CLASSES of the data. If the "
            "teacher knows more classes, name the student's in MODEL.GLOBALKD.TEACHER.CLASSES. If "
            "they are to differ, take these losses out of MODEL.GLOBALKD.LOSSES and set "
            "MODEL.GLOBALKD.TEACHER.ALLOW_OTHER_CLASSES True.",
        )


def _scores_classes_alone(model: nn.Module) -> bool:
    predictor = model.roi_heads.box_predictor
    predictors = predictor if isinstance(predictor, nn.ModuleList) else [predictor]
    return any(getattr(p, "use_sigmoid_ce", False) for p in predictors)


def _head_kind(model: nn.Module) -> str:
    heads = getattr(model, "roi_heads", None)
    if isinstance(heads, (StandardROIHeads, Res5ROIHeads)):  # a cascade is a StandardROIHeads
        return "box"
    if isinstance(model, RetinaNet):
        return "dense"
    return "unknown"


def _check_dense_heads(student: nn.Module, teacher: Teacher, losses: Sequence[str]) -> None:
    """What is compared anchor by anchor needs dense heads of one kind with the same anchors."""
    ours, theirs = find_dense_head(student), find_dense_head(teacher.model)
    if ours is None or theirs is None or type(ours.module) is not type(theirs.module):
        kinds = [type(x.module).__name__ if x else "none" for x in (ours, theirs)]
        raise UnfitLosses(
            losses,
            f"compare dense predictions, of RetinaNet's head or of the RPN, but the "
            f"student's dense head is {kinds[0]} and the teacher's {kinds[1]}. Take them out of "
            "MODEL.GLOBALKD.LOSSES.",
        )
    ours, theirs = ours.anchor_generator, theirs.anchor_generator
    same = ours.strides == theirs.strides and all(
        a.shape == b.shape and torch.allclose(a.cpu(), b.cpu())
        for a, b in zip(ours.cell_anchors, theirs.cell_anchors)
    )
    offsets = [getattr(x, "offset", None) for x in (theirs, ours)]  # none in one of your own
    if not same or offsets[0] != offsets[1]:
        raise UnfitLosses(
            losses,
            f"compare anchor by anchor, but teacher and student have different anchors "
            f"(strides {theirs.strides} and {ours.strides}, offsets {offsets[0]} and {offsets[1]}, "
            "or MODEL.ANCHOR_GENERATOR sizes and ratios). Give both the same, or take the losses "
            "out of MODEL.GLOBALKD.LOSSES.",
        )


def _tower_widths(student: nn.Module, teacher: Teacher) -> Tuple[List[int], List[int]]:
    ours, theirs = (tower_widths(find_dense_head(x).module) for x in (student, teacher.model))
    return ours, theirs


def hidden_channels(student: nn.Module, teacher: Teacher, depth: int) -> Tuple[int, int]:
    """What the towers of both RetinaNet heads have at a depth, from 1."""
    ours, theirs = _tower_widths(student, teacher)
    return ours[depth - 1], theirs[depth - 1]


def _check_towers(student: nn.Module, teacher: Teacher, name: str, depth: int) -> None:
    ours, theirs = _tower_widths(student, teacher)
    if min(len(ours), len(theirs)) < depth:
        raise UnfitLosses(
            [name],
            f"read layer {depth} of the towers of RetinaNet's head, but the student's have "
            f"{len(ours)} and the teacher's {len(theirs)} (MODEL.RETINANET.NUM_CONVS). Set the "
            "loss's DEPTH to fewer.",
        )


def _check_anchored(student: nn.Module, levels: Sequence[str], losses: Sequence[str]) -> None:
    head = find_dense_head(student)
    anchored = list(head.in_features) if head else []
    missing = [name for name in levels if name not in anchored]
    if missing:
        raise UnfitLosses(
            losses,
            f"need anchors on every level, but the student ({type(student).__name__}) has "
            f"none on {missing}, only on {anchored}. Set MODEL.GLOBALKD.IN_FEATURES to those, or "
            "take the losses out of MODEL.GLOBALKD.LOSSES.",
        )


def _bottom_up_prefix(backbone: nn.Module) -> str:
    """Prefix of the entries in a backbone's bottom-up part; without a pyramid, of all of it."""
    for part in ("bottom_up", "net"):  # of FPN, of SimpleFeaturePyramid (ViTDet)
        if isinstance(getattr(backbone, part, None), nn.Module):
            return f"backbone.{part}."
    return "backbone."


@torch.no_grad()
def inherit_heads(student: nn.Module, teacher: nn.Module) -> List[str]:
    """Copy the teacher's weights outside the backbone's bottom-up part where name and shape agree.

    Returns:
        The names of the student's entries that were filled.
    """
    source, target = teacher.state_dict(), student.state_dict()
    bottom_up = _bottom_up_prefix(student.backbone)
    names = [
        name
        for name, value in target.items()
        if not name.startswith(bottom_up)
        and name not in ("pixel_mean", "pixel_std")
        and name in source
        and source[name].shape == value.shape
    ]
    for name in names:
        target[name].copy_(source[name])
    logger.info(f"The student inherits {len(names)} of the teacher's entries (FPN and heads).")
    return names
