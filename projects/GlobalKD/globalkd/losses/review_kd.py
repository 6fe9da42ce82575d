"""Knowledge review: each level of the teacher from that and all coarser levels of the student.

"Distilling Knowledge via Knowledge Review", Chen et al., CVPR 2021 (ReviewKD).
"""

from typing import Dict, Optional, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss

#: Sides of the pooled maps that `hierarchical_loss` compares besides the whole ones.
POOLED_SIDES = (4, 2, 1)


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's HCL: squared difference of maps and of what they pool to, mean over entries.

    The maps as they are have weight 1, those of 4 x 4, 2 x 2 and 1 x 1 cells, where a map is
    higher than that, 1/2, 1/4 and 1/8 (in order of what there is), over the sum of the weights.

    Args:
        student, teacher: (N, D, H, W).

    Returns:
        Scalar.
    """
    student, teacher = student.float(), teacher.float()
    total, weights = F.mse_loss(student, teacher), 1.0
    for index, side in enumerate([n for n in POOLED_SIDES if n < student.shape[2]]):
        weight = 0.5 ** (index + 1)
        pooled = (F.adaptive_avg_pool2d(x, side) for x in (student, teacher))
        total, weights = total + weight * F.mse_loss(*pooled), weights + weight
    return total / weights


class Fusion(nn.Module):
    """The paper's ABF: mix a level with what came down from the coarser ones, by attention."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, coarsest: bool):
        """
        Args:
            in_channels: of the student's map.
            mid_channels: of what is handed down.
            out_channels: of the teacher's map.
            coarsest: there is nothing to mix with.
        """
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, mid_channels, 1)
        self.attend = None if coarsest else nn.Conv2d(2 * mid_channels, 2, 1)
        self.output = nn.Conv2d(mid_channels, out_channels, 3, padding=1)

    def forward(self, maps: Tensor, coarser: Optional[Tensor]):
        """
        Args:
            maps: (N, in_channels, H, W).
            coarser: what the next coarser level handed down; None for the coarsest.

        Returns:
            What is compared with the teacher, (N, out_channels, H, W), and what is handed down,
            (N, mid_channels, H, W).
        """
        mixed = self.reduce(maps)
        if self.attend is not None:
            coarser = F.interpolate(coarser, mixed.shape[-2:], mode="nearest")
            share = self.attend(torch.cat([mixed, coarser], dim=1)).sigmoid()
            mixed = mixed * share[:, :1] + coarser * share[:, 1:]
        return self.output(mixed), mixed


@DISTILL_LOSS_REGISTRY.register()
class ReviewKD(DistillLoss):
    """`loss_kd_review`: HCL of the teacher's maps and the student's fused ones, mean over levels.

    From the coarsest level down, a level's map is mixed by attention with what the coarser ones
    handed down (ABF); what comes out is compared with the teacher's map of that level.

    Default: the weight 1 of the authors' Detectron2 code, which sums five levels: 5 times a mean.

    Note: the authors' convolutions are without bias and normalise the batch; these have a bias and
    do not, so that the term does not depend on how many images a process sees.
    """

    node = "REVIEW_KD"

    @configurable
    def __init__(self, *, weight: float = 5.0):
        """
        Args:
            weight: weight of the term.
        """
        super().__init__({"loss_kd_review": weight})

    def attach(self, levels: Sequence[LevelPair]) -> None:
        mid_channels = max(p.teacher_channels for p in levels)
        self.fusions = nn.ModuleDict(
            {
                p.student: Fusion(
                    p.student_channels,
                    mid_channels,
                    p.teacher_channels,
                    coarsest=p is levels[-1],
                )
                for p in levels
            }
        )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms, handed_down = [], None
        for pair in reversed(context.levels):
            fused, handed_down = self.fusions[pair.student](
                context.student_maps[pair.student], handed_down
            )
            terms.append(hierarchical_loss(fused, context.teacher_maps[pair.student]))
        return {"loss_kd_review": torch.stack(terms).mean()}
