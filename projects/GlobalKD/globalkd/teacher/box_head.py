"""What a box head says of given boxes, whichever kind of Detectron2 it is.

On a GPU, where it can be, without making the host wait for the device.

Shapes: R boxes of N images, K classes.
"""

from typing import Dict, List, Tuple

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn


def box_head_logits(
    heads: nn.Module,
    features: Dict[str, Tensor],
    boxes: Tensor,
    image_index: Tensor,
    image_sizes: List[Tuple[int, int]],
) -> Tensor:
    """Class logits of boxes; see `Teacher.box_logits`.

    Args:
        heads: a detector's `roi_heads`.
        features: level -> (N, D, H, W), what the heads read.
        boxes: (R, 4) XYXY_ABS.
        image_index: (R,) int64, ascending.
        image_sizes: (height, width) of each image.

    Returns:
        (R, K + 1).
    """
    if (
        boxes.is_cuda
        and type(heads) is StandardROIHeads
        and pools_without_waiting(heads.box_pooler)
    ):
        maps = [features[f] for f in heads.box_in_features]
        rois = torch.cat([image_index[:, None].to(boxes), boxes], dim=1)
        return heads.box_predictor(heads.box_head(pool(heads.box_pooler, maps, rois)))[0]
    images = torch.arange(len(image_sizes), device=image_index.device)
    counts = (image_index == images[:, None]).sum(dim=1).tolist()  # bincount would wait twice
    proposals = [
        Instances(size, proposal_boxes=Boxes(own))
        for size, own in zip(image_sizes, boxes.split(counts))
    ]
    if isinstance(heads, CascadeROIHeads):
        return _cascade_logits(heads, features, proposals)
    boxes = [p.proposal_boxes for p in proposals]
    if isinstance(heads, Res5ROIHeads):
        pooled = heads._shared_roi_transform([features[f] for f in heads.in_features], boxes)
        return heads.box_predictor(pooled.mean(dim=[2, 3]))[0]
    pooled = heads.box_pooler([features[f] for f in heads.box_in_features], boxes)
    return heads.box_predictor(heads.box_head(pooled))[0]


def pools_without_waiting(pooler: ROIPooler) -> bool:
    """Whether `pool` knows its kind of pooling."""
    return type(pooler) is ROIPooler and all(isinstance(x, ROIAlign) for x in pooler.level_poolers)


def pool(pooler: ROIPooler, maps: List[Tensor], rois: Tensor) -> Tensor:
    """What a pooler gives for boxes, each from the level that it belongs to.

    Detectron2's own asks which boxes belong to a level, level by level. Here each level pools all
    of them, empty in the place of those that are not its own, which costs it nothing.

    Args:
        pooler: of RoIAligns; see `pools_without_waiting`.
        maps: of its levels, (N, D, H, W) each.
        rois: (R, 5) rows of image index and XYXY_ABS box.

    Returns:
        (R, D, B, B').
    """
    level = assign_boxes_to_levels(
        [Boxes(rois[:, 1:])],
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )
    pooled = None
    for index, (x, align) in enumerate(zip(maps, pooler.level_poolers)):
        own = level == index
        part = align(x, rois * own[:, None])
        pooled = part if pooled is None else torch.where(own[:, None, None, None], part, pooled)
    return pooled


def _cascade_logits(heads: CascadeROIHeads, features: Dict[str, Tensor], proposals):
    maps = [features[f] for f in heads.box_in_features]
    sizes = [p.image_size for p in proposals]
    probabilities = []
    for stage in range(heads.num_cascade_stages):
        predictions = heads._run_stage(maps, proposals, stage)
        probabilities.append(predictions[0].float().softmax(dim=-1))
        boxes = heads.box_predictor[stage].predict_boxes(predictions, proposals)
        proposals = heads._create_proposals_from_boxes(boxes, sizes)
    return torch.stack(probabilities).mean(dim=0).clamp_min(1e-12).log()
