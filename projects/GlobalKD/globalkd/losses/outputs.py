"""What a student's own forward pass leaves for the losses: boxes as flat rows, its heads' scores.

The meta-architectures fill these containers from what they recorded; `DistillContext` adds the
teacher's side.

Shapes: N images, R instances, M positives, B rows that the class head scored, K classes, C scores
of a row (K, or K + 1 with background last).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Callable, ClassVar, Dict, Optional, Sequence

import torch
from detectron2.structures import Instances
from torch import Tensor

from ..dense_head import DenseOutputs
from ..features import to_rois
from .divergence import sigmoid_kl, softmax_kl

if TYPE_CHECKING:
    from .base import DistillContext


@dataclass
class InstanceRows:
    """Boxes of a batch as flat rows.

    Attributes:
        boxes: (R, 4) XYXY_ABS in input pixels.
        image_index: (R,) int64.
        classes: (R,) int64 in [0, K).
    """

    boxes: Tensor
    image_index: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    @staticmethod
    def from_ground_truth(
        gt_instances: Sequence[Instances], device: Optional[torch.device] = None
    ) -> "InstanceRows":
        """The annotations of a batch, moved to a device without waiting for it."""
        rois = to_rois([x.gt_boxes.tensor for x in gt_instances])
        classes = torch.cat([x.gt_classes for x in gt_instances])
        rois, classes = (x.to(device, non_blocking=True) for x in (rois, classes))
        return InstanceRows(rois[:, 1:], rois[:, 0].long(), classes)

    @property
    def rois(self) -> Tensor:
        """(R, 5) rows for RoIAlign."""
        return torch.cat([self.image_index[:, None].to(self.boxes), self.boxes], dim=1)


@dataclass
class Positives(InstanceRows):
    """The boxes that the student's own assigner called foreground.

    Attributes:
        gt_boxes: (M, 4) the ground-truth box that each row was matched to.
        strides: (M,) float, the stride of the level that the student predicts the row from.
        rows: (M,) int64, where each one stands among the step's `Candidates`.
    """

    gt_boxes: Tensor
    strides: Tensor
    rows: Tensor

    def matched_rows(self, ground_truth: InstanceRows) -> Tensor:
        """(M,) int64, the row of `ground_truth` that each positive stands for."""
        if len(ground_truth) == 0:
            return torch.zeros_like(self.classes)
        same = (self.gt_boxes[:, None] == ground_truth.boxes[None]).all(dim=-1)
        same &= self.image_index[:, None] == ground_truth.image_index[None]
        same &= self.classes[:, None] == ground_truth.classes[None]
        return same.float().argmax(dim=1)


@dataclass
class Candidates(ABC):
    """Everything that the student's class head scored: its sampled proposals, or all anchors.

    Attributes:
        labels: (B,) int64: a class in [0, K), K for background, -1 where the detector ignores it.
        normalizer: what a sum over all rows is divided by, as the detector divides its own: their
            number, or of anchors the running mean of the number of positives.
    """

    labels: Tensor
    normalizer: float

    #: Independent scores of the K classes (sigmoid); otherwise one softmax with the background.
    one_stage: ClassVar[bool]

    @abstractmethod
    def student_logits(self, context: "DistillContext", rows: Optional[Tensor] = None) -> Tensor:
        """The student's logits (B, C) of all rows, or (M, C) of the given ones; with gradient."""

    @abstractmethod
    def teacher_logits(self, context: "DistillContext", rows: Optional[Tensor] = None) -> Tensor:
        """The teacher's logits for all rows, or for the given ones; without gradient."""

    def aliased(self, alias: Callable[[Tensor], Tensor]) -> "Candidates":
        """A copy with `alias(x)` in the place of each tensor x of its own that has a gradient."""
        return self


@dataclass
class StudentOutputs:
    """What a student computed in its own forward pass.

    Attributes:
        features: the backbone's maps by name.
        candidates: what its class head scored.
        positives: the foreground among them.
        dense: the outputs of its dense head; None where it has none.
    """

    features: Dict[str, Tensor]
    candidates: Candidates
    positives: Positives
    dense: Optional[DenseOutputs]


@dataclass
class Responses:
    """Class predictions of both detectors on the same B rows.

    Attributes:
        student: (B, C) logits with gradient.
        teacher: (B, C) logits, detached.
        labels: (B,) see `Candidates.labels`.
        normalizer: what a sum over the rows is divided by: of positives their number, 1 or more;
            else see `Candidates.normalizer`.
        one_stage: see `Candidates.one_stage`.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor
    normalizer: float
    one_stage: bool

    @property
    def background(self) -> Tensor:
        """(B,) bool."""
        return self.labels == self.student.shape[1] - (0 if self.one_stage else 1)

    def divergence(self, temperature: float) -> Tensor:
        """(B,) T^2 KL(teacher || student): of one softmax, or of K sigmoids, summed."""
        divergence = sigmoid_kl if self.one_stage else softmax_kl
        return divergence(self.student, self.teacher, temperature)
