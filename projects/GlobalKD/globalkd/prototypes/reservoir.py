"""Instance features that training has computed anyway, kept for the next choice of prototypes.

Training visits the images in a seeded random order, so the latest instances of a class are a
random sample of it, and of all samples the one that the present student made: each class keeps its
latest instances in a ring, and no random number is drawn. Not here: choosing among them.

Shapes: R annotated boxes of a step, K classes, S slots of a class, D_t and D_s channels.
"""

from typing import Dict, Sequence

import torch
from torch import Tensor, nn

from ..features import LevelPair
from .structures import PairedFeatures


class InstanceReservoir(nn.Module):
    """The latest S instances of each class, with their features on every level in both detectors.

    All of its state is in buffers, on the student's device: 4 K S (sum over levels of D_t + D_s)
    bytes and little more. `add` neither synchronises with the device nor draws random numbers.
    """

    def __init__(
        self, levels: Sequence[LevelPair], *, num_classes: int, size: int, min_box_size: float
    ):
        """
        Args:
            levels: the distilled levels.
            num_classes: K.
            size: S, the instances that each class keeps.
            min_box_size: in pixels of the original image.
        """
        super().__init__()
        self.levels = [pair.student for pair in levels]
        self.num_classes, self.size, self.min_box_size = num_classes, size, min_box_size
        slots = num_classes * size + 1  # the last one is written by what is not kept
        for pair in levels:
            self.register_buffer(
                f"teacher_{pair.student}", torch.zeros(slots, pair.teacher_channels)
            )
            self.register_buffer(
                f"student_{pair.student}", torch.zeros(slots, pair.student_channels)
            )
        self.register_buffer("boxes", torch.zeros(slots, 4))
        self.register_buffer("iterations", torch.full((slots,), -1))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def add(
        self,
        teacher: Dict[str, Tensor],
        student: Dict[str, Tensor],
        *,
        classes: Tensor,
        boxes: Tensor,
        iteration: int,
    ) -> None:
        """Store the instances of a step over the oldest ones of their classes.

        Boxes with a side shorter than `min_box_size` are left out, those with a feature that is not
        finite, and of more than S of one class all but the first S.

        Args:
            teacher: level -> (R, D_t) raw features.
            student: level -> (R, D_s) raw features.
            classes: (R,) int64 in [0, K).
            boxes: (R, 4) XYXY_ABS, in pixels of the original image.
            iteration: of the step.
        """
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1)
        keep = (sides >= self.min_box_size) & (sides > 0)
        for features in (*teacher.values(), *student.values()):
            keep &= features.isfinite().all(dim=1)
        mine = nn.functional.one_hot(classes, self.num_classes) * keep[:, None]
        turn = (mine.cumsum(dim=0) - 1).gather(1, classes[:, None]).squeeze(1)
        slot = classes * self.size + (self.counts[classes] + turn) % self.size
        slot = torch.where(keep & (turn < self.size), slot, self.num_classes * self.size)
        for level in self.levels:
            self.get_buffer(f"teacher_{level}").index_copy_(0, slot, teacher[level])
            self.get_buffer(f"student_{level}").index_copy_(0, slot, student[level])
        self.boxes.index_copy_(0, slot, boxes)
        self.iterations.index_fill_(0, slot, iteration)
        self.iterations[-1:].fill_(-1)
        self.counts += mine.sum(dim=0).clamp_max(self.size)

    def clear(self) -> None:
        """Forget every instance."""
        self.iterations.fill_(-1)

    def features(self, since: int) -> PairedFeatures:
        """The instances stored at iteration `since` or later, class by class, on the CPU.

        Images and annotations are not known: their ids are -1.
        """
        rows = (self.iterations >= max(since, 0)).nonzero().squeeze(1)
        unknown = torch.full((len(rows),), -1)

        def stored(space):
            return {n: self.get_buffer(f"{space}_{n}")[rows].cpu() for n in self.levels}

        return PairedFeatures(
            teacher=stored("teacher"),
            student=stored("student"),
            classes=(rows // self.size).cpu(),
            image_ids=unknown,
            boxes=self.boxes[rows].cpu(),
            annotation_ids=unknown,
        )
