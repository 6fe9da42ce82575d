"""Channel-wise distillation: where in an image each channel is active.

"Channel-wise Knowledge Distillation for Dense Prediction", Shu et al., ICCV 2021 (CWD).
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from ..requirement import require
from .adapters import build_alignment
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .divergence import softmax_kl


@DISTILL_LOSS_REGISTRY.register()
class CWD(DistillLoss):
    """`loss_kd_cwd`: T^2 KL(softmax(t / T) || softmax(s / T)) over the cells of each channel.

    Mean over channels, images and levels.

    Defaults: T = 1 and the weight 10 of MMRazor's configurations for FPNs, on each of five levels,
    which they sum: 50 times their mean, for Faster R-CNN and RetinaNet alike.

    Note: the paper is about segmentation, where class maps can be distilled likewise; for detectors
    the term is applied to the FPN's maps. A 1x1 convolution stands where the widths differ.
    """

    node = "CWD"

    @configurable
    def __init__(self, *, weight: float = 50.0, temperature: float = 1.0):
        """
        Args:
            weight: weight of the term.
            temperature: T > 0.
        """
        super().__init__({"loss_kd_cwd": weight})
        require("CWD.TEMPERATURE", temperature, temperature > 0, "above 0")
        self.temperature = temperature

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_alignment(levels)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = []
        for pair in context.levels:
            student = self.adapters[pair.student](context.student_maps[pair.student])
            teacher = context.teacher_maps[pair.student]
            rows = softmax_kl(student.flatten(2), teacher.flatten(2), self.temperature)
            terms.append(rows.mean())
        return {"loss_kd_cwd": torch.stack(terms).mean()}
