"""A teacher that knows more classes than the student, or the same in another order.

Its heads are cut down to the student's classes once, when it is built. Whatever reads them later
(losses, evaluation, `inherit_heads`) finds a detector of the student's classes.

Shapes: K classes of the teacher, C of them chosen, A anchors of a cell, D channels, R boxes.
"""

import logging
from typing import List, Sequence, Union

import torch
import torch.nn.functional as F
from detectron2.modeling import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_KEY = "MODEL.GLOBALKD.TEACHER.CLASSES"


def select_classes(
    model: nn.Module, classes: Sequence[Union[int, str]], names: Sequence[str]
) -> List[str]:
    """Cut the heads of a detector down to some of its classes, in place.

    A RetinaNet then gives their scores as before. A box head gives their probabilities as before,
    and to the background what it gave to the background and to all other classes.

    Args:
        model: a RetinaNet, or a detector with Detectron2's box and mask heads.
        classes: labels in [0, K) or names, none twice, in the order that they are to have. Empty
            for all: nothing is changed.
        names: of the K classes; empty where they are not known.

    Returns:
        The names of the chosen classes.

    Raises:
        ValueError: a class that the detector does not have, or heads of another kind.
    """
    if not classes:
        return list(names)
    heads = getattr(model, "roi_heads", model)
    is_dense = isinstance(model, RetinaNet) and isinstance(model.head, RetinaNetHead)
    if not is_dense:
        _require_known(heads)
    num_classes = heads.num_classes
    labels = _find_classes(classes, names, num_classes)
    if is_dense:
        _select_of_dense_head(model.head, num_classes, labels)
    else:
        _select_of_roi_heads(heads, labels)
    heads.num_classes = len(labels)
    chosen = [names[label] for label in labels] if names else []
    logger.info(
        f"Teacher: {len(labels)} of its {num_classes} classes: "
        f"{', '.join(map(str, chosen or labels))}."
    )
    return chosen


def _find_classes(
    classes: Sequence[Union[int, str]], names: Sequence[str], num_classes: int
) -> List[int]:
    if unknown := [x for x in classes if isinstance(x, str) and x not in names]:
        known = (
            f"its classes are {', '.join(names)}"
            if names
            else "the names of its classes are not known here: give their labels, from 0"
        )
        raise ValueError(f"{_KEY} has {unknown}, which the teacher does not know; {known}.")
    labels = [list(names).index(x) if isinstance(x, str) else x for x in classes]
    if outside := [x for x in labels if type(x) is not int or not 0 <= x < num_classes]:
        raise ValueError(
            f"{_KEY} has {outside}; the teacher's labels are whole numbers from 0 to "
            f"{num_classes - 1}."
        )
    if twice := [x for x, label in zip(classes, labels) if labels.count(label) > 1]:
        raise ValueError(f"{_KEY} has a class more than once: {twice}.")
    return labels


class SelectedClasses(nn.Linear):
    """A box head's class scores (R, C + 1) for some of its classes; the others are background.

    `weight` (C + 1, D) and `bias` are those of the layer that it replaces, background last, so that
    a student with the same classes can inherit them.
    """

    def __init__(self, layer: nn.Linear, labels: Sequence[int]):
        """
        Args:
            layer: D -> K + 1, background last.
            labels: (C,) see `select_classes`.
        """
        background = layer.out_features - 1
        weight, bias = layer.weight.detach(), layer.bias.detach()
        super().__init__(layer.in_features, len(labels) + 1, device="meta")
        kept = [*labels, background]
        others = [k for k in range(background) if k not in labels]
        self.weight = nn.Parameter(weight[kept], requires_grad=False)
        self.bias = nn.Parameter(bias[kept], requires_grad=False)
        self.register_buffer("other_weight", weight[others])
        self.register_buffer("other_bias", bias[others])

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        others = F.linear(x, self.other_weight, self.other_bias)
        # exp(logit) is a probability but for a factor: those of the classes left out are added up.
        rest = torch.cat([logits[:, -1:], others], dim=1).float().logsumexp(dim=1, keepdim=True)
        return torch.cat([logits[:, :-1], rest.to(logits.dtype)], dim=1)


def _box_predictors(heads: nn.Module) -> Sequence[nn.Module]:
    """One, or of a cascade each stage's."""
    predictor = getattr(heads, "box_predictor", None)
    return predictor if isinstance(predictor, nn.ModuleList) else [predictor]


def _require_known(heads: nn.Module) -> None:
    predictors, mask_head = _box_predictors(heads), getattr(heads, "mask_head", None)
    known = all(isinstance(x, FastRCNNOutputLayers) for x in predictors)
    if not known or not isinstance(mask_head, (type(None), MaskRCNNConvUpsampleHead)):
        kinds = [type(x).__name__ for x in (heads, *predictors, mask_head) if x is not None]
        raise ValueError(
            f"{_KEY} needs heads of Detectron2's RetinaNet or R-CNNs, of which it is known where "
            f"the classes are; the teacher has {', '.join(kinds)}."
        )


def _select_of_roi_heads(heads: nn.Module, labels: Sequence[int]) -> None:
    for predictor in _box_predictors(heads):
        _select_of_box_predictor(predictor, labels)
    mask_head = getattr(heads, "mask_head", None)
    if mask_head is not None and mask_head.predictor.out_channels == heads.num_classes:
        _keep_outputs(mask_head.predictor, labels)


def _select_of_box_predictor(predictor: FastRCNNOutputLayers, labels: Sequence[int]) -> None:
    box_dim = len(predictor.box2box_transform.weights)
    if predictor.bbox_pred.out_features == predictor.num_classes * box_dim:  # a box for each class
        rows = [k * box_dim + i for k in labels for i in range(box_dim)]
        _keep_outputs(predictor.bbox_pred, rows)
    predictor.cls_score = SelectedClasses(predictor.cls_score, labels)
    predictor.num_classes = len(labels)


def _select_of_dense_head(head: RetinaNetHead, num_classes: int, labels: Sequence[int]) -> None:
    num_anchors = head.cls_score.out_channels // num_classes
    rows = [anchor * num_classes + k for anchor in range(num_anchors) for k in labels]
    _keep_outputs(head.cls_score, rows)


def _keep_outputs(layer: Union[nn.Linear, nn.Conv2d], rows: Sequence[int]) -> None:
    for name in ("weight", "bias"):
        values = getattr(layer, name).detach()[rows]
        setattr(layer, name, nn.Parameter(values, requires_grad=False))
    size = "out_features" if isinstance(layer, nn.Linear) else "out_channels"
    setattr(layer, size, len(rows))
