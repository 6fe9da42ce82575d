"""Relations between instances: their distances and the angles that they span.

"Relational Knowledge Distillation", Park et al., CVPR 2019.

Shapes: R instances, D channels.
"""

from typing import Dict

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from torch import Tensor

from ..requirement import require
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss
from .global_knowledge import coefficient_loss, project

#: Rows whose distances are computed at a time.
DISTANCE_ROWS = 128


def pairwise_distances(features: Tensor) -> Tensor:
    """|f_i - f_j| of all pairs: (R, D) float -> (R, R). Gradient 0 where the distance is 0."""
    # In parts: the backward pass on a GPU holds the differences of all their pairs, (R, D) a row.
    return torch.cat(
        [
            torch.cdist(rows, features, compute_mode="donot_use_mm_for_euclid_dist")
            for rows in features.split(DISTANCE_ROWS)
        ]
    )


def mean_positive(distances: Tensor) -> Tensor:
    """Mean of the positive entries, clamped away from 0: (R, R) -> scalar.

    What is positive by rounding alone, between instances with the same feature, does not count.
    """
    positive = distances > 1e-5 * distances.detach().mean()
    return (distances.sum() / positive.sum().clamp_min(1)).clamp_min(1e-6)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D: distances in units of their mean, compared by the Huber loss.

    Args:
        student: (R, D_s) float32, with gradient.
        teacher: (R, D_t) float32.

    Returns:
        Scalar, mean over all R^2 pairs; 0 with fewer than two instances.
    """
    ours, theirs = pairwise_distances(student), pairwise_distances(teacher)
    ours, theirs = ours / mean_positive(ours), theirs / mean_positive(theirs)
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(ours.numel(), 1)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: cosines of the angles at each instance, by the Huber loss.

    Args:
        student: (R, D_s) float32, with gradient.
        teacher: (R, D_t) float32.

    Returns:
        Scalar, mean over all R^3 triples; 0 with fewer than three instances.
    """
    ours, theirs = angle_cosines(student), angle_cosines(teacher)
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / max(ours.numel(), 1)


def angle_cosines(features: Tensor) -> Tensor:
    """[j, i, k]: cosine of the angle at j between the directions to i and to k.

    Args:
        features: (R, D).

    Returns:
        (R, R, R); 0 where i or k is at the place of j.
    """
    distances = pairwise_distances(features)
    apart = distances > 1e-4 * mean_positive(distances)
    # No direction between instances that coincide: its gradient would be without bound.
    inverse = torch.where(apart, distances, torch.inf).reciprocal()
    directions = (features[None] - features[:, None]) * inverse[..., None]
    return directions @ directions.mT


@DISTILL_LOSS_REGISTRY.register()
class RKD(DistillLoss):
    """`loss_kd_rkd_distance` and `loss_kd_rkd_angle`, or `loss_kd_rkd_prototypes`.

    Relations of all pairs and triples of the batch's instances, on raw pooled features of each
    level (no adapter: relations have no channels); mean over levels.

    Defaults: the authors' 25 and 50 for classification. GlobalKD's code has 5 and 10, summed over
    five levels, which is the same as a mean.

    "+ prototypes" (Table 4) puts an instance's projections on the prototypes in the place of its
    relations to other instances: the term is that of `GlobalKnowledge`, with its weight 5 and
    without reliability.

    Note: angles cost R^3, so that of more than `max_instances` an evenly spaced subset spans them;
    `kd/rkd_without_angles` in the log says how many did not. Distances are between all.
    """

    node = "RKD"

    @configurable
    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        relations: str = "instances",
        prototype_weight: float = 5.0,
        max_instances: int = 128,
    ):
        """
        Args:
            distance_weight: weight of RKD-D.
            angle_weight: weight of RKD-A.
            relations: "instances", or "prototypes".
            prototype_weight: weight of the term with relations to prototypes.
            max_instances: at most so many instances of a batch span angles.
        """
        allowed = ["instances", "prototypes"]
        require("RKD.RELATIONS", relations, relations in allowed, allowed)
        corners = "3 or more, the corners of an angle"
        require("RKD.MAX_INSTANCES", max_instances, max_instances >= 3, corners)
        weights = {"loss_kd_rkd_distance": distance_weight, "loss_kd_rkd_angle": angle_weight}
        if relations == "prototypes":
            weights = {"loss_kd_rkd_prototypes": prototype_weight}
        super().__init__(weights)
        if relations == "prototypes":
            self.reads = frozenset({"bank"})
        self.max_instances = max_instances

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        if "bank" in self.reads:
            student, teacher, count = project(context, "all")
            ones = student.new_ones(student.shape[:2])
            term = coefficient_loss(student, teacher, ones, count, "smooth_l1")
            return {"loss_kd_rkd_prototypes": term}
        totals = {name: [] for name in self.weights}
        measures = {"loss_kd_rkd_distance": distance_loss, "loss_kd_rkd_angle": self._angle_loss}
        for pair in context.levels:
            student = context.student_instance_features[pair.student]
            teacher = context.teacher_instance_features[pair.student]
            with torch.autocast(student.device.type, enabled=False):
                for name, terms in totals.items():
                    terms.append(measures[name](student, teacher))
        if "loss_kd_rkd_angle" in totals:
            without = max(len(context.instances) - self.max_instances, 0)
            number = context.instances.boxes.new_full((), float(without))
            context.observations["kd/rkd_without_angles"] = number
        return {name: torch.stack(terms).mean() for name, terms in totals.items()}

    def _angle_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        count = len(student)
        if count > self.max_instances:
            rows = torch.linspace(0, count - 1, self.max_instances, device=student.device).long()
            student, teacher = student[rows], teacher[rows]
        return angle_loss(student, teacher)
