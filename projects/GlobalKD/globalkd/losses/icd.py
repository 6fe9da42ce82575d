"""Instance-conditional distillation: a decoder asks the teacher's maps about each object.

"Instance-Conditional Knowledge Distillation for Object Detection", Kang et al., NeurIPS 2021
(ICD). The conditions are in `icd_conditions`.

Shapes: N images, Q queries of an image, S cells over all levels, E hidden channels, U heads.
"""

from typing import Dict, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..pairing import UnfitLosses
from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .icd_conditions import Queries, cell_centres, describe, make_queries, sine_embedding


def conditional_value_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Squared difference of normalised values under attention.

    Args:
        student, teacher: (N, S, U, E / U) values.
        weight: (N, U, S) non-negative, attention summed over an image's objects.

    Returns:
        Scalar: mean over channels and heads, weighted mean over cells, mean over images with an
        object.
    """
    ours, theirs = (F.layer_norm(x.float(), x.shape[-1:]) for x in (student, teacher))
    squared = (ours - theirs).square().mean(dim=-1).mT  # (N, U, S)
    total = weight.sum(dim=-1)
    of_head = (squared * weight).sum(dim=-1) / total.clamp_min(1e-6)
    return of_head.mean(dim=1).sum() / (total > 0).any(dim=1).sum().clamp_min(1)


def multi_layer(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [f for a, b in zip(widths, widths[1:]) for f in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ConditionalDecoder(nn.Module):
    """One transformer decoder layer without self-attention: cells answer each query on its own."""

    def __init__(self, condition_dim: int, channels: int, *, hidden_dim: int, num_heads: int):
        """
        Args:
            condition_dim: length of a query's description.
            channels: of the teacher's maps.
            hidden_dim: E.
            num_heads: U.
        """
        super().__init__()
        self.num_heads = num_heads
        self.encode = multi_layer(condition_dim, hidden_dim, hidden_dim, hidden_dim)
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.position = nn.Linear(hidden_dim, channels)
        self.key = nn.Linear(channels, hidden_dim)
        self.value = nn.Linear(channels, hidden_dim)
        self.output = nn.Linear(hidden_dim, hidden_dim)
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)])
        self.feed_forward = multi_layer(hidden_dim, 4 * hidden_dim, hidden_dim)
        self.predict = multi_layer(hidden_dim, hidden_dim, hidden_dim, 5)

    def forward(
        self, conditions: Tensor, cells: Tensor, positions: Tensor, padding: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            conditions: (N, Q, condition_dim).
            cells: (N, S, channels).
            positions: (N, S, E).
            padding: (N, S) bool, cells outside their image.

        Returns:
            (N, Q, 5) predictions, (N, U, Q, S) attention, (N, S, U, E / U) values.
        """
        condition = self.encode(conditions)
        query = self.by_head(self.query(condition)).transpose(1, 2)
        key = self.by_head(self.key(cells + self.position(positions))).transpose(1, 2)
        value = self.by_head(self.value(cells))
        scores = (query / query.shape[-1] ** 0.5 @ key.mT).float()  # within float16's range, too
        attention = scores.masked_fill(padding[:, None, None], -torch.inf).softmax(dim=-1)
        answer = (attention.to(value) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        decoded = self.norms[0](condition + self.output(answer))
        decoded = self.norms[1](decoded + self.feed_forward(decoded))
        return self.predict(decoded), attention, value

    def by_head(self, x: Tensor) -> Tensor:
        """(N, S, E) -> (N, S, U, E / U)."""
        return x.unflatten(-1, (self.num_heads, -1))


@DISTILL_LOSS_REGISTRY.register()
class ICD(DistillLoss):
    """`loss_kd_icd`, and what trains the decoder: `loss_kd_icd_identify`, `loss_kd_icd_locate`.

    Each annotated object is described by its class, a blurred centre and its scale; invented ones
    are mixed in. A decoder attends to the teacher's cells with the description as its query, and
    is trained to say whether the object is there (binary cross-entropy) and how far its sides are
    (L1 in units of its size). The student's values imitate the teacher's where the attention of
    the real objects lies; only this term reaches the student, and nothing of it the decoder.

    Defaults: those of the authors' Detectron2 code for Faster R-CNN: 8 heads, 256 channels, 5
    invented objects for a real one and no more than 100 of both, blur 0.3 of the size, both tasks
    with weight 1; the imitation with 3, from iteration 1000 on: until then only the student's
    value projection learns. For RetinaNet they have weight 8 and up to 300 objects. Real objects
    all take part, however many there are.

    Note: the authors train the decoder with an AdamW of its own; here the student's optimizer
    does. They draw invented objects from COCO's statistics; here classes are uniform, and sides
    normal around a fifth of the image, as theirs without statistics. Their cells' positions lie
    half a cell further to the right and down than the boxes', and their mean over images counts
    those without an object. They start the student's FPN and head as the teacher's
    (INHERIT_TEACHER_HEADS); here that is off.
    """

    node = "ICD"

    @configurable
    def __init__(
        self,
        *,
        weight: float = 3.0,
        auxiliary_weight: float = 1.0,
        hidden_dim: int = 256,
        num_heads: int = 8,
        start_iter: int = 1000,
        negative_ratio: float = 5.0,
        max_queries: int = 100,
        blur: float = 0.3,
        use_reliability: bool = False,
    ):
        """
        Args:
            weight: weight of the imitation.
            auxiliary_weight: weight of either task of the decoder.
            hidden_dim: E, a multiple of 4 and of `num_heads`.
            num_heads: U.
            start_iter: the student is distilled from this iteration on.
            negative_ratio: invented objects for each real one.
            max_queries: invented objects fill an image up to this number at most.
            blur: largest shift of a described centre, in units of the box's size.
            use_reliability: multiply each object's attention by its reliability.
        """
        tasks = dict.fromkeys(("loss_kd_icd_identify", "loss_kd_icd_locate"), auxiliary_weight)
        super().__init__({"loss_kd_icd": weight, **tasks}, use_reliability=use_reliability)
        # Without its tasks the attention is noise; without imitation they are for nothing.
        right = (weight > 0) == (auxiliary_weight > 0)
        needed = f"above 0 where MODEL.GLOBALKD.ICD.WEIGHT is, and 0 where it is 0; it is {weight}"
        require("ICD.AUXILIARY_WEIGHT", auxiliary_weight, right, needed)
        require("ICD.NUM_HEADS", num_heads, num_heads >= 1, "1 or more")
        divides = hidden_dim > 0 and hidden_dim % 4 == 0 and hidden_dim % num_heads == 0
        needed = f"a multiple of 4 and of NUM_HEADS, which is {num_heads}"
        require("ICD.HIDDEN_DIM", hidden_dim, divides, needed)
        require("ICD.MAX_QUERIES", max_queries, max_queries >= 1, "1 or more")
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.start_iter = start_iter
        self.sampling = {
            "negative_ratio": negative_ratio,
            "max_queries": max_queries,
            "blur": blur,
        }

    def attach(self, levels: Sequence[LevelPair]) -> None:
        widths = {(p.student_channels, p.teacher_channels) for p in levels}
        if len(widths) > 1:
            raise UnfitLosses(
                ["ICD"],
                "attend to all levels at once: they must have equal widths, but have "
                f"{sorted(widths)} (student, teacher). Choose by MODEL.GLOBALKD.IN_FEATURES.",
            )
        ((student_channels, teacher_channels),) = widths
        condition_dim = self.num_classes + self.hidden_dim + 10
        self.decoder = ConditionalDecoder(
            condition_dim,
            teacher_channels,
            hidden_dim=self.hidden_dim,
            num_heads=self.num_heads,
        )
        self.student_value = nn.Linear(student_channels, self.hidden_dim)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        queries = make_queries(context, num_classes=self.num_classes, **self.sampling)
        centres, padding = cell_centres(context)
        predictions, attention, value = self.decoder(
            describe(queries, num_classes=self.num_classes, dim=self.hidden_dim),
            self._cells(context, context.teacher_maps),
            sine_embedding(centres, self.hidden_dim),
            padding,
        )
        identify, locate = queries.task_losses(predictions.float())
        student = self._cells(context, context.student_maps)
        if context.iteration < self.start_iter:
            student = student.detach()
        imitate = conditional_value_loss(
            self.decoder.by_head(self.student_value(student)),
            value.detach(),
            self._cell_weights(context, queries, attention.detach()),
        )
        return {
            "loss_kd_icd": imitate,
            "loss_kd_icd_identify": identify,
            "loss_kd_icd_locate": locate,
        }

    def _cells(self, context: DistillContext, maps: Dict[str, Tensor]) -> Tensor:
        """(N, S, D), level after level."""
        return torch.cat([maps[p.student].flatten(2).mT for p in context.levels], dim=1)

    def _cell_weights(self, context: DistillContext, queries: Queries, attention: Tensor) -> Tensor:
        """(N, U, S): attention summed over an image's real objects, each with its weight."""
        sizes = [context.teacher_maps[p.student][0, 0].numel() for p in context.levels]
        weights = []
        for pair, part in zip(context.levels, attention.split(sizes, dim=3)):
            of_object = self.instance_weight(context.on_ground_truth, pair.student).float()
            of_query = queries.scatter(of_object)  # (N, Q), 0 of invented ones
            weights.append((of_query[:, None, None] @ part).squeeze(2))
        return torch.cat(weights, dim=2)
