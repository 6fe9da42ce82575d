"""What the decoder of `icd` is asked: descriptions of real and of invented objects.

Shapes: N images, Q queries of an image (real objects first, then invented ones, then padding),
R annotated objects of the batch, S cells over all levels, E channels of an embedding.
"""

from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import DistillContext


@dataclass
class Queries:
    """Objects to ask for.

    Attributes:
        boxes: (N, Q, 4) XYXY as a share of the image's width and height.
        classes: (N, Q) int64.
        centres: (N, Q, 2) what the decoder is told of the place.
        scales: (N, Q, 2) int64 in [0, 5), the octaves of width and height from 32 pixels on.
        real: (N, Q) bool, annotated objects.
        used: (N, Q) bool, real or invented; not padding.
    """

    boxes: Tensor
    classes: Tensor
    centres: Tensor
    scales: Tensor
    real: Tensor
    used: Tensor

    def scatter(self, values: Tensor) -> Tensor:
        """Values of the batch's R objects at their queries, 0 elsewhere: (R,) -> (N, Q)."""
        return values.new_zeros(self.real.shape).masked_scatter(self.real, values)

    def task_losses(self, predictions: Tensor) -> Tuple[Tensor, Tensor]:
        """The decoder's tasks: is the object there, and how far are its sides.

        Args:
            predictions: (N, Q, 5) logits.

        Returns:
            Binary cross-entropy, mean over queries; L1 of the distances from the described centre
            to the four sides, in units of the box's size, summed, mean over real objects.
        """
        identify = F.binary_cross_entropy_with_logits(
            predictions[..., 0], self.real.float(), reduction="none"
        )
        to_sides = torch.cat(
            [self.centres - self.boxes[..., :2], self.boxes[..., 2:] - self.centres], dim=-1
        )
        size = (self.boxes[..., 2:] - self.boxes[..., :2]).clamp_min(1e-4).repeat(1, 1, 2)
        locate = ((predictions[..., 1:].sigmoid() - to_sides).abs() / size).sum(dim=-1)
        return (
            (identify * self.used).sum() / self.used.sum().clamp_min(1),
            (locate * self.real).sum() / self.real.sum().clamp_min(1),
        )


@torch.no_grad()
def make_queries(
    context: DistillContext,
    *,
    num_classes: int,
    negative_ratio: float,
    max_queries: int,
    blur: float,
) -> Queries:
    """The annotated objects of each image, with invented ones.

    Args:
        negative_ratio: invented objects for each real one; an image without objects gets one.
        max_queries: invented objects fill an image up to this number at most.
        blur: largest shift of a centre, in units of the box's size.
    """
    objects = context.ground_truth
    device = objects.boxes.device
    reals = [len(x["instances"]) for x in context.batched_inputs]
    totals = [max(n, min(int(n * (1 + negative_ratio)), max_queries), 1) for n in reals]
    slots = torch.arange(max(totals), device=device)
    reals, totals, sizes = (
        torch.tensor(x).to(device, non_blocking=True)
        for x in (reals, totals, [(float(w), float(h)) for h, w in context.image_sizes])
    )
    real, used = slots < reals[:, None], slots < totals[:, None]
    shares = objects.boxes.float() / sizes[objects.image_index].repeat(1, 2)
    boxes = _random_boxes(real.shape, device).masked_scatter(real[..., None], shares)
    classes = torch.randint(num_classes, real.shape, device=device)
    extent = boxes[..., 2:] - boxes[..., :2]
    shift = (torch.rand_like(extent) * 2 - 1) * blur * extent
    octaves = (extent * sizes[:, None]).clamp_min(1).log2().floor() - 5
    return Queries(
        boxes=boxes,
        classes=classes.masked_scatter(real, objects.classes),
        centres=(boxes[..., :2] + boxes[..., 2:]) / 2 + shift,
        scales=octaves.clamp(0, 4).long(),
        real=real,
        used=used,
    )


def _random_boxes(shape: torch.Size, device: torch.device) -> Tensor:
    """Centres uniform in the image, sides normal around a fifth of it: (*shape, 4)."""
    centre = torch.rand(*shape, 2, device=device) * 0.94 + 0.03
    side = (torch.randn(*shape, 2, device=device) * 0.2 + 0.2).clamp(0.002, 0.6)
    return torch.cat([centre - side / 2, centre + side / 2], dim=-1).clamp(0, 1)


def describe(queries: Queries, *, num_classes: int, dim: int) -> Tensor:
    """(N, Q, num_classes + dim + 10): class, place and scale of each query."""
    return torch.cat(
        [
            F.one_hot(queries.classes, num_classes).float(),
            sine_embedding(queries.centres, dim),
            F.one_hot(queries.scales, 5).float().flatten(2),
        ],
        dim=-1,
    )


def sine_embedding(points: Tensor, dim: int) -> Tensor:
    """Sines and cosines of x and y at dim / 4 wavelengths each: (..., 2) -> (..., dim).

    Args:
        points: coordinates as a share of the image; wavelengths rise from 1 to 10000 images.
    """
    steps = torch.arange(dim // 4, device=points.device) / max(dim // 4, 1)
    phase = points[..., None] * 2 * torch.pi / 10000**steps
    return torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(-2)


@torch.no_grad()
def cell_centres(context: DistillContext) -> Tuple[Tensor, Tensor]:
    """Where the cells of all levels lie in their images.

    Returns:
        (N, S, 2) x and y as a share of the image, and (N, S) bool: cells in the padding.
    """
    device = context.ground_truth.boxes.device
    sizes = torch.tensor([(w, h) for h, w in context.image_sizes])[:, None]
    sizes = sizes.to(device, non_blocking=True)
    corners, halves = [], []
    for pair in context.levels:
        height, width = context.teacher_maps[pair.student].shape[-2:]
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        y, x = torch.meshgrid(y, x, indexing="ij")
        corners.append(torch.stack([x, y], dim=-1).flatten(0, 1) * pair.stride)
        halves.append(torch.full_like(corners[-1], pair.stride) / 2)
    corner, half = torch.cat(corners), torch.cat(halves)
    return (corner + half) / sizes, (corner >= sizes).any(dim=-1)
