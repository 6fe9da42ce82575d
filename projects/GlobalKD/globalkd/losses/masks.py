"""Boxes painted on feature maps: which cells an instance covers, and what they count.

Shapes: N images, R boxes, H x W cells of a level.
"""

from typing import List, Optional, Sequence

import torch
from torch import Tensor

from .base import DistillContext, DistillLoss
from .outputs import InstanceRows

CELLS_PER_CHUNK = 1 << 25


def box_masks(
    rows: InstanceRows,
    weights: Sequence[Tensor],
    *,
    sizes: Sequence[Sequence[int]],
    strides: Sequence[int],
    share: bool = False,
) -> List[Tensor]:
    """Paint boxes on the cells that they touch; in several boxes, the largest value wins.

    Args:
        rows: R boxes in input pixels.
        weights: per level, (R,) non-negative value of each box.
        sizes: per level, (N, H, W) of the result.
        strides: per level, input pixels per cell.
        share: a box's weight is shared by its cells; otherwise each of them gets all of it.

    Returns:
        Per level, (N, H, W) float, without gradient; 0 outside every box.
    """
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


def instance_masks(
    loss: DistillLoss,
    context: DistillContext,
    *,
    share: bool = False,
    on_level: Optional[Tensor] = None,
) -> List[Tensor]:
    """Per level (N, H, W), what a cell of the context's instances counts; 0 outside all of them.

    Args:
        loss: whether it weighs instances by their reliability.
        share: see `box_masks`.
        on_level: (R,) the one level that an instance is painted on, by its place in
            `context.levels`; None: on all.
    """
    maps = [context.teacher_maps[pair.student] for pair in context.levels]
    weights = [loss.instance_weight(context, pair.student).float() for pair in context.levels]
    # 0 would turn an instance's cells into background.
    weights = [weight.clamp_min(1e-6) for weight in weights]
    if on_level is not None:
        weights = [weight * (on_level == i) for i, weight in enumerate(weights)]
    return box_masks(
        context.instances,
        weights,
        sizes=[(len(x), *x.shape[-2:]) for x in maps],
        strides=[pair.stride for pair in context.levels],
        share=share,
    )
