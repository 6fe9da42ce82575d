"""Local response knowledge of GlobalKD (Sec. 3.2): KL divergence between class predictions."""

from typing import Dict

import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def softmax_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) of each row: (M, C) logits -> (M,)."""
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    output = F.log_softmax(student.float() / temperature, dim=-1)
    divergence = F.kl_div(output, target, reduction="none", log_target=True)
    return divergence.sum(dim=-1) * temperature**2


def sigmoid_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the binary KL divergence of each class, summed: (M, C) logits -> (M,)."""
    s, t = student.float() / temperature, teacher.float() / temperature
    positive = t.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s))
    negative = (-t).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return (positive + negative).sum(dim=-1) * temperature**2


def check_temperature(node: str, temperature: float) -> None:
    """Raise a ValueError that names the key, unless the temperature is positive."""
    if temperature <= 0:
        raise ValueError(
            f"MODEL.GLOBALKD.{node}.TEMPERATURE is {temperature}; it must be positive."
        )


@DISTILL_LOSS_REGISTRY.register()
class ResponseKnowledge(DistillLoss):
    """`loss_kd_response`: reliability-weighted KL divergence, mean over the student's positives.

    Two-stage: the student's positive proposals, softmax over K + 1 classes, each detector's box
    head on its own features. RetinaNet: positive anchors, K independent classes.
    """

    needs_responses = True

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        one_stage: str = "sigmoid",
        weighted: bool = True,
    ):
        """
        Args:
            weight: weight of the term.
            temperature: T > 0.
            one_stage: how RetinaNet's logits are read: "sigmoid" or "softmax".
            weighted: multiply each row by its instance's reliability.
        """
        super().__init__({"loss_kd_response": weight}, weighted=weighted)
        check_temperature("RESPONSE", temperature)
        if one_stage not in ("sigmoid", "softmax"):
            raise ValueError(
                f"MODEL.GLOBALKD.RESPONSE.ONE_STAGE is {one_stage!r}; it must be 'sigmoid' or "
                "'softmax'."
            )
        self.temperature = temperature
        self.one_stage_divergence = sigmoid_kl if one_stage == "sigmoid" else softmax_kl

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GLOBALKD.RESPONSE
        return {
            "weight": node.WEIGHT,
            "temperature": node.TEMPERATURE,
            "one_stage": node.ONE_STAGE,
            "weighted": node.USE_RELIABILITY,
        }

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        responses = context.responses
        divergence = self.one_stage_divergence if responses.one_stage else softmax_kl
        rows = divergence(responses.student, responses.teacher, self.temperature)
        if self.weighted:
            rows = rows * responses.reliability
        return {"loss_kd_response": rows.sum() / max(len(rows), 1)}
