"""Hints from whole feature maps.

"FitNets: Hints for Thin Deep Nets", Romero et al., ICLR 2015.
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .map_errors import weighted_feature_loss


@DISTILL_LOSS_REGISTRY.register()
class FitNet(DistillLoss):
    """`loss_kd_fitnet`: 1/2 |r(S) - T|^2 over all cells (L_HT), r a 1x1 regressor on each level.

    Mean over cells, channels and levels.

    Note: the paper trains towards one hint in a stage of its own, before the task; here every
    level is a hint and the term is added to the task's losses, as detection papers compare it.
    There is no weight of the authors to translate (theirs is of a sum over channels, in a stage
    that has no other loss): the default is 1.
    """

    node = "FITNET"

    @configurable
    def __init__(self, *, weight: float = 1.0):
        """
        Args:
            weight: weight of the term.
        """
        super().__init__({"loss_kd_fitnet": weight})

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_adapters(levels, kernel_size=1, relu=False)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = []
        for pair in context.levels:
            teacher = context.teacher_maps[pair.student]
            student = self.adapters[pair.student](context.student_maps[pair.student])
            everywhere = torch.ones_like(teacher[:, 0], dtype=torch.float32)
            terms.append(weighted_feature_loss(student, teacher, everywhere))
        return {"loss_kd_fitnet": torch.stack(terms).mean()}
