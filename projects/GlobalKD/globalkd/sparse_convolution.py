"""Convolutions evaluated at a few cells of a map, at the cost of those cells.

For what is read at few places only: adapters inside boxes, a teacher's class scores of positive
anchors. On a GPU the choice of cells would make the host wait for the device.

Shapes: N images, H x W cells, D channels, M chosen cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve_cells(conv: nn.Conv2d, features: Tensor, cells: Tensor) -> Tensor:
    """What a convolution gives at a few cells.

    Args:
        conv: stride 1, odd square kernel, padded by half of it.
        features: (N, D, H, W).
        cells: (M, 3) int64 rows of image, y and x.

    Returns:
        (M, D'), equal to `conv(features)` at the cells up to rounding, with the same gradients. It
        keeps M times k x k x D numbers for the backward pass.
    """
    size, (pad, _) = conv.kernel_size[0], conv.padding
    padded = features.permute(0, 2, 3, 1)
    if pad:
        padded = F.pad(padded, (0, 0, pad, pad, pad, pad))
    _, height, width, channels = padded.shape
    image, y, x = cells.unbind(dim=1)
    first = (image * height + y) * width + x  # the kernel's top-left cell, in padded rows
    step = torch.arange(size, device=cells.device)
    rows = first[:, None] + (step[:, None] * width + step).flatten()
    # `embedding` is indexing whose backward pass runs in parallel.
    patches = F.embedding(rows, padded.reshape(-1, channels))
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return F.linear(patches.flatten(1), weight, conv.bias)
