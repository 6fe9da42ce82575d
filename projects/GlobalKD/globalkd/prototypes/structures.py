"""The data that moves between extraction, prototype generation and the bank.

Shapes: R instances, D_t and D_s channels of one instance feature in the teacher's and the
student's space, L levels. Row i means the same instance in every tensor of a container.
"""

from dataclasses import dataclass
from typing import Dict, Sequence, Union

from torch import Tensor


@dataclass
class PairedFeatures:
    """Instance features in both spaces, aligned row by row.

    Attributes:
        teacher: level name -> (R, D_t) float tensor, raw (not normalised).
        student: level name -> (R, D_s) float tensor, raw. Same keys as `teacher`: the student's
            level names.
        classes: (R,) int64, contiguous class ids in [0, num_classes).
        image_ids: (R,) int64, the position of the instance's image in the dataset's list of dicts.
        boxes: (R, 4) float, XYXY_ABS in pixels of the original image.
        annotation_ids: (R,) int64, the position of the annotation in its image's "annotations".
    """

    teacher: Dict[str, Tensor]
    student: Dict[str, Tensor]
    classes: Tensor
    image_ids: Tensor
    boxes: Tensor
    annotation_ids: Tensor

    def __post_init__(self):
        assert list(self.teacher) == list(self.student), (list(self.teacher), list(self.student))
        rows = {len(t) for t in [*self.teacher.values(), *self.student.values(), self.classes]}
        rows |= {len(self.image_ids), len(self.boxes), len(self.annotation_ids)}
        assert len(rows) == 1, f"rows do not align: {rows}"

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def levels(self) -> Sequence[str]:
        return list(self.teacher)

    def select(self, rows: Union[Tensor, slice]) -> "PairedFeatures":
        """The given rows (index, bool mask, or a slice: without a copy), in the given order."""
        return PairedFeatures(
            teacher={level: x[rows] for level, x in self.teacher.items()},
            student={level: x[rows] for level, x in self.student.items()},
            classes=self.classes[rows],
            image_ids=self.image_ids[rows],
            boxes=self.boxes[rows],
            annotation_ids=self.annotation_ids[rows],
        )

    def write(self, start: int, part: "PairedFeatures") -> None:
        """Copy the rows of `part` over those from `start` on."""
        rows = slice(start, start + len(part))
        for level in self.levels:
            self.teacher[level][rows] = part.teacher[level]
            self.student[level][rows] = part.student[level]
        for name in ("classes", "image_ids", "boxes", "annotation_ids"):
            getattr(self, name)[rows] = getattr(part, name)


@dataclass
class PrototypeSet:
    """What a generator chose: P prototypes for each of K classes, on each level.

    Attributes:
        teacher: level name -> (K, P, D_t) raw teacher features of the chosen instances; zero rows
            where `valid` is False.
        student: level name -> (K, P, D_s), likewise.
        valid: level name -> (K, P) bool. A class with fewer instances than P fills its first slots.
        rows: level name -> (K, P) int64, the chosen rows of the PairedFeatures; -1 where not valid.
        gain: level name -> (K, P) float, by how much each pick lowered the objective of Eq. 2, as
            a share of the class's total energy |F_t|^2 + |F_s|^2; 0 where not valid or not defined.
        counts: (K,) int64, the instances of each class that took part.
    """

    teacher: Dict[str, Tensor]
    student: Dict[str, Tensor]
    valid: Dict[str, Tensor]
    rows: Dict[str, Tensor]
    gain: Dict[str, Tensor]
    counts: Tensor
