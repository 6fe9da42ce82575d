"""Decoupled features: objects and background of the maps, positives and negatives of the head.

"Distilling Object Detectors via Decoupled Features", Guo et al., CVPR 2021 (DeFeat).
"""

from typing import Dict, Sequence, Tuple

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from ..requirement import require
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .map_errors import cell_errors, weighted_mean
from .masks import instance_masks
from .outputs import Responses

#: Boxes are on the finest level up to twice this side in pixels, then on the next one, and so on.
FINEST_SIDE = 56.0


def box_levels(boxes: Tensor, num_levels: int) -> Tensor:
    """(R,) int64, the level on which each (R, 4) XYXY_ABS box is an object; 0 is the finest."""
    side = (boxes[:, 2:] - boxes[:, :2] + 1).prod(dim=1).sqrt()
    return (side / FINEST_SIDE).log2().floor().clamp(0, num_levels - 1).long()


def decoupled_divergence(responses: Responses, temperature: float) -> Tuple[Tensor, Tensor]:
    """Mean KL divergence of class predictions: on foreground rows, and on background rows."""
    rows = responses.divergence(temperature)
    background = responses.background
    foreground = (responses.labels >= 0) & ~background
    positive, negative = (weighted_mean(rows, kept.float()) for kept in (foreground, background))
    return positive, negative


@DISTILL_LOSS_REGISTRY.register()
class DeFeat(DistillLoss):
    """`loss_kd_defeat_object`, `_background`, `_positive` and `_negative`.

    The first two are (1 / 2 N) sum M |f(S) - T|^2 with M inside and outside the annotated boxes, N
    the number of their cells times channels, mean over levels, f a 3x3 convolution a level. As in
    the authors' code a box is an object on one level, by its size (`box_levels`), and background on
    the others. The last two are T^2 KL of the class predictions of foreground and of background
    proposals (RetinaNet: anchors, K binary divergences), mean over their rows.

    Defaults: those of the authors' VOC configuration, whose normalisation is ours: 3 and 12 on the
    maps, and the head's two terms off (it names 2 and 2 with T = 1 for them).

    Note: a box covers all cells that it touches. That code leaves out the last one in each
    direction, a tenth of them (and a box within one column or row of cells has a single cell). Its
    adapters start near 0, and its head's terms are on proposals sampled for the teacher.

    With reliability ("+ prototypes" in Table 4) a cell inside boxes weighs as much as its most
    reliable instance.
    """

    node = "DEFEAT"

    @configurable
    def __init__(
        self,
        *,
        object_weight: float = 3.0,
        background_weight: float = 12.0,
        positive_weight: float = 0.0,
        negative_weight: float = 0.0,
        temperature: float = 1.0,
        use_reliability: bool = False,
    ):
        """
        Args:
            object_weight: weight of the maps inside boxes.
            background_weight: weight of the maps outside boxes.
            positive_weight: weight of the head's predictions on the foreground.
            negative_weight: weight of the head's predictions on the background.
            temperature: T of the head's two terms.
            use_reliability: multiply each box's cells by its reliability.
        """
        weights = {
            "loss_kd_defeat_object": object_weight,
            "loss_kd_defeat_background": background_weight,
            "loss_kd_defeat_positive": positive_weight,
            "loss_kd_defeat_negative": negative_weight,
        }
        super().__init__(weights, use_reliability=use_reliability)
        require("DEFEAT.TEMPERATURE", temperature, temperature > 0, "above 0")
        self.temperature = temperature
        self.imitates_maps = bool(object_weight or background_weight)
        if positive_weight or negative_weight:
            self.reads = frozenset({"predictions"})

    def attach(self, levels: Sequence[LevelPair]) -> None:
        if self.imitates_maps:
            self.adapters = build_adapters(levels, kernel_size=3, relu=False)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = self._map_terms(context) if self.imitates_maps else {}
        if self.reads:
            terms["loss_kd_defeat_positive"], terms["loss_kd_defeat_negative"] = (
                decoupled_divergence(context.predictions, self.temperature)
            )
        return {name: terms[name] for name in self.weights}

    def _map_terms(self, context: DistillContext) -> Dict[str, Tensor]:
        inside, outside = [], []
        on_level = box_levels(context.ground_truth.boxes, len(context.levels))
        masks = instance_masks(self, context.on_ground_truth, on_level=on_level)
        for pair, mask in zip(context.levels, masks):
            student = self.adapters[pair.student](context.student_maps[pair.student])
            errors = cell_errors(student, context.teacher_maps[pair.student])
            inside.append(weighted_mean(errors, mask))
            outside.append(weighted_mean(errors, (mask == 0).float()))
        return {
            "loss_kd_defeat_object": torch.stack(inside).mean(),
            "loss_kd_defeat_background": torch.stack(outside).mean(),
        }
