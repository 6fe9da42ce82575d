"""A box head's features of given boxes, on a GPU without making the host wait for it."""

from typing import List

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes
from torch import Tensor


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
