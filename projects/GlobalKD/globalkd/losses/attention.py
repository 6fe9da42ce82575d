"""Where a map is large: attention of cells and of channels, and masks made of it (FBKD, FGD).

Shapes: N images, D channels, H x W cells of a level.
"""

from typing import Tuple

from torch import Tensor


def attention(maps: Tensor) -> Tuple[Tensor, Tensor]:
    """Spatial and channel attention, G^s and G^c: means of |A| over channels and over cells.

    Args:
        maps: (N, D, H, W).

    Returns:
        (N, 1, H, W) and (N, D, 1, 1).
    """
    magnitude = maps.abs()
    return magnitude.mean(dim=1, keepdim=True), magnitude.mean(dim=(2, 3), keepdim=True)


def softmax_mask(values: Tensor, temperature: float) -> Tensor:
    """Softmax of an image's values times their number, so that their mean is 1; float32.

    Args:
        values: (N, 1, H, W) or (N, D, 1, 1).
        temperature: T > 0.
    """
    flat = (values.float() / temperature).flatten(1)
    return (flat.softmax(dim=1) * flat.shape[1]).view_as(values)
