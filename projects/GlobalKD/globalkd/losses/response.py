"""Local response knowledge of GlobalKD (Sec. 3.2): KL divergence between class predictions."""

from typing import Dict

from detectron2.config import configurable
from torch import Tensor

from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .divergence import sigmoid_kl, softmax_kl


@DISTILL_LOSS_REGISTRY.register()
class ResponseKnowledge(DistillLoss):
    """`loss_kd_response`: reliability-weighted KL divergence, mean over the student's positives.

    Two-stage: the student's positive proposals, softmax over K + 1 classes, each detector's box
    head on its own features. RetinaNet: positive anchors, K independent classes.
    """

    node = "RESPONSE"
    reads = frozenset({"responses"})

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        one_stage: str = "sigmoid",
        use_reliability: bool = True,
    ):
        """
        Args:
            weight: weight of the term.
            temperature: T > 0.
            one_stage: how RetinaNet's logits are read: "sigmoid" or "softmax".
            use_reliability: multiply each row by its instance's reliability.
        """
        super().__init__({"loss_kd_response": weight}, use_reliability=use_reliability)
        require("RESPONSE.TEMPERATURE", temperature, temperature > 0, "above 0")
        divergences = {"sigmoid": sigmoid_kl, "softmax": softmax_kl}
        require("RESPONSE.ONE_STAGE", one_stage, one_stage in divergences, list(divergences))
        self.temperature = temperature
        self.one_stage_divergence = divergences[one_stage]

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        responses = context.responses
        divergence = self.one_stage_divergence if responses.one_stage else softmax_kl
        if responses.student.shape[1] == 1 and divergence is softmax_kl:
            raise ValueError(
                "RESPONSE.ONE_STAGE is 'softmax', and the softmax of a single class is 1 whatever "
                "the detectors say: set it to 'sigmoid'."
            )
        rows = divergence(responses.student, responses.teacher, self.temperature)
        if self.use_reliability:
            rows = rows * context.response_reliability
        return {"loss_kd_response": rows.sum() / responses.normalizer}
