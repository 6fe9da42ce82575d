"""Cross-head distillation: what the teacher's head makes of the student's features.

"CrossKD: Cross-Head Knowledge Distillation for Object Detection", Wang et al., CVPR 2024.

Shapes: N images, D channels, H x W cells of a level, A anchors of an image, K classes.
"""

from typing import Dict, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..dense_head import by_cell
from ..features import LevelPair
from ..requirement import require
from .adapters import align_width
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def align_scale(student: Tensor, teacher: Tensor) -> Tensor:
    """Give each channel of the student the teacher's mean and deviation over images and cells.

    Args:
        student, teacher: (N, D, H, W).

    Returns:
        (N, D, H, W) float32. A channel that is constant becomes the teacher's mean.
    """
    rows = student.float().transpose(0, 1)
    standard = F.layer_norm(rows, rows.shape[1:], eps=1e-8).transpose(0, 1)
    deviation, mean = torch.std_mean(teacher.float(), dim=(0, 2, 3), correction=0, keepdim=True)
    return standard * deviation + mean


def quality_focal_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """|sigmoid(s) - sigmoid(t)| times the binary cross-entropy, summed over classes.

    Args:
        student, teacher: (..., K) logits.

    Returns:
        (...) float32, 0 where both agree.
    """
    student, target = student.float(), teacher.float().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return (entropy * (student.sigmoid() - target).abs()).sum(dim=-1)


def giou_distance(boxes: Tensor, others: Tensor) -> Tensor:
    """1 - GIoU of each pair: (M, 4) XYXY_ABS twice -> (M,) in [0, 2].

    Libraries' losses look which boxes overlap, or whether they are boxes, and so wait for a GPU.
    """
    (low, high), (other_low, other_high) = (x.split(2, dim=1) for x in (boxes, others))
    overlap = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp_min(0)
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(dim=1)
    overlap = overlap.prod(dim=1)
    union = (high - low).prod(dim=1) + (other_high - other_low).prod(dim=1) - overlap
    return 2 - overlap / union.clamp_min(1e-7) - union / hull.clamp_min(1e-7)


@DISTILL_LOSS_REGISTRY.register()
class CrossKD(DistillLoss):
    """`loss_kd_cross_class`, `loss_kd_cross_box`: what the teacher's head predicts from its own
    features, and from the student's.

    What the towers of the student's head hold before activation `depth`, at the teacher's scale
    (`align_scale`), goes through what comes after it in the teacher's frozen head. Class: quality
    focal loss of each anchor. Box: 1 - GIoU of the two boxes of each anchor, times the teacher's
    largest score there. Both are summed over all anchors but those that the detector ignores, and
    divided by the running mean of the number of positive anchors that Detectron2 divides its own
    losses by. The student's last layers learn from the annotations alone. All levels of the heads
    take part, whatever IN_FEATURES says.

    Defaults: those of the authors' RetinaNet: both weights 1, and the third of four convolutions.

    Note: the paper's towers have one width; where they differ, a 1x1 convolution for each tower,
    before `align_scale`, is ours. And the authors divide by a step's own number of positive
    anchors, which makes an image without objects count as if it had one.
    """

    node = "CROSS_KD"
    reads = frozenset({"student_dense", "teacher_dense"})
    stages = "one"

    @configurable
    def __init__(self, *, class_weight: float = 1.0, box_weight: float = 1.0, depth: int = 3):
        """
        Args:
            class_weight: weight of the class predictions.
            box_weight: weight of the box predictions.
            depth: the convolution of the student's towers that the teacher's head goes on from.
        """
        super().__init__({"loss_kd_cross_class": class_weight, "loss_kd_cross_box": box_weight})
        require("CROSS_KD.DEPTH", depth, depth >= 1, "1 or more")
        self.hidden_depth = depth

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = nn.ModuleDict({x: align_width(*self.hidden_channels) for x in self.weights})

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        target = context.teacher_dense
        their_logits = target.flat_logits
        kept = (context.candidates.labels >= 0).view(their_logits.shape[:2])
        normalizer = context.candidates.normalizer
        terms = {}
        if "loss_kd_cross_class" in self.weights:
            logits = self._through_teacher(context, "loss_kd_cross_class", tower=0)
            apart = quality_focal_loss(logits, their_logits)
            terms["loss_kd_cross_class"] = (apart * kept).sum() / normalizer
        if "loss_kd_cross_box" in self.weights:
            deltas = self._through_teacher(context, "loss_kd_cross_box", tower=1)
            sure = their_logits.amax(dim=-1).float().sigmoid() * kept
            anchors = target.flat_anchors.repeat(len(deltas), 1)
            boxes, their_boxes = (
                target.transform.apply_deltas(x.flatten(0, 1), anchors)
                for x in (deltas, target.flat_deltas)
            )
            apart = giou_distance(boxes, their_boxes)
            terms["loss_kd_cross_box"] = (apart * sure.flatten()).sum() / normalizer
        return terms

    def _through_teacher(self, context: DistillContext, term: str, *, tower: int) -> Tensor:
        """(N, A, ...) predictions of the teacher's head on a tower of the student's."""
        target, depth = context.teacher_dense, self.hidden_depth
        hidden = zip(context.student_dense.hidden[depth], target.hidden[depth])
        adapt = self.adapters[term]
        maps = [align_scale(adapt(ours[tower]), theirs[tower]) for ours, theirs in hidden]
        outputs = context.teacher.finish_tower(maps, tower, depth)
        counts = [x.shape[3] for x in target.logits.values()]
        return torch.cat([by_cell(x, n).flatten(1, 3) for x, n in zip(outputs, counts)], dim=1)
