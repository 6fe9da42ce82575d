"""Plain knowledge distillation: the teacher's softened class predictions as targets.

"Distilling the Knowledge in a Neural Network", Hinton, Vinyals, Dean, 2015; "vanilla KD" in
Table 4 of GlobalKD.
"""

from typing import Dict

from detectron2.config import configurable
from torch import Tensor

from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


@DISTILL_LOSS_REGISTRY.register()
class HintonKD(DistillLoss):
    """`loss_kd_hinton`: T^2 KL(softmax(t / T) || softmax(s / T)) of class predictions.

    Two-stage: mean over the student's proposals, each detector's box head on its own features.
    RetinaNet: K binary divergences of each anchor, divided by the number of positive anchors; of
    all anchors by its running mean, as Detectron2 normalises its own classification loss, so that
    images without objects count no more than others.

    Defaults: weight 1 and T = 2, as GlobalKD's code has them, which distils the positives alone;
    the 2015 paper fixes neither for detection. That code takes a mean over the K + 1 classes, and
    here it is the sum: its 1 would be 1 / 81 (COCO) or 1 / 21 (VOC) of this one.
    """

    node = "HINTON"

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        rows: str = "positives",
        use_reliability: bool = False,
    ):
        """
        Args:
            weight: weight of the term.
            temperature: T > 0.
            rows: "positives", or "all": the background's proposals or anchors, too.
            use_reliability: multiply each positive by its reliability ("+ prototypes" of Table 4).
        """
        super().__init__({"loss_kd_hinton": weight}, use_reliability=use_reliability)
        require("HINTON.TEMPERATURE", temperature, temperature > 0, "above 0")
        require("HINTON.ROWS", rows, rows in ("positives", "all"), ["positives", "all"])
        self.temperature = temperature
        self.reads = frozenset({"predictions" if rows == "all" else "responses"})

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        every = "predictions" in self.reads
        responses = context.predictions if every else context.responses
        weight = responses.labels >= 0
        if self.use_reliability:
            reliability = context.prediction_reliability if every else context.response_reliability
            weight = weight * reliability
        rows = responses.divergence(self.temperature) * weight
        return {"loss_kd_hinton": rows.sum() / responses.normalizer}
