"""What a box head says of given boxes, whichever kind of Detectron2 it is.

Shapes: R boxes of N images, K classes.
"""

from typing import Dict, List, Tuple

import torch
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from ..features import by_image, pool


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
    rois = torch.cat([image_index[:, None].to(boxes), boxes], dim=1)
    if isinstance(heads, CascadeROIHeads):
        return _cascade_logits(heads, features, rois, image_sizes)
    if isinstance(heads, Res5ROIHeads):
        maps = [features[f] for f in heads.in_features]
        pooled = heads._shared_roi_transform(maps, by_image(rois, len(image_sizes)))
        return heads.box_predictor(pooled.mean(dim=[2, 3]))[0]
    pooled = pool(heads.box_pooler, [features[f] for f in heads.box_in_features], rois)
    return heads.box_predictor(heads.box_head(pooled))[0]


def _cascade_logits(
    heads: CascadeROIHeads,
    features: Dict[str, Tensor],
    rois: Tensor,
    image_sizes: List[Tuple[int, int]],
) -> Tensor:
    maps = [features[f] for f in heads.box_in_features]
    boxes = by_image(rois, len(image_sizes))
    proposals = [Instances(s, proposal_boxes=b) for s, b in zip(image_sizes, boxes)]
    probabilities = []
    for stage in range(heads.num_cascade_stages):
        predictions = heads._run_stage(maps, proposals, stage)
        probabilities.append(predictions[0].float().softmax(dim=-1))
        boxes = heads.box_predictor[stage].predict_boxes(predictions, proposals)
        proposals = heads._create_proposals_from_boxes(boxes, image_sizes)
    return torch.stack(probabilities).mean(dim=0).clamp_min(1e-12).log()
