"""Local feature knowledge, Eq. (7) of GlobalKD: the teacher's maps, weighted inside boxes."""

from typing import Dict, List, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..requirement import require
from ..sparse_convolution import convolve_cells
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss, InstanceRows

CELLS_PER_CHUNK = 1 << 25


def box_mask(
    rows: InstanceRows,
    weight: Tensor,
    *,
    size: Sequence[int],
    stride: int,
    share: bool = False,
) -> Tensor:
    """Paint boxes on the cells that they touch; in several boxes, the largest value wins.

    Args:
        rows: R boxes in input pixels.
        weight: (R,) non-negative value of each box.
        size: (N, H, W) of the result.
        stride: input pixels per cell.
        share: a box's weight is shared by its cells; otherwise each of them gets all of it.

    Returns:
        (N, H, W) float, without gradient; 0 outside every box.
    """
    return box_masks(rows, [weight], sizes=[size], strides=[stride], share=share)[0]


def box_masks(
    rows: InstanceRows,
    weights: Sequence[Tensor],
    *,
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int],
    share: bool = False,
) -> List[Tensor]:
    """`box_mask` on several levels, each with its weights, size and stride."""
    in_y, in_x = (_cells_inside(rows.boxes, sizes, strides, axis) for axis in (1, 0))
    masks = []
    for size, weight, by_y, by_x in zip(sizes, weights, in_y, in_x):
        if share:
            weight = weight / (by_x.sum(dim=1) * by_y.sum(dim=1)).clamp_min(1)
        along_y = by_y * weight[:, None]
        mask = weight.new_zeros(tuple(size))
        chunk = max(1, CELLS_PER_CHUNK // (size[1] * size[2]))
        for parts in zip(along_y.split(chunk), by_x.split(chunk), rows.image_index.split(chunk)):
            y, x, image = parts
            painted = y[:, :, None] * x[:, None, :]
            mask.scatter_reduce_(0, image[:, None, None].expand_as(painted), painted, "amax")
        masks.append(mask)
    return masks


def _cells_inside(
    boxes: Tensor, sizes: Sequence[Sequence[int]], strides: Sequence[int], axis: int
) -> Sequence[Tensor]:
    """1 where a box touches a cell: along x (axis 0) (R, W) of each level, along y (1) (R, H)."""
    counts = [size[2 - axis] for size in sizes]
    cells = [torch.arange(n) * stride for n, stride in zip(counts, strides)]
    edges = torch.stack([torch.cat(cells), torch.cat([x + s for x, s in zip(cells, strides)])])
    start, stop = edges.to(boxes, non_blocking=True)
    inside = (start < boxes[:, axis + 2, None]) & (stop > boxes[:, axis, None])
    return inside.to(boxes.dtype).split(counts, dim=1)


def instance_masks(loss: DistillLoss, context: DistillContext, *, share: bool) -> List[Tensor]:
    """Per level (N, H, W), what a cell of the context's instances counts; 0 outside all of them.

    Args:
        loss: whether it weighs instances by their reliability.
        share: see `box_mask`.
    """
    maps = [context.teacher_maps[pair.student] for pair in context.levels]
    weights = [loss.instance_weight(context, pair.student).float() for pair in context.levels]
    return box_masks(
        context.instances,
        # 0 would turn an instance's cells into background.
        [weight.clamp_min(1e-6) for weight in weights],
        sizes=[(len(x), *x.shape[-2:]) for x in maps],
        strides=[pair.stride for pair in context.levels],
        share=share,
    )


def cell_errors(student: Tensor, teacher: Tensor) -> Tensor:
    """Half the squared difference, mean over channels: (N, D, H, W) maps -> (N, H, W).

    Also (M, D) features of single cells -> (M,).
    """
    # Summed, then divided: the gradient of a mean over channels would be as large as the map.
    squared = F.mse_loss(student.float(), teacher.float(), reduction="none").sum(dim=1)
    return 0.5 * (squared / student.shape[1])


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over all entries; weights of equal shape, non-negative. 0 where all are 0."""
    return (values * weight).sum() / weight.sum().clamp_min(1e-6)


def weighted_feature_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """`weighted_mean` of `cell_errors`.

    Args:
        student, teacher: (N, D, H, W), or (M, D) of single cells.
        weight: (N, H, W) non-negative, or (M,).

    Returns:
        Scalar; 0 where all weights are 0.
    """
    return weighted_mean(cell_errors(student, teacher), weight)


def build_adapters(levels: Sequence[LevelPair], *, kernel_size: int, relu: bool) -> nn.ModuleDict:
    """One convolution a level from the student's to the teacher's width."""

    def adapter(pair: LevelPair) -> nn.Module:
        conv = nn.Conv2d(
            pair.student_channels, pair.teacher_channels, kernel_size, padding=kernel_size // 2
        )
        return nn.Sequential(conv, nn.ReLU()) if relu else conv

    return nn.ModuleDict({pair.student: adapter(pair) for pair in levels})


def build_alignment(levels: Sequence[LevelPair]) -> nn.ModuleDict:
    """`align_width` of each level."""
    return nn.ModuleDict(
        {p.student: align_width(p.student_channels, p.teacher_channels) for p in levels}
    )


def align_width(student_channels: int, teacher_channels: int) -> nn.Module:
    """A 1x1 convolution where the widths differ; where they are equal, nothing."""
    if student_channels == teacher_channels:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, 1)


@DISTILL_LOSS_REGISTRY.register()
class FeatureKnowledge(DistillLoss):
    """`loss_kd_feature`, and `loss_kd_background` outside the boxes; mean over levels.

    The paper's text has no background term; the authors' code weights it with 4.
    """

    @configurable
    def __init__(
        self,
        *,
        weight: float = 1.0,
        background_weight: float = 0.0,
        adapter_kernel: int = 1,
        adapter_relu: bool = False,
        equal_boxes: bool = False,
        use_reliability: bool = True,
    ):
        """
        Args:
            weight: weight of the term inside boxes.
            background_weight: weight of the term outside boxes.
            adapter_kernel: side of the adapter's convolution, odd.
            adapter_relu: a ReLU after the adapter's convolution.
            equal_boxes: each instance has the same weight in all, shared by its cells; else each of
                its cells has, and large instances count for more.
            use_reliability: a cell's weight is the reliability of its instance; else 1.
        """
        weights = {"loss_kd_feature": weight, "loss_kd_background": background_weight}
        super().__init__(weights, use_reliability=use_reliability)
        odd = adapter_kernel > 0 and adapter_kernel % 2 == 1
        require("FEATURE.ADAPTER_KERNEL", adapter_kernel, odd, "odd")
        self.adapter_kernel = adapter_kernel
        self.adapter_relu = adapter_relu
        self.equal_boxes = equal_boxes

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.GLOBALKD.FEATURE
        return {
            "weight": node.WEIGHT,
            "background_weight": node.BACKGROUND_WEIGHT,
            "adapter_kernel": node.ADAPTER_KERNEL,
            "adapter_relu": node.ADAPTER_RELU,
            "equal_boxes": node.EQUAL_BOXES,
            "use_reliability": node.USE_RELIABILITY,
        }

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_adapters(
            levels, kernel_size=self.adapter_kernel, relu=self.adapter_relu
        )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        names = [pair.student for pair in context.levels]
        masks = instance_masks(self, context, share=self.equal_boxes)
        errors = self._dense if self._whole_maps(context) else self._inside
        terms = [errors(context, name, mask) for name, mask in zip(names, masks)]
        return {name: torch.stack([x[name] for x in terms]).mean() for name in self.weights}

    def _whole_maps(self, context: DistillContext) -> bool:
        """Whether the adapters run on every cell.

        They must for the background. On a GPU, too: there the choice of cells would make the host
        wait for the device on each level.
        """
        return "loss_kd_background" in self.weights or context.instances.boxes.is_cuda

    def _dense(self, context: DistillContext, name: str, mask: Tensor) -> Dict[str, Tensor]:
        student = self.adapters[name](context.student_maps[name])
        errors = cell_errors(student, context.teacher_maps[name])
        return {
            k: weighted_mean(errors, mask if k == "loss_kd_feature" else (mask == 0).float())
            for k in self.weights
        }

    def _inside(self, context: DistillContext, name: str, mask: Tensor) -> Dict[str, Tensor]:
        """The term inside boxes from their cells alone."""
        cells = mask.nonzero()
        image, y, x = cells.unbind(dim=1)
        adapter = self.adapters[name]
        conv = adapter[0] if self.adapter_relu else adapter
        student = convolve_cells(conv, context.student_maps[name], cells)
        student = student.relu() if self.adapter_relu else student
        teacher = context.teacher_maps[name].permute(0, 2, 3, 1)[image, y, x]
        return {"loss_kd_feature": weighted_feature_loss(student, teacher, mask[image, y, x])}
