"""Global knowledge, Eq. (6) of GlobalKD: equal coefficients on the common prototypes."""

from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def coefficient_loss(
    student: Tensor, teacher: Tensor, weight: Tensor, count: Tensor, penalty: str
) -> Tensor:
    """Weighted penalty on the difference of coefficients, Eq. (6).

    Args:
        student: (L, R, C) coefficients, with gradient.
        teacher: (L, R, C) coefficients, the targets.
        weight: (L, R) reliability.
        count: (L,) what the sum over instances and prototypes is divided by; 0 counts as 1.
        penalty: "l2" (half the square) or "smooth_l1" (quadratic up to 1).

    Returns:
        Scalar, the mean over levels; 0 without instances.
    """
    if penalty == "l2":
        distance = 0.5 * (student - teacher).square()
    else:
        distance = F.smooth_l1_loss(student, teacher, reduction="none")
    by_level = (distance.sum(dim=2) * weight).sum(dim=1) / count.clamp_min(1)
    return by_level.mean()


def project(context: DistillContext, scope: str) -> Tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the context's instances on the prototypes.

    Args:
        scope: "class", C = P prototypes of the instance's own class; "all", C = K P of every class.

    Returns:
        (L, R, C) of the student, with gradient, (L, R, C) of the teacher, and (L,) the number of
        pairs of an instance and a class with prototypes that it is projected on.
    """
    classes = None if scope == "all" else context.instances.classes
    teacher, student = context.bank.project(
        context.teacher_instance_features, context.student_instance_features, classes
    )
    covered = context.bank.covered([p.student for p in context.levels])  # (L, K)
    if scope == "all":
        count = covered.sum(dim=1) * len(context.instances)
    else:
        count = covered[:, classes].sum(dim=1)
    return student.flatten(2), teacher.flatten(2), count


@DISTILL_LOSS_REGISTRY.register()
class GlobalKnowledge(DistillLoss):
    """`loss_kd_global`: the student is to have the teacher's coefficients on the prototypes.

    Summed over the prototypes of a class, mean over instances, classes (with scope "all") and
    levels. Classes without prototypes do not count, nor do their instances with scope "class".
    """

    node = "GLOBAL"
    reads = frozenset({"bank"})

    @configurable
    def __init__(
        self,
        *,
        weight: float = 5.0,
        scope: str = "class",
        penalty: str = "l2",
        use_reliability: bool = True,
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

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        student, teacher, count = project(context, self.scope)
        weight = torch.stack([self.instance_weight(context, p.student) for p in context.levels])
        distance = (student.detach() - teacher).norm(dim=2)
        context.observations["kd/discrepancy"] = distance.sum() / max(distance.numel(), 1)
        return {"loss_kd_global": coefficient_loss(student, teacher, weight, count, self.penalty)}
