"""Global knowledge, Eq. (6) of GlobalKD: equal coefficients on the common prototypes."""

from typing import Dict

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def coefficient_loss(student: Tensor, teacher: Tensor, weight: Tensor, penalty: str) -> Tensor:
    """Weighted penalty on the difference of coefficients, Eq. (6).

    Args:
        student: (L, R, C) coefficients, with gradient.
        teacher: (L, R, C) coefficients, the targets.
        weight: (L, R) reliability.
        penalty: "l2" (half the square) or "smooth_l1" (quadratic up to 1).

    Returns:
        Scalar: summed over the C prototypes, mean over instances and levels; 0 without instances.
    """
    if penalty == "l2":
        distance = 0.5 * (student - teacher).square()
    else:
        distance = F.smooth_l1_loss(student, teacher, reduction="none")
    by_level = (distance.sum(dim=2) * weight).sum(dim=1) / max(weight.shape[1], 1)
    return by_level.mean()


@DISTILL_LOSS_REGISTRY.register()
class GlobalKnowledge(DistillLoss):
    """`loss_kd_global`: the student is to have the teacher's coefficients on the prototypes.

    Mean over instances and levels. With scope "all" the sum over prototypes is divided by the
    number of classes, so that both scopes have one scale.
    """

    needs_prototypes = True

    @configurable
    def __init__(
        self,
        *,
        weight: float = 5.0,
        scope: str = "class",
        penalty: str = "l2",
        use_reliability=True,
    ):
        """
        Args:
            weight: weight of the term; the paper's third one.
            scope: "class" (the prototypes of the instance's own class) or "all".
            penalty: "l2" or "smooth_l1".
            use_reliability: multiply each instance by its reliability.
        """
        super().__init__({"loss_kd_global": weight}, use_reliability=use_reliability)
        for key, value, allowed in (
            ("GLOBAL.SCOPE", scope, ("class", "all")),
            ("GLOBAL.PENALTY", penalty, ("l2", "smooth_l1")),
        ):
            require(key, value, value in allowed, allowed)
        self.scope = scope
        self.penalty = penalty

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GLOBALKD.GLOBAL
        return {
            "weight": node.WEIGHT,
            "scope": node.SCOPE,
            "penalty": node.PENALTY,
            "use_reliability": node.USE_RELIABILITY,
        }

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        every = self.scope == "all"
        teacher, student = context.bank.project(
            context.teacher_instance_features,
            context.student_instance_features,
            None if every else context.instances.classes,
        )
        teacher, student = teacher.flatten(2), student.flatten(2)
        weight = torch.stack([self.instance_weight(context, p.student) for p in context.levels])
        distance = (student.detach() - teacher).norm(dim=2)
        context.observations["kd/discrepancy"] = distance.sum() / max(distance.numel(), 1)
        share = 1.0 / context.bank.num_classes if every else 1.0
        return {"loss_kd_global": share * coefficient_loss(student, teacher, weight, self.penalty)}
