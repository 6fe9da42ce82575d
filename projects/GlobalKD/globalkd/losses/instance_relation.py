"""Instance-wise relation of DRKD: how the annotated boxes of an image relate to one another.

Here: what is compared of teacher and student, and `loss_kd_instance_relation`, the second term of
"Dual Relation Knowledge Distillation for Object Detection" (Ni et al., IJCAI 2023). The relations
themselves are in `box_relation`. A batch is one padded tensor; images never mix.

Shapes: N images, n boxes of the fullest image, D channels, G x G bins, E channels of an embedding.
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..features import LevelPair
from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .box_relation import BoxAggregation, BoxRelation, to_padded
from .instance_feature import ground_truth_grids


class MatrixMatch(nn.Module):
    """The paper's: the squared distance between corresponding rows of the relation matrices.

    Note: the teacher's embeddings are not trained; they stay the random projections that they start
    as, and have no filter, which would be random too. Trained by this loss, teacher and student
    agree on relations without content (all uniform within some hundred steps) and the student's
    features learn nothing; docs/drkd.md has the measurements.
    """

    def __init__(
        self, pair: LevelPair, *, resolution: int, embedding_channels: int, filter_channels: int
    ):
        """
        Args:
            pair: the level.
            resolution: bins per side of RoIAlign, G.
            embedding_channels: E.
            filter_channels: hidden channels of the filter; 0 for none.
        """
        super().__init__()
        self.teacher = BoxRelation(
            pair.teacher_channels * resolution**2,
            embedding_channels=embedding_channels,
            filter_channels=0,
        ).requires_grad_(False)
        self.student = BoxRelation(
            pair.student_channels * resolution**2,
            embedding_channels=embedding_channels,
            filter_channels=filter_channels,
        )

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """(N, n, D_s, G, G), (N, n, D_t, G, G), (N, n) -> (N, n) error of each box."""
        target = self.teacher(teacher.flatten(2), mask)
        return (self.student(student.flatten(2), mask) - target).square().sum(dim=2)


class FeatureMatch(nn.Module):
    """The released code's: the squared error of features aggregated by the relations."""

    def __init__(self, pair: LevelPair, *, resolution: int, **sizes: int):
        """The arguments are those of `MatrixMatch`."""
        super().__init__()
        self.teacher = BoxAggregation(pair.teacher_channels * resolution**2, **sizes)
        self.student = BoxAggregation(pair.student_channels * resolution**2, **sizes)
        self.adapter = nn.Linear(pair.student_channels, pair.teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """(N, n, D_s, G, G), (N, n, D_t, G, G), (N, n) -> (N, n) error of each box."""
        target = self.teacher(teacher.flatten(2), mask)
        output = self.student(student.flatten(2), mask).view(student.shape)
        output = self.adapter(output.flatten(3).mT).mT.flatten(2)
        return (output - target).square().mean(dim=2)


MATCHES = {"matrix": MatrixMatch, "features": FeatureMatch}


@DISTILL_LOSS_REGISTRY.register()
class InstanceRelation(DistillLoss):
    """`loss_kd_instance_relation`: equal relations between the annotated boxes of each image.

    Mean over the batch's boxes, every box on every one of the finest levels; then over levels.
    Teacher and student have a relation module of their own on each level. An image with one box has
    the relation [[1]] in both, one without boxes has none.
    """

    node = "INSTANCE_RELATION"

    @configurable
    def __init__(
        self,
        *,
        weight: float = 0.5,
        match: str = "matrix",
        num_levels: int = 2,
        resolution: int = 3,
        embedding_channels: int = 256,
        filter_channels: int = 32,
        use_reliability: bool = False,
    ):
        """
        Args:
            weight: weight of the term.
            match: "matrix" (the relations themselves) or "features" (what they aggregate).
            num_levels: how many levels, from the finest on; all where there are fewer.
            resolution: bins per side of RoIAlign.
            embedding_channels: E.
            filter_channels: hidden channels of the relation filter; 0 for no filter.
            use_reliability: multiply each box by its reliability.
        """
        super().__init__({"loss_kd_instance_relation": weight}, use_reliability=use_reliability)
        require("INSTANCE_RELATION.MATCH", match, match in MATCHES, list(MATCHES))
        for key, value in (
            ("NUM_LEVELS", num_levels),
            ("RESOLUTION", resolution),
            ("EMBEDDING_CHANNELS", embedding_channels),
        ):
            require(f"INSTANCE_RELATION.{key}", value, value >= 1, "1 or more")
        self.match = match
        self.num_levels = num_levels
        self.sizes = {
            "resolution": resolution,
            "embedding_channels": embedding_channels,
            "filter_channels": filter_channels,
        }

    def attach(self, levels: Sequence[LevelPair]) -> None:
        match = MATCHES[self.match]
        self.matches = nn.ModuleDict(
            {p.student: match(p, **self.sizes) for p in levels[: self.num_levels]}
        )

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        rows, num_images = context.ground_truth, len(context.image_sizes)
        most = max(len(x["instances"]) for x in context.batched_inputs)
        terms = []
        for pair in context.levels[: self.num_levels]:
            weight = self.instance_weight(context.on_ground_truth, pair.student)
            with torch.autocast(weight.device.type, enabled=False):
                grids = ground_truth_grids(context, pair, self.sizes["resolution"])
                (student, teacher, weight), mask = to_padded(
                    [*grids, weight], rows.image_index, num_images, most
                )
                errors = self.matches[pair.student](student, teacher, mask)
                terms.append((errors * weight).sum() / max(len(rows), 1))
        return {"loss_kd_instance_relation": torch.stack(terms).mean()}
