"""Feature richness: the maps and class scores where the teacher sees something.

"Distilling Object Detectors with Feature Richness", Du et al., NeurIPS 2021 (FRS).

Shapes: N images, H x W cells of a level, A anchors of a cell, C classes (1 for an RPN).
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .divergence import sigmoid_kl
from .map_errors import weighted_feature_loss, weighted_mean


def feature_richness(logits: Tensor) -> Tensor:
    """Feature richness score: a cell's largest score, (N, H, W, A, C) -> (N, H, W)."""
    return logits.float().flatten(3).amax(dim=-1).sigmoid()


def rich_score_loss(student: Tensor, teacher: Tensor, richness: Tensor) -> Tensor:
    """Binary KL of all scores of a cell, summed, weighted mean over cells.

    Args:
        student, teacher: (N, H, W, A, C) logits.
        richness: (N, H, W).
    """
    divergence = sigmoid_kl(student.flatten(3), teacher.flatten(3), 1.0)
    return weighted_mean(divergence, richness)


@DISTILL_LOSS_REGISTRY.register()
class FeatureRichness(DistillLoss):
    """`loss_kd_richness_feature` and `loss_kd_richness_score`; mean over levels.

    Every cell weighs as much as the teacher's dense head is sure of something there: RetinaNet's
    class scores, or the objectness of the RPN, whose scores are then what the second term
    distils. The first is 1/2 |f(S) - T|^2, f a 3x3 convolution on each level.

    Defaults: the authors weigh sums over channels and levels by 0.002 (features) and 0.1 (scores)
    for Faster R-CNN; with 2 x 256 channels and 5 levels that is 5.12 and 0.5 here. For RetinaNet
    they have 0.005 and 0.02: 12.8 and 0.1. Both rise over the first 500 iterations (WARMUP_ITERS).

    Note: the binary cross-entropy of the scores is replaced by the divergence, whose gradient is
    the same and whose minimum is 0.
    """

    node = "FEATURE_RICHNESS"
    reads = frozenset({"student_dense", "teacher_dense"})

    @configurable
    def __init__(self, *, feature_weight: float = 5.12, score_weight: float = 0.5):
        """
        Args:
            feature_weight: weight of the maps.
            score_weight: weight of the dense head's scores.
        """
        weights = {
            "loss_kd_richness_feature": feature_weight,
            "loss_kd_richness_score": score_weight,
        }
        super().__init__(weights)
        self.compares_classes = "loss_kd_richness_score" in self.weights

    def attach(self, levels: Sequence[LevelPair]) -> None:
        if "loss_kd_richness_feature" in self.weights:
            self.adapters = build_adapters(levels, kernel_size=3, relu=False)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        measures = {
            "loss_kd_richness_feature": self._feature_term,
            "loss_kd_richness_score": self._score_term,
        }
        return {
            name: torch.stack([measures[name](context, p.student) for p in context.levels]).mean()
            for name in self.weights
        }

    def _feature_term(self, context: DistillContext, level: str) -> Tensor:
        richness = feature_richness(context.teacher_dense.logits[level])
        student = self.adapters[level](context.student_maps[level])
        return weighted_feature_loss(student, context.teacher_maps[level], richness)

    def _score_term(self, context: DistillContext, level: str) -> Tensor:
        teacher = context.teacher_dense.logits[level]
        student = context.student_dense.logits[level]
        return rich_score_loss(student, teacher, feature_richness(teacher))
