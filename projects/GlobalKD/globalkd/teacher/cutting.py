"""A backbone without the work for levels that nobody reads.

A ResNet ends with its last read stage, a feature pyramid has no output convolution for an unread
level and does not go down to levels finer than all read ones. Other backbones stay whole.
"""

import copy
from typing import Collection

from detectron2.modeling.backbone import FPN, ResNet
from torch import nn


def cut_backbone(backbone: nn.Module, levels: Collection[str]) -> nn.Module:
    """The backbone, less what `levels` do not need.

    Args:
        backbone: stays as it is; the result shares its parameters, wherever they are moved.
        levels: those of its outputs that are read.

    Returns:
        A module whose output has at least these levels, equal to the backbone's own.
    """
    if type(backbone) is FPN:  # a subclass may read what FPN's own forward does not
        return _cut_pyramid(backbone, set(levels))
    if type(backbone) is ResNet:
        return _cut_resnet(backbone, set(levels))
    return backbone


def _with_own_lists(module: nn.Module) -> nn.Module:
    """The same modules and parameters in a container that can be changed by itself."""
    result = copy.copy(module)
    result._modules = dict(module._modules)
    return result


def _cut_resnet(backbone: ResNet, levels: set) -> ResNet:
    cut = _with_own_lists(backbone)
    last = max((i for i, name in enumerate(backbone.stage_names) if name in levels), default=-1)
    cut.stages, cut.stage_names = backbone.stages[: last + 1], backbone.stage_names[: last + 1]
    cut._out_features = [name for name in backbone._out_features if name in levels]
    return cut


def _cut_pyramid(backbone: FPN, levels: set) -> FPN:
    cut = _with_own_lists(backbone)
    own = backbone._out_features[: len(backbone.output_convs)]  # finest first
    top = backbone._out_features[len(own) :]
    if not levels & set(top):
        cut.top_block, top = None, []
    elif backbone.top_block.in_feature in own:
        levels = levels | {backbone.top_block.in_feature}
    finest = next((i for i, name in enumerate(own) if name in levels), len(own) - 1)
    own = own[finest:]
    # Its lists go from the coarsest level to the finest.
    cut.lateral_convs = backbone.lateral_convs[: len(own)]
    cut.output_convs = [
        conv if name in levels else nn.Identity()
        for name, conv in zip(reversed(own), backbone.output_convs)
    ]
    cut._out_features = [*own, *top]
    return cut
