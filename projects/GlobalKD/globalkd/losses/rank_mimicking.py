"""Rank mimicking and prediction-guided feature imitation, for one-stage detectors.

"Knowledge Distillation for Object Detection via Rank Mimicking and Prediction-guided Feature
Imitation", Li et al., AAAI 2022.

Shapes: M positive anchors, G annotated objects, N images, H x W cells, A anchors of a cell,
K classes.
"""

from typing import Dict, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from ..features import LevelPair
from .adapters import build_adapters
from .base import DISTILL_LOSS_REGISTRY, DistillContext, DistillLoss


def grouped_log_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Log-softmax among the entries of each group.

    Args:
        scores: (M,) float.
        group: (M,) int64 in [0, num_groups).
    """
    empty = scores.new_zeros(num_groups)
    largest = empty.scatter_reduce(0, group, scores.detach(), "amax", include_self=False)
    shifted = scores - largest[group]
    return shifted - empty.index_add(0, group, shifted.exp())[group].log()


def rank_divergence(student: Tensor, teacher: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """KL(teacher || student) of the distribution over each object's anchors.

    Args:
        student, teacher: (M,) scores.
        group: (M,) the object of each row.
        num_groups: G objects.

    Returns:
        (G,), 0 for an object without a row.
    """
    target = grouped_log_softmax(teacher, group, num_groups)
    rows = target.exp() * (target - grouped_log_softmax(student, group, num_groups))
    return rows.new_zeros(num_groups).index_add(0, group, rows)


@DISTILL_LOSS_REGISTRY.register()
class RankMimicking(DistillLoss):
    """`loss_kd_rank`: the student is to rank an object's positive anchors as the teacher does.

    Softmax over the scores (probabilities) that an object's anchors have for its class, KL
    divergence from the teacher's, mean over the objects that have an anchor.

    Default: the weight 4 of MMRazor's implementation for RetinaNet (commit 4a47267d); no code of
    the authors was found. Probabilities lie between 0 and 1, so that softmaxes over them differ
    little: where a short training is to feel this term, it needs a larger weight.

    Note: that implementation sorts each detector's scores before it compares them, so that two
    different orders are equal. Here an anchor is compared with itself. Its mean is over an image's
    objects, then over images.
    """

    node = "RANK_MIMICKING"
    reads = frozenset({"responses"})
    stages = "one"

    @configurable
    def __init__(self, *, weight: float = 4.0, use_reliability: bool = False):
        """
        Args:
            weight: weight of the term.
            use_reliability: multiply an object's divergence by the mean reliability of its anchors.
        """
        super().__init__({"loss_kd_rank": weight}, use_reliability=use_reliability)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        responses, objects = context.responses, context.ground_truth
        own = responses.labels[:, None]
        student, teacher = (
            x.float().gather(1, own).squeeze(1).sigmoid()
            for x in (responses.student, responses.teacher)
        )
        group = context.positives.matched_rows(objects)
        apart = rank_divergence(student, teacher, group, len(objects))
        none = apart.new_zeros(len(objects))
        if self.use_reliability:
            anchors = none.index_add(0, group, torch.ones_like(student))
            reliability = none.index_add(0, group, context.response_reliability.to(none))
            apart = apart * (reliability / anchors.clamp_min(1))
        ranked = none.index_fill(0, group, 1.0).sum()
        return {"loss_kd_rank": apart.sum() / ranked.clamp_min(1)}


def prediction_guided_loss(
    student: Tensor, teacher: Tensor, student_logits: Tensor, teacher_logits: Tensor
) -> Tensor:
    """Squared difference of features times that of predictions, mean over cells.

    Args:
        student, teacher: (N, D, H, W) maps.
        student_logits, teacher_logits: (N, H, W, A, K).

    Returns:
        Scalar. Gradient through both factors.
    """
    features = (student.float() - teacher.float()).square().mean(dim=1)
    predictions = (student_logits.float() - teacher_logits.float()).square().mean(dim=(3, 4))
    return (features * predictions).mean()


@DISTILL_LOSS_REGISTRY.register()
class PredictionGuidedImitation(DistillLoss):
    """`loss_kd_pfi`: imitate features where predictions differ; f a 1x1 convolution a level.

    Mean over cells and levels. Default: the weight 1.5 of MMRazor's first version of it (commit
    4a47267d) for RetinaNet, whose means are the same. Its later version (d5c36191) divides the norm
    over all cells, the root of the sum of the products' squares, by their number, with the same
    weight; that is 15 to 225 times weaker. No code of the authors was found.

    Note: predictions are compared as logits, as there. As probabilities, most of which are near 0,
    their mean squared difference would make the term vanish at that weight. f, which that
    implementation does not have, allows student and teacher of different widths.
    """

    node = "PFI"
    reads = frozenset({"student_dense", "teacher_dense"})
    compares_classes = True
    stages = "one"

    @configurable
    def __init__(self, *, weight: float = 1.5):
        """
        Args:
            weight: weight of the term.
        """
        super().__init__({"loss_kd_pfi": weight})

    def attach(self, levels: Sequence[LevelPair]) -> None:
        self.adapters = build_adapters(levels, kernel_size=1, relu=False)

    def forward(self, context: DistillContext) -> Dict[str, Tensor]:
        ours, theirs = context.student_dense, context.teacher_dense
        terms = [
            prediction_guided_loss(
                self.adapters[pair.student](context.student_maps[pair.student]),
                context.teacher_maps[pair.student],
                ours.logits[pair.student],
                theirs.logits[pair.student],
            )
            for pair in context.levels
        ]
        return {"loss_kd_pfi": torch.stack(terms).mean()}
