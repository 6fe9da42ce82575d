"""Fine-grained imitation: the maps where anchors fit an object well.

"Distilling Object Detectors with Fine-grained Feature Imitation", Wang et al., CVPR 2019 (FGFI).

Shapes: N images, H x W cells of a level, A anchors of a cell, R boxes.
"""

from typing import Dict, List, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor
from torchvision.ops import box_iou

from ..features import LevelPair
from ..requirement import require
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .map_errors import weighted_feature_loss
from .outputs import InstanceRows

PAIRS_PER_CHUNK = 1 << 25


def near_object_masks(
    rows: InstanceRows,
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    *,
    num_images: int,
    threshold: float,
) -> List[Tensor]:
    """Cells with an anchor whose IoU with a box is above a share of the box's best IoU.

    Args:
        rows: R boxes in input pixels.
        weights: per level, (R,) non-negative value of each box; where masks overlap, the largest.
        anchors: per level, (H, W, A, 4) XYXY_ABS.
        num_images: N.
        threshold: psi, in (0, 1).

    Returns:
        Per level, (N, H, W) float, without gradient.
    """
    masks = [w.new_zeros((num_images, *a.shape[:2])) for w, a in zip(weights, anchors)]
    num_pairs = sum(a[..., 0].numel() for a in anchors)
    for part in torch.arange(len(rows), device=rows.boxes.device).split(
        max(1, PAIRS_PER_CHUNK // num_pairs)
    ):
        fits = [_best_iou(rows.boxes[part], a) for a in anchors]
        best = torch.stack([f.amax(dim=(1, 2)) for f in fits]).amax(dim=0)
        for mask, fit, weight in zip(masks, fits, weights):
            near = (fit > threshold * best[:, None, None]) * weight[part, None, None]
            image = rows.image_index[part][:, None, None].expand_as(near)
            mask.scatter_reduce_(0, image, near, "amax")
    return masks


def _best_iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(R, H, W): the largest IoU of each box with the anchors of each cell."""
    return box_iou(boxes, anchors.flatten(0, 2)).unflatten(1, anchors.shape[:3]).amax(dim=-1)


@DISTILL_LOSS_REGISTRY.register()
class FGFI(DistillLoss):
    """`loss_kd_fgfi`: (1 / 2 N_p) sum I |f(S) - T|^2 over the cells I near annotated objects.

    f is a 3x3 convolution and a ReLU on each level, as in the authors' code, whose map is not
    negative; mean over levels. (Maps of an FPN are signed, but the ReLU does no clear harm:
    docs/tuning.md.)

    Defaults: psi = 0.5 as in the paper. Its weight 0.01 is of a sum over channels; ours is of a
    mean, and 0.01 x 256 channels = 2.56. The authors' code leaves the term out of the first 400
    steps; `configs/compare/fgfi.yaml` lets it rise over them.

    Note: the paper has one map. Here a box's best IoU is that over all levels, so that a box
    selects cells on the levels whose anchors fit it. The anchors are the student's, of its RPN if
    it has two stages. Adapters start as PyTorch starts a convolution, the authors' near 0.
    """

    node = "FGFI"
    reads = frozenset({"student_dense"})

    @configurable
    def __init__(
        self, *, weight: float = 2.56, threshold: float = 0.5, use_reliability: bool = False
    ):
        """
        Args:
            weight: weight of the term.
            threshold: psi in (0, 1), the share of a box's best IoU.
            use_reliability: multiply each box's cells by its reliability.
        """
        super().__init__({"loss_kd_fgfi": weight}, use_reliability=use_reliability)
        require("FGFI.THRESHOLD", threshold, 0 < threshold < 1, "in (0, 1)")
        self.threshold = threshold

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_adapters(levels, kernel_size=3, relu=True)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        terms = []
        for pair, mask in zip(context.levels, self._masks(context)):
            student = self.adapters[pair.student](context.student_maps[pair.student])
            terms.append(weighted_feature_loss(student, context.teacher_maps[pair.student], mask))
        return {"loss_kd_fgfi": torch.stack(terms).mean()}

    def _masks(self, context: DistillContext) -> List[Tensor]:
        names = [pair.student for pair in context.levels]
        sizes = [context.teacher_maps[name].shape[-2:] for name in names]
        weights = [self.instance_weight(context.on_ground_truth, name).float() for name in names]
        return near_object_masks(
            context.ground_truth,
            weights,
            [context.student_dense.anchors[name][:h, :w] for name, (h, w) in zip(names, sizes)],
            num_images=len(context.image_sizes),
            threshold=self.threshold,
        )
