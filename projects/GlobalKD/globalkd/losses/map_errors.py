"""How far two feature maps lie apart: errors of cells, and their weighted mean (Eq. 7).

Shapes: N images, D channels, H x W cells of a level; or M single cells.
"""

import torch.nn.functional as F
from torch import Tensor


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
