"""Masked generative distillation: the teacher's maps from what is left of the student's.

"Masked Generative Distillation", Yang et al., ECCV 2022 (MGD).
"""

from typing import Dict, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..requirement import require
from .adapters import build_alignment
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


@DISTILL_LOSS_REGISTRY.register()
class MGD(DistillLoss):
    """`loss_kd_mgd`: |G(s M) - t|^2, mean over cells, channels, images and levels.

    M is 0 on a random share lambda of the cells, drawn anew for each step, image and level, and 1
    elsewhere. G is two 3x3 convolutions with a ReLU between them, on each level.

    Defaults: lambda = 0.45 and the weight of the authors' Faster R-CNN, which they apply to a sum
    over channels, cells and levels P2 to P5: 5e-7 of 256 channels and, for 800 x 1344 pixels,
    89,250 cells. RetinaNet's (0.65; 2e-5 of P3 to P7, 22,400 cells) are in
    `configs/compare/mgd_retinanet.yaml`, whose student has the teacher's FPN and head at the start
    in their code (INHERIT_TEACHER_HEADS); here that is off.
    """

    node = "MGD"

    @configurable
    def __init__(self, *, weight: float = 11.4, mask_ratio: float = 0.45):
        """
        Args:
            weight: weight of the term.
            mask_ratio: lambda, the share of cells that is hidden, in [0, 1).
        """
        super().__init__({"loss_kd_mgd": weight})
        require("MGD.MASK_RATIO", mask_ratio, 0 <= mask_ratio < 1, "in [0, 1)")
        self.mask_ratio = mask_ratio

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_alignment(levels)
        self.generators = nn.ModuleDict(
            {p.student: self._generator(p.teacher_channels) for p in levels}
        )

    @staticmethod
    def _generator(channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = []
        for pair in context.levels:
            student = self.adapters[pair.student](context.student_maps[pair.student])
            draws = torch.rand_like(student[:, :1], dtype=torch.float32)
            generated = self.generators[pair.student](student * (draws >= self.mask_ratio))
            terms.append(F.mse_loss(generated.float(), context.teacher_maps[pair.student].float()))
        return {"loss_kd_mgd": torch.stack(terms).mean()}
