"""Decoupled knowledge distillation: the target class against the rest, and the rest among itself.

"Decoupled Knowledge Distillation", Zhao et al., CVPR 2022 (DKD).

Shapes: B proposals, C scores (K classes and the background).
"""

from typing import Dict, Tuple

import torch
from detectron2.config import configurable
from torch import Tensor

from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .divergence import sigmoid_kl, softmax_kl


def decouple(logits: Tensor, labels: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Split a softmax in two: the logit of the target's probability, and the other logits.

    Args:
        logits: (B, C).
        labels: (B,) int64 in [0, C).
        temperature: T > 0.

    Returns:
        (B, 1) m, with sigmoid(m / T) the probability of the target in softmax(logits / T), and
        (B, C - 1) the logits of the other classes.
    """
    logits, target = logits.float(), labels[:, None]
    places = torch.arange(logits.shape[1] - 1, device=logits.device)
    others = logits.gather(1, places + (places >= target))
    rest = temperature * torch.logsumexp(others / temperature, dim=1, keepdim=True)
    return logits.gather(1, target) - rest, others


@DISTILL_LOSS_REGISTRY.register()
class DKD(DistillLoss):
    """`loss_kd_dkd_target` (TCKD) and `loss_kd_dkd_others` (NCKD); mean over proposals.

    TCKD is T^2 times the binary KL divergence of the target's probability, NCKD that of the other
    classes' distribution among themselves. A proposal's target is the class that the student's head
    assigned to it, or the background; the student's sampled proposals all take part, and each
    detector's box head reads its own features.

    Defaults: alpha = 1, beta = 0.25 and T = 1 of the authors' Detectron2 code.

    Note: it is defined on a softmax, and so for two-stage detectors alone.
    """

    node = "DKD"
    reads = frozenset({"predictions"})
    stages = "two"

    @configurable
    def __init__(
        self,
        *,
        target_weight: float = 1.0,
        others_weight: float = 0.25,
        temperature: float = 1.0,
        use_reliability: bool = False,
    ):
        """
        Args:
            target_weight: weight of the target's probability (paper: alpha).
            others_weight: weight of the other classes' distribution (beta).
            temperature: T > 0.
            use_reliability: multiply each positive by its reliability.
        """
        weights = {"loss_kd_dkd_target": target_weight, "loss_kd_dkd_others": others_weight}
        super().__init__(weights, use_reliability=use_reliability)
        require("DKD.TEMPERATURE", temperature, temperature > 0, "above 0")
        self.temperature = temperature

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        responses = context.predictions
        (target, others), (teacher_target, teacher_others) = (
            decouple(x, responses.labels, self.temperature)
            for x in (responses.student, responses.teacher)
        )
        rows = {
            "loss_kd_dkd_target": sigmoid_kl(target, teacher_target, self.temperature),
            "loss_kd_dkd_others": softmax_kl(others, teacher_others, self.temperature),
        }
        if self.use_reliability:
            rows = {name: x * context.prediction_reliability for name, x in rows.items()}
        return {name: rows[name].sum() / responses.normalizer for name in self.weights}
