"""Correlation of feature maps: what remains of their difference without magnitude and offset.

"PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", Cao
et al., NeurIPS 2022.
"""

from typing import Dict, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from .adapters import build_alignment
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - r of each channel over the cells of all images, mean over channels.

    Half the mean squared difference of what has mean 0 and variance 1 is 1 - r.

    Args:
        student, teacher: (N, D, H, W).

    Returns:
        Scalar in [0, 2]. A channel that is constant in both is at distance 0; one whose
        standard deviation is near 1e-6, the authors' epsilon, counts as partly constant.
    """
    maps = (x.float().transpose(0, 1).flatten(1) for x in (student, teacher))
    student, teacher = (F.layer_norm(x, x.shape[-1:], eps=1e-12) for x in maps)
    return 0.5 * F.mse_loss(student, teacher)


@DISTILL_LOSS_REGISTRY.register()
class PKD(DistillLoss):
    """`loss_kd_pkd`: 1 - r of each channel, mean over channels and levels.

    Default: the weight 6 of the authors' configuration for Faster R-CNN in MMRazor, on each of P2
    to P5, which it sums: 24 times their mean. For RetinaNet it is 10 on each of P3 to P6: 40, as in
    `configs/compare/pkd_retinanet.yaml`.

    Note: that code's standard deviations are of samples, these of the whole, so that the term is
    1 - r exactly and a larger batch does not change it. A 1x1 convolution, where the widths differ,
    is ours.
    """

    node = "PKD"

    @configurable
    def __init__(self, *, weight: float = 24.0):
        """
        Args:
            weight: weight of the term.
        """
        super().__init__({"loss_kd_pkd": weight})

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_alignment(levels)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = [
            correlation_distance(
                self.adapters[pair.student](context.student_maps[pair.student]),
                context.teacher_maps[pair.student],
            )
            for pair in context.levels
        ]
        return {"loss_kd_pkd": torch.stack(terms).mean()}
