"""RoIAlign as sums of a map's cells, for maps without gradient on a CPU: the teacher's.

Torchvision's CPU kernel visits a map channel by channel on a single core. Here each bin is a bag of
cells with weights, and all channels of a cell are read at once. With gradient, and one bin a box,
the dense product of `features.InstancePooler` is faster.

Shapes: N images, D channels, H x W cells, R boxes, B bins along an axis, T cells under a bin along
an axis, at most.
"""

from typing import Tuple, Union

import torch
import torch.nn.functional as F
import torchvision.ops
from detectron2.layers import ROIAlign
from torch import Tensor, nn

#: Pairs of bin and cell that are in memory at a time.
PAIRS_PER_CHUNK = 2_000_000


class TeacherROIAlign(ROIAlign):
    """Detectron2's `ROIAlign`, computed by `roi_align` of this module."""

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        """Put it in the place of every `ROIAlign` below a module."""
        for parent in module.modules():
            for name, child in parent.named_children():
                if type(child) is ROIAlign:
                    settings = (child.spatial_scale, child.sampling_ratio, child.aligned)
                    setattr(parent, name, cls(child.output_size, *settings))

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        return roi_align(
            input,
            rois.to(input.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )


def roi_align(
    input: Tensor,
    boxes: Tensor,
    output_size: Union[int, Tuple[int, int]],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """`torchvision.ops.roi_align`, up to rounding; itself on a GPU and where gradient is needed.

    Args:
        input: (N, D, H, W); fastest in the channels_last layout.
        boxes: (R, 5) rows of image index and XYXY_ABS box.
        output_size, spatial_scale, sampling_ratio, aligned: as in torchvision.

    Returns:
        (R, D, B, B').
    """
    settings = (output_size, spatial_scale, sampling_ratio, aligned)
    if input.device.type != "cpu" or (input.requires_grad and torch.is_grad_enabled()):
        return torchvision.ops.roi_align(input, boxes, *settings)
    with torch.autocast("cpu", enabled=False):
        return _sums_of_cells(input.float(), boxes.float(), *settings).to(input.dtype)


def _sums_of_cells(
    features: Tensor, rois: Tensor, output_size, scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    channels, height, width = features.shape[1:]
    corners = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp_min(1.0)
    x, along_x = _axis(start[:, 0], extent[:, 0], size[1], width, sampling_ratio)
    y, along_y = _axis(start[:, 1], extent[:, 1], size[0], height, sampling_ratio)
    y = (rois[:, 0].long()[:, None, None] * height + y) * width  # a row's first cell in the table
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    pairs = size[0] * size[1] * x.shape[2] * y.shape[2]
    pooled = []
    for part in torch.arange(len(rois)).split(max(1, PAIRS_PER_CHUNK // pairs)):
        cells = y[part, :, None, :, None] + x[part, None, :, None, :]
        weights = along_y[part, :, None, :, None] * along_x[part, None, :, None, :]
        bags = [grid.flatten(3).flatten(0, 2) for grid in (cells, weights)]  # one row a bin
        pooled.append(_sum_bags(table, *bags))
    return torch.cat(pooled).view(len(rois), *size, channels).permute(0, 3, 1, 2)


def _axis(start: Tensor, extent: Tensor, bins: int, cells: int, sampling_ratio: int):
    """One axis of all boxes: which cells each bin reads, (R, B, T) int64, and their weights."""
    length = extent / bins
    count = torch.full_like(length, sampling_ratio) if sampling_ratio > 0 else length.ceil()
    samples = torch.arange(max(int(count.max()), 0) if len(count) else 0)
    count = count[:, None]
    offset = (samples + 0.5) * (length[:, None] / count.clamp_min(1))  # (R, S)
    edge = start[:, None] + length[:, None] * torch.arange(bins)  # (R, B)
    points = edge[:, :, None] + offset[:, None]  # (R, B, S)
    share = ((samples < count) / count.clamp_min(1))[:, None]
    share = share * ((points >= -1) & (points <= cells))
    points = points.clamp(0, cells - 1)
    first = points.amin(dim=2, keepdim=True).floor() if len(samples) else edge[..., None]
    span = (length - length / count[:, 0].clamp_min(1)).abs()  # from first to last sample
    reach = torch.arange(int(span.max().ceil()) + 2 if len(span) else 2)
    cell = first + reach  # (R, B, T)
    hat = (1 - (points[..., None] - cell[:, :, None]).abs()).clamp_min(0)
    return cell.long().clamp(0, cells - 1), (hat * share[..., None]).sum(dim=2)


def _sum_bags(table: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
    """(bins, D) weighted sums of rows of a table; what has no weight is not read."""
    used = weights != 0
    count = used.sum(dim=1)
    return F.embedding_bag(
        cells[used],
        table,
        count.cumsum(0) - count,
        mode="sum",
        per_sample_weights=weights[used],
    )
