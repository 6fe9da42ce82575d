"""A residual connection whose branch cannot outweigh what it is added to; both relations have it.

Shapes: N images, R items (cells or boxes) of an image, D channels.
"""

from typing import Optional

import torch
from torch import Tensor, nn

#: The learned branch has at most this share of the spread of what it is added to.
MAX_SHARE = 0.5


def anchored_sum(
    values: Tensor, branch: Tensor, share: Tensor, mask: Optional[Tensor] = None
) -> Tensor:
    """Add a branch to values, scaled to `share` of their spread over an image's items.

    With |share| < 1 the values show through whatever the branch is: the standard deviation over
    the items (all channels together) is at least 1 - max |share| of that of the values.

    Args:
        values: (N, R, D) items (cells or boxes) of each image, 0 in padding.
        branch: (N, R, D), likewise.
        share: (D,) or scalar.
        mask: (N, R) bool, true where an item is; None where there is no padding.

    Returns:
        (N, R, D). An image with one item has no spread: its values come back as they are.
    """
    count = values.shape[1] if mask is None else mask.sum(dim=1).clamp_min(1)[:, None]
    # Not the mean of squares less the square of the mean: where items lie close together, far from
    # zero, rounding would be all that is left.
    centred = values - (values.sum(dim=1) / count)[:, None]
    if mask is not None:
        centred = centred * mask[:, :, None]
    spread = (centred.square().sum(dim=1) / count).mean(dim=1)
    power = (branch.square().sum(dim=1) / count).mean(dim=1)
    scale = ((spread + 1e-12) / (power + 1e-12)).sqrt()
    return values + share * scale[:, None, None] * branch


class AnchoredSum(nn.Module):
    """`anchored_sum` with a trained share per channel, 0 at first and never beyond `MAX_SHARE`."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(channels))

    def forward(self, values: Tensor, branch: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        return anchored_sum(values, branch, MAX_SHARE * self.gain.tanh(), mask)
