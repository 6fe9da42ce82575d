"""Dense heads: where a detector scores every anchor of every cell.

RetinaNet's head scores K classes; the RPN of a two-stage detector scores one, "object". Here: how
to find it, the shape that its outputs take for the losses, and how a RetinaNet head is cut in two.
Not here: running it, and what is learned from it.

Shapes: N images, H x W cells of a level, A anchors of a cell, C scores of an anchor (K or 1).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes
from torch import Tensor, nn


@dataclass(frozen=True)
class DenseHead:
    """The parts of a detector that make its dense predictions.

    Attributes:
        module: takes a list of maps, returns class maps and box maps, a list of each.
        anchor_generator: takes the same list, returns the anchors of each level.
        in_features: the names of those maps, in order.
        transform: turns box predictions into boxes.
    """

    module: nn.Module
    anchor_generator: nn.Module
    in_features: Sequence[str]
    transform: Box2BoxTransform


def find_dense_head(model: nn.Module) -> Optional[DenseHead]:
    """The dense head of a detector; None where it has none that we know."""
    if isinstance(model, RetinaNet):
        return DenseHead(
            model.head, model.anchor_generator, model.head_in_features, model.box2box_transform
        )
    rpn = getattr(model, "proposal_generator", None)
    if isinstance(rpn, RPN):
        return DenseHead(rpn.rpn_head, rpn.anchor_generator, rpn.in_features, rpn.box2box_transform)
    return None


#: What the two towers of a RetinaNet head hold at some depth, on one level: of the class tower and
#: of the box tower, (N, D, H, W) each, before the activation.
Hidden = Tuple[Tensor, Tensor]


def _towers(head: nn.Module) -> Tuple[nn.Sequential, nn.Sequential]:
    return head.cls_subnet, head.bbox_subnet


def _activations(tower: nn.Sequential) -> List[int]:
    return [i for i, layer in enumerate(tower) if isinstance(layer, nn.ReLU)]


def tower_widths(head: nn.Module) -> List[int]:
    """Channels of each convolution in the towers of a RetinaNet head; none of another head."""
    tower = getattr(head, "cls_subnet", [])
    return [layer.out_channels for layer in tower if isinstance(layer, nn.Conv2d)]


def tower_layers(head: nn.Module, depths: Iterable[int]) -> Dict[Tuple[int, int], nn.Module]:
    """The layer before the `depth`-th activation (from 1) of each tower of a RetinaNet head.

    Returns:
        (depth, tower) -> layer; tower 0 is that of classes, 1 that of boxes.
    """
    return {
        (depth, number): tower[_activations(tower)[depth - 1] - 1]
        for depth in depths
        for number, tower in enumerate(_towers(head))
    }


def finish_tower(head: nn.Module, maps: Sequence[Tensor], tower: int, depth: int) -> List[Tensor]:
    """Run the rest of a RetinaNet head's tower, from its `depth`-th activation on.

    Args:
        head: with or without gradient.
        maps: (N, D, H, W) of each level, in the order of the head.
        tower: 0, that of classes, or 1, that of boxes.
        depth: number of the activation, from 1, that comes next.
    """
    layers = _towers(head)[tower]
    rest = layers[_activations(layers)[depth - 1] :]
    last = (head.cls_score, head.bbox_pred)[tower]
    return [last(rest(x)) for x in maps]


@dataclass
class DenseOutputs:
    """What a dense head says of every anchor. Levels have the student's names, finest first.

    Attributes:
        anchors: level -> (H, W, A, 4) XYXY_ABS in input pixels.
        logits: level -> (N, H, W, A, C).
        deltas: level -> (N, H, W, A, 4), what `transform` applies to the anchors.
        transform: see `DenseHead`.
        hidden: depth -> what a RetinaNet head's towers held there, level by level, for the depths
            that losses ask for.
    """

    anchors: Dict[str, Tensor]
    logits: Dict[str, Tensor]
    deltas: Dict[str, Tensor]
    transform: Box2BoxTransform
    hidden: Dict[int, List[Hidden]] = field(default_factory=dict)

    @staticmethod
    def collect(
        head: DenseHead,
        anchors: Sequence[Boxes],
        logits: List[Tensor],
        deltas: List[Tensor],
        hidden: Optional[Mapping[Tuple[int, int], List[Tensor]]] = None,
    ) -> "DenseOutputs":
        """From what `head.anchor_generator`, `head.module` and its `tower_layers` returned."""
        shaped_anchors, shaped_logits, shaped_deltas = {}, {}, {}
        for name, boxes, scores, offsets in zip(head.in_features, anchors, logits, deltas):
            height, width = scores.shape[-2:]
            assert len(boxes) % (height * width) == 0, (
                f"{name}: {len(boxes)} anchors for maps of {height} x {width} cells; are the two "
                "detectors' inputs padded to different sizes?"
            )
            shaped_anchors[name] = boxes.tensor.view(height, width, -1, 4)
            num_anchors = shaped_anchors[name].shape[2]
            shaped_logits[name] = by_cell(scores, num_anchors)
            shaped_deltas[name] = by_cell(offsets, num_anchors)
        levels = len(logits)  # a second pass through the head is left out
        by_depth = {
            depth: list(zip(hidden[depth, 0][:levels], hidden[depth, 1][:levels]))
            for depth, _ in hidden or ()
        }
        return DenseOutputs(shaped_anchors, shaped_logits, shaped_deltas, head.transform, by_depth)

    def renamed(self, names: Sequence[str]) -> "DenseOutputs":
        """The same outputs, with other names for the levels, in order."""
        parts = [dict(zip(names, x.values())) for x in (self.anchors, self.logits, self.deltas)]
        return DenseOutputs(*parts, self.transform, self.hidden)

    @cached_property
    def flat_anchors(self) -> Tensor:
        """(sum of H W A, 4), in Detectron2's order of anchors."""
        return torch.cat([x.flatten(0, 2) for x in self.anchors.values()])

    @cached_property
    def flat_logits(self) -> Tensor:
        """(N, sum of H W A, C), in the order of `flat_anchors`."""
        return _flat(self.logits)

    def logits_at(self, rows: Tensor) -> Tensor:
        """(M, C) of (M,) rows of `flat_logits` over all images, without a copy of all of them."""
        shapes = [x.shape for x in self.logits.values()]
        counts = [height * width * num_anchors for _, height, width, num_anchors, _ in shapes]
        image, place = rows // sum(counts), rows % sum(counts)
        found, start = 0, 0
        for x, count, (_, _, width, num_anchors, _) in zip(self.logits.values(), counts, shapes):
            # Every row on every level, as its number is known: which are there would be waited for.
            here = (place >= start) & (place < start + count)
            own = (place - start) % count  # others spread: rows of one cell would queue in backward
            cell, anchor = own // num_anchors, own % num_anchors
            values = x[image, cell // width, cell % width, anchor]
            found = found + values.where(here[:, None], 0)
            start += count
        return found

    @cached_property
    def flat_deltas(self) -> Tensor:
        """(N, sum of H W A, 4), in the order of `flat_anchors`."""
        return _flat(self.deltas)


@torch.enable_grad()  # kept for all readers, though the first may be one without gradient
def _flat(maps: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten(1, 3) for x in maps.values()], dim=1)


def convert_deltas(deltas: Tensor, source: Box2BoxTransform, target: Box2BoxTransform) -> Tensor:
    """Box predictions (..., 4) for one transform -> those that give the same boxes by another."""
    if source.weights == target.weights:
        return deltas
    factors = torch.tensor([t / s for s, t in zip(source.weights, target.weights)])
    return deltas * factors.to(deltas, non_blocking=True)


def by_cell(maps: Tensor, num_anchors: int) -> Tensor:
    """(N, A C, H, W) -> (N, H, W, A, C)."""
    return maps.unflatten(1, (num_anchors, -1)).permute(0, 3, 4, 1, 2)
