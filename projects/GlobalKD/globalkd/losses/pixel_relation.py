"""Pixel-wise relation of DRKD: both detectors' maps after global reasoning over their cells.

Here: the graph-based reasoning unit and `loss_kd_pixel_relation`, the first term of "Dual Relation
Knowledge Distillation for Object Detection" (Ni et al., IJCAI 2023); the unit is after
"Graph-Based Global Reasoning Networks" (Chen et al., CVPR 2019). The relations between boxes are
in `instance_relation`.

Shapes: N images, H x W cells, D channels, M nodes, S channels of a node's state.
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..requirement import require
from .adapters import build_adapters
from .anchored_sum import AnchoredSum
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def reason_globally(
    cells: Tensor,
    assignment: Tensor,
    *,
    reduce: Tensor,
    adjacency: Tensor,
    update: Tensor,
    expand: Tensor,
) -> Tensor:
    """Project cells onto nodes, reason there, project back: V = X B', Z = ((I - A) V) W, Z B.

    The two 1x1 convolutions around it and W are linear and follow each other: they are multiplied
    into one (D, D) matrix that is applied to the M nodes. The result is the same; states of S
    channels never exist, and the product costs the same for any number of images and nodes.

    Note: V is divided by the number of cells. As a sum, nodes would grow with the image and the
    output with them; as a mean, an image and the same image tiled have the same nodes.

    Args:
        cells: (N, H W, D) features.
        assignment: (N, H W, M), B.
        reduce: (S, D), the convolution that makes X.
        adjacency: (M, M), A.
        update: (S, S), W.
        expand: (D, S), the convolution back.

    Returns:
        (N, H W, D) what is to be added to the cells.
    """
    nodes = assignment.mT @ cells / cells.shape[1]
    nodes = nodes - adjacency @ nodes
    return assignment @ (nodes @ (expand @ update @ reduce).T)


class GlobalReasoning(nn.Module):
    """A reasoning unit on one level's map, with a residual connection.

    Note: an `AnchoredSum` stands where the unit's authors have BatchNorm and an addition. BatchNorm
    would take its statistics from the one or two images of a GPU, and keep buffers that DDP, as
    Detectron2 builds it, does not synchronise. And an addition alone does not hold the teacher's
    unit: trained by this loss, it learns to cancel what the student cannot follow.
    """

    def __init__(self, channels: int, *, num_nodes: int, state_channels: int):
        """
        Args:
            channels: D.
            num_nodes: M.
            state_channels: S.
        """
        super().__init__()
        self.assign = nn.Conv2d(channels, num_nodes, 1)
        self.reduce = nn.Linear(channels, state_channels, bias=False)
        self.adjacency = nn.Linear(num_nodes, num_nodes, bias=False)
        self.update = nn.Linear(state_channels, state_channels, bias=False)
        self.expand = nn.Linear(state_channels, channels, bias=False)
        self.add = AnchoredSum(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """(N, D, H, W) -> (N, D, H, W)."""
        cells = maps.flatten(2).mT
        branch = reason_globally(
            cells,
            self.assign(maps).flatten(2).mT,
            reduce=self.reduce.weight,
            adjacency=self.adjacency.weight,
            update=self.update.weight,
            expand=self.expand.weight,
        )
        return self.add(cells, branch).mT.reshape(maps.shape)


@DISTILL_LOSS_REGISTRY.register()
class PixelRelation(DistillLoss):
    """`loss_kd_pixel_relation`: squared error between both detectors' maps after reasoning.

    Mean over cells and channels, then over levels. Teacher and student have a unit of their own on
    each level; the student's output passes a 1x1 adapter to the teacher's width.

    Note: both units are trained by this loss, as in the paper: the teacher's maps carry no
    gradient, the output of its unit does. `AnchoredSum` sees to it that the target keeps at least
    half of the maps' spread (standard deviation), so that it cannot shrink to what is easy.
    """

    node = "PIXEL_RELATION"

    @configurable
    def __init__(
        self,
        *,
        weight: float = 4.0,
        num_nodes: Sequence[int] = (64, 64, 256),
        state_channels: Sequence[int] = (128, 128, 512),
    ):
        """
        Args:
            weight: weight of the term.
            num_nodes: M of each level, finest first; the last one holds for all further levels.
            state_channels: S, likewise.
        """
        super().__init__({"loss_kd_pixel_relation": weight})
        for key, values in {"NUM_NODES": num_nodes, "STATE_CHANNELS": state_channels}.items():
            right = len(values) > 0 and min(values) >= 1
            needed = (
                "a list of one positive number a level, or of fewer: the last one holds for all "
                "further levels"
            )
            require(f"PIXEL_RELATION.{key}", values, right, needed)
        self.num_nodes = num_nodes
        self.state_channels = state_channels

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.teacher_units, self.student_units = nn.ModuleDict(), nn.ModuleDict()
        for i, pair in enumerate(levels):
            sizes = {
                "num_nodes": self.num_nodes[min(i, len(self.num_nodes) - 1)],
                "state_channels": self.state_channels[min(i, len(self.state_channels) - 1)],
            }
            self.teacher_units[pair.student] = GlobalReasoning(pair.teacher_channels, **sizes)
            self.student_units[pair.student] = GlobalReasoning(pair.student_channels, **sizes)
        self.adapters = build_adapters(levels, kernel_size=1, relu=False)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = []
        for name in self.adapters:
            teacher, student = context.teacher_maps[name], context.student_maps[name]
            with torch.autocast(student.device.type, enabled=False):  # sums over all cells
                target = self.teacher_units[name](teacher.float())
                output = self.adapters[name](self.student_units[name](student.float()))
                terms.append((output - target).square().mean())
        return {"loss_kd_pixel_relation": torch.stack(terms).mean()}
