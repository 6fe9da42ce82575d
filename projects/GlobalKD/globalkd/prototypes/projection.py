"""The prototypes of a level and the projection of instance features onto them (Sec. 3.2).

What depends on the prototypes alone is computed when they change: a training step costs one
normalisation and P inner products an instance and space. Not here: reliability, files
(`bank`) and the maths of the operator (`sparse_coding`).

Shapes: R instances, K classes, P prototypes a class, D_t and D_s channels.
"""

from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .sparse_coding import projection_operator, unit_rows


class Projection(nn.Module):
    """What projecting onto prototypes needs of them, computed when they change. Nothing is saved.

    Of one level, or of L levels of the same widths stacked: then features, classes apart, and
    results have a leading L, too.

    Attributes:
        valid: (..., K, P) bool, which slots hold a prototype.
        unit_teacher: (..., K, P, D_t) float32 of unit length, 0 in slots without a prototype.
        unit_student: (..., K, P, D_s), likewise.
        operator: (2, ..., K, P, D_t + D_s), from a stacked feature to w_t and w_s of Eq. (5);
            empty where `by_pursuit` is not called.
        disagreement: (..., K, P, D_t + D_s), from a stacked feature of two unit vectors to
            (1 + 2 lambda) (w_t - w_s) of Eq. (5) with prototypes of unit length.
    """

    #: Names of the buffers that stack along a new first dimension.
    BY_LEVEL = ("valid", "unit_teacher", "unit_student", "disagreement")

    def __init__(self, *, normalize: bool):
        """
        Args:
            normalize: `by_pursuit` works on features and prototypes of unit length.
        """
        super().__init__()
        self.normalize = normalize
        for name in (*self.BY_LEVEL, "operator"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    @staticmethod
    def stack(levels: Sequence["Projection"]) -> "Projection":
        """Levels of equal widths as one."""
        joint = Projection(normalize=levels[0].normalize)
        for name in Projection.BY_LEVEL:
            setattr(joint, name, torch.stack([getattr(x, name) for x in levels]))
        joint.operator = torch.stack([x.operator for x in levels], dim=1)
        return joint

    def by_cosine(
        self, teacher: Tensor, student: Tensor, classes: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Cosine with each prototype, each space on its own.

        Args:
            teacher: (..., R, D_t) float32 features.
            student: (..., R, D_s) float32 features.
            classes: (R,) the class whose prototypes each instance is projected onto; None for all
                (of a single level).

        Returns:
            (w_t, w_s), each (..., R, P), or (R, K, P) for all classes; 0 in slots without a
            prototype.
        """
        return (
            _products(unit_rows(teacher), self.unit_teacher.float(), classes),
            _products(unit_rows(student), self.unit_student.float(), classes),
        )

    def by_pursuit(
        self, teacher: Tensor, student: Tensor, classes: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Eq. (5), prototype after prototype on the residual, the spaces coupled.

        As `by_cosine`; w_t carries no gradient.
        """
        if self.normalize:
            teacher, student = unit_rows(teacher), unit_rows(student)
        both = torch.cat([teacher, student], dim=-1)
        to_teacher, to_student = self.operator.float()
        return _products(both.detach(), to_teacher, classes), _products(both, to_student, classes)

    def disagree(self, teacher: Tensor, student: Tensor, classes: Tensor) -> Tensor:
        """(1 + 2 lambda) (w_t - w_s) of Eq. (5) on unit vectors, whatever `normalize` says.

        For unit vectors Eq. (5) shrinks the difference of the first coefficients by 1 + 2 lambda,
        which this undoes. Unlike a difference of `by_pursuit` it keeps its digits where lambda is
        large.

        Args:
            teacher, student, classes: see `by_cosine`.

        Returns:
            (..., R, P); 0 in slots without a prototype.
        """
        both = torch.cat([unit_rows(teacher), unit_rows(student)], dim=-1)
        return _products(both, self.disagreement.float(), classes)


class LevelPrototypes(nn.Module):
    """Buffers with the prototypes of one level.

    Attributes:
        teacher_prototypes: (K, P, D_t) float32, raw.
        student_prototypes: (K, P, D_s), likewise.
        valid: (K, P) bool, which slots hold a prototype.
        projection: what follows from them.
    """

    def __init__(
        self,
        shape: Tuple[int, int],
        widths: Tuple[int, int],
        *,
        lam: float,
        normalize: bool,
        pursuit: bool,
    ):
        """
        Args:
            shape: (K, P).
            widths: (D_t, D_s).
            lam: lambda of Eq. (5) in `by_pursuit` and in `disagree`.
            normalize: see `Projection`.
            pursuit: whether `by_pursuit` is to be called; its operator takes memory.
        """
        super().__init__()
        self.lam = lam
        self.pursuit = pursuit
        self.register_buffer("teacher_prototypes", torch.zeros(*shape, widths[0]))
        self.register_buffer("student_prototypes", torch.zeros(*shape, widths[1]))
        self.register_buffer("valid", torch.zeros(shape, dtype=torch.bool))
        self.projection = Projection(normalize=normalize)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute what follows from the prototypes; to call after they changed."""
        raw = [
            x.double().masked_fill(~self.valid[..., None], 0)
            for x in (self.teacher_prototypes, self.student_prototypes)
        ]
        unit = [unit_rows(x) for x in raw]
        derived = self.projection
        derived.valid = self.valid
        derived.unit_teacher, derived.unit_student = (x.float() for x in unit)
        of_unit = self._operator(unit)
        if self.pursuit:
            derived.operator = (of_unit if derived.normalize else self._operator(raw)).float()
        derived.disagreement = ((1 + 2 * self.lam) * (of_unit[0] - of_unit[1])).float()

    def _operator(self, atoms: Sequence[Tensor]) -> Tensor:
        return projection_operator(*atoms, self.valid, self.lam).transpose(0, 1)


def _products(vectors: Tensor, atoms: Tensor, classes: Optional[Tensor]) -> Tensor:
    """(R, D) with (K, P, D) -> (R, K, P), or with the atoms of `classes` alone -> (R, P)."""
    if classes is None:
        return (vectors @ atoms.flatten(0, 1).T).unflatten(1, atoms.shape[:2])
    products = products_by_row if vectors.is_cuda or atoms.dim() > 3 else products_by_class
    return products(vectors, atoms, classes)


def products_by_row(vectors: Tensor, atoms: Tensor, classes: Tensor) -> Tensor:
    """Each row with a copy of its class's atoms.

    (..., R, D) with (..., K, P, D) and (R,) classes -> (..., R, P).
    """
    return (atoms.index_select(-3, classes) @ vectors[..., None]).squeeze(-1)


def products_by_class(vectors: Tensor, atoms: Tensor, classes: Tensor) -> Tensor:
    """The same from one matrix product with the atoms of all classes that occur.

    A third of the time on a CPU. A GPU would have to be waited for: which classes occur?
    """
    present, own = classes.unique(return_inverse=True)
    products = _products(vectors, atoms[present], None)
    return products.take_along_dim(own[:, None, None], dim=1).squeeze(1)
