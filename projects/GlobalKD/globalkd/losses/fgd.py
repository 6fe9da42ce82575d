"""Focal and global distillation: objects and background apart, attention, and an image's context.

"Focal and Global Knowledge Distillation for Detectors", Yang et al., CVPR 2022 (FGD).

Shapes: N images, D channels, H x W cells of a level.
"""

from typing import Dict, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..requirement import require
from .adapters import build_alignment
from .attention import attention, softmax_mask
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .masks import instance_masks


class ContextBlock(nn.Module):
    """The paper's GcBlock: one vector for an image, pooled by attention, on each of its cells.

    x_i + W2 ReLU(LN(W1 sum_j softmax_j(w x_j) x_j)); W2 is zero at first.
    """

    def __init__(self, channels: int):
        """
        Args:
            channels: D.
        """
        super().__init__()
        inner = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1, bias=False)
        self.transform = nn.Sequential(
            nn.Linear(channels, inner),
            nn.LayerNorm(inner),
            nn.ReLU(),
            nn.Linear(inner, channels),
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, D, H, W) -> (N, D, H, W)."""
        share = self.attend(maps).flatten(2).softmax(dim=2)
        pooled = (maps.flatten(2) @ share.mT).squeeze(2)
        return maps + self.transform(pooled)[:, :, None, None]


@DISTILL_LOSS_REGISTRY.register()
class FGD(DistillLoss):
    """Focal terms `loss_kd_fgd_object`, `_background`, `_spatial` and `_channel`, and the global
    term `loss_kd_fgd_relation`.

    Focal: A^S_t A^C_t (t - s)^2, mean over channels. Objects: on the annotated boxes, each box's
    mean over its cells, of boxes that overlap the smaller one; summed over an image's boxes, mean
    over images. Background: mean over the other cells of an image, then over images. A^S and A^C
    are H W softmax(G^S / T) and D softmax(G^C / T) of means of |t| over channels and cells.
    Attention: |A_t - A_s|, mean over cells (spatial) and over channels. Relation: squared
    difference after a context block for each detector, mean over cells and channels. Each of them
    is a mean over levels.

    Defaults: T = 0.5 and the weights of the authors' Faster R-CNN, which they apply to sums over
    channels, cells and levels P2 to P5: alpha = 5e-5 and beta = 2.5e-5 of 256 channels and four
    levels, gamma = 5e-5 of as many channels and, for 800 x 1344 pixels, of 89,250 cells, lambda =
    5e-7 of both. Those of RetinaNet, of P3 to P7, are in `configs/compare/fgd_retinanet.yaml`.

    Note: a box is on every cell that it touches; in that code on up to one more in each direction.
    The authors start the student's FPN and head as the teacher's (INHERIT_TEACHER_HEADS); here that
    is off. The teacher's context block is trained with the student's, as in that code; it only adds
    to the teacher's map, and so cannot empty it.
    """

    node = "FGD"

    @configurable
    def __init__(
        self,
        *,
        object_weight: float = 0.0512,
        background_weight: float = 0.0256,
        spatial_weight: float = 4.46,
        channel_weight: float = 0.0512,
        relation_weight: float = 11.4,
        temperature: float = 0.5,
        use_reliability: bool = False,
    ):
        """
        Args:
            object_weight: weight of the maps on annotated boxes (paper: alpha).
            background_weight: weight of the maps elsewhere (beta).
            spatial_weight: weight of the spatial attention (gamma).
            channel_weight: weight of the channel attention (gamma).
            relation_weight: weight of the maps with their context (lambda).
            temperature: T > 0 of the attention.
            use_reliability: multiply each box's cells by its reliability.
        """
        weights = {
            "loss_kd_fgd_object": object_weight,
            "loss_kd_fgd_background": background_weight,
            "loss_kd_fgd_spatial": spatial_weight,
            "loss_kd_fgd_channel": channel_weight,
            "loss_kd_fgd_relation": relation_weight,
        }
        super().__init__(weights, use_reliability=use_reliability)
        require("FGD.TEMPERATURE", temperature, temperature > 0, "above 0")
        self.temperature = temperature

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_alignment(levels)
        if "loss_kd_fgd_relation" in self.weights:
            self.student_contexts, self.teacher_contexts = (
                nn.ModuleDict({p.student: ContextBlock(p.teacher_channels) for p in levels})
                for _ in range(2)
            )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        levels, masks = [], instance_masks(self, context.on_ground_truth, share=True)
        for pair, mask in zip(context.levels, masks):
            name = pair.student
            student = self.adapters[name](context.student_maps[name]).float()
            teacher = context.teacher_maps[name].float()
            with torch.autocast(student.device.type, enabled=False):
                terms = self._focal(student, teacher, mask)
                if "loss_kd_fgd_relation" in self.weights:
                    terms["loss_kd_fgd_relation"] = F.mse_loss(
                        self.student_contexts[name](student), self.teacher_contexts[name](teacher)
                    )
            levels.append(terms)
        return {name: torch.stack([x[name] for x in levels]).mean() for name in self.weights}

    def _focal(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Dict[str, Tensor]:
        ours, theirs = (
            [softmax_mask(x, self.temperature) for x in attention(maps)]
            for maps in (student, teacher)
        )
        squared = ((student - teacher).square() * theirs[1]).mean(dim=1) * theirs[0].squeeze(1)
        background = (mask == 0).float()
        background = background / background.sum(dim=(1, 2), keepdim=True).clamp_min(1)
        return {
            "loss_kd_fgd_object": (squared * mask).sum() / len(mask),
            "loss_kd_fgd_background": (squared * background).sum() / len(mask),
            "loss_kd_fgd_spatial": F.l1_loss(ours[0], theirs[0]),
            "loss_kd_fgd_channel": F.l1_loss(ours[1], theirs[1]),
        }
