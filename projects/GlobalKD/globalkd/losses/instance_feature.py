"""Instance features of DRKD: the annotated boxes' RoI features, imitated bin by bin.

Here: the RoIAlign grids of annotated boxes, which the relations in `instance_relation` start from
too, and `loss_kd_instance_feature`, the third term (L_INS) of "Dual Relation Knowledge Distillation
for Object Detection" (Ni et al., IJCAI 2023).

Shapes: R boxes, D channels, G x G bins.
"""

from typing import Dict, Sequence, Tuple

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from ..requirement import require
from ..sparse_roi_align import roi_align
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss

#: Sampling points per side of a bin: what a box costs does not depend on its size.
SAMPLES_PER_BIN = 2


def ground_truth_grids(
    context: DistillContext, pair: LevelPair, resolution: int
) -> Tuple[Tensor, Tensor]:
    """RoIAlign of every annotated box on one level, computed once a step.

    Args:
        context: the step.
        pair: the level.
        resolution: bins per side, G.

    Returns:
        (R, D_s, G, G) of the student, with gradient, and (R, D_t, G, G) of the teacher; float32.
    """
    key = ("ground_truth_grids", pair.student, resolution)
    if key not in context.shared:
        context.shared[key] = tuple(
            roi_align(
                maps[pair.student].float(),
                context.ground_truth.rois.float(),
                output_size=resolution,
                spatial_scale=1.0 / pair.stride,
                sampling_ratio=SAMPLES_PER_BIN,
                aligned=True,
            )
            for maps in (context.student_maps, context.teacher_maps)
        )
    return context.shared[key]


def instance_feature_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference, mean over channels and bins: two (R, D, G, G) -> (R,)."""
    return (student - teacher).square().flatten(1).mean(dim=1)


@DISTILL_LOSS_REGISTRY.register()
class InstanceFeature(DistillLoss):
    """`loss_kd_instance_feature`: squared error between adapted student and teacher RoI features.

    Mean over the batch's annotated boxes, every box on every one of the finest levels; then over
    levels.
    """

    node = "INSTANCE_FEATURE"

    @configurable
    def __init__(
        self,
        *,
        weight: float = 0.5,
        num_levels: int = 2,
        resolution: int = 3,
        use_reliability: bool = False,
    ):
        """
        Args:
            weight: weight of the term.
            num_levels: how many levels, from the finest on; all where there are fewer.
            resolution: bins per side of RoIAlign.
            use_reliability: multiply each box by its reliability.
        """
        super().__init__({"loss_kd_instance_feature": weight}, use_reliability=use_reliability)
        require("INSTANCE_FEATURE.NUM_LEVELS", num_levels, num_levels >= 1, "1 or more")
        require("INSTANCE_FEATURE.RESOLUTION", resolution, resolution >= 1, "1 or more")
        self.num_levels = num_levels
        self.resolution = resolution

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_adapters(levels[: self.num_levels], kernel_size=1, relu=False)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = []
        for pair in context.levels[: self.num_levels]:
            weight = self.instance_weight(context.on_ground_truth, pair.student)
            with torch.autocast(weight.device.type, enabled=False):
                student, teacher = ground_truth_grids(context, pair, self.resolution)
                errors = instance_feature_error(self.adapters[pair.student](student), teacher)
                terms.append((errors * weight).sum() / max(len(weight), 1))
        return {"loss_kd_instance_feature": torch.stack(terms).mean()}
