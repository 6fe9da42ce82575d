"""The prototypes of one level and the projection of instance features onto them (Sec. 3.2).

What depends on the prototypes alone is computed when they change: a training step costs one
normalisation and P inner products an instance and space. Not here: reliability, files
(`bank`) and the maths of the operator (`sparse_coding`).

Shapes: R instances, K classes, P prototypes a class, D_t and D_s channels.
"""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

from .sparse_coding import projection_operator, unit_rows


class LevelPrototypes(nn.Module):
    """Buffers with the prototypes of one level, and (not persistent) what follows from them.

    Attributes:
        teacher_prototypes: (K, P, D_t) float32, raw.
        student_prototypes: (K, P, D_s), likewise.
        valid: (K, P) bool, which slots hold a prototype.
    """

    def __init__(
        self,
        shape: Tuple[int, int],
        widths: Tuple[int, int],
        *,
        lam: float,
        normalize: bool,
    ):
        """
        Args:
            shape: (K, P).
            widths: (D_t, D_s).
            lam: lambda of Eq. (5) in `by_pursuit`.
            normalize: `by_pursuit` works on features and prototypes of unit length.
        """
        super().__init__()
        self.lam = lam
        self.normalize = normalize
        self.register_buffer("teacher_prototypes", torch.zeros(*shape, widths[0]))
        self.register_buffer("student_prototypes", torch.zeros(*shape, widths[1]))
        self.register_buffer("valid", torch.zeros(shape, dtype=torch.bool))
        for name in ("unit_teacher", "unit_student", "operator"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute what follows from the prototypes; to call after they changed."""
        raw = [
            x.double().masked_fill(~self.valid[..., None], 0)
            for x in (self.teacher_prototypes, self.student_prototypes)
        ]
        unit = [unit_rows(x) for x in raw]
        self.unit_teacher, self.unit_student = (x.float() for x in unit)
        atoms = unit if self.normalize else raw
        operator = projection_operator(*atoms, self.valid, self.lam)
        self.operator = operator.transpose(0, 1).float()  # (2, K, P, D_t + D_s)

    def by_cosine(
        self, teacher: Tensor, student: Tensor, classes: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Cosine with each prototype, each space on its own.

        Args:
            teacher: (R, D_t) float32 features.
            student: (R, D_s) float32 features.
            classes: (R,) the class whose prototypes each instance is projected onto; None for all.

        Returns:
            (w_t, w_s), each (R, P), or (R, K, P) for all classes; 0 in slots without a prototype.
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
        both = torch.cat([teacher, student], dim=1)
        to_teacher, to_student = self.operator.float()
        return _products(both.detach(), to_teacher, classes), _products(both, to_student, classes)


def _products(vectors: Tensor, atoms: Tensor, classes: Optional[Tensor]) -> Tensor:
    """(R, D) with (K, P, D) -> (R, K, P), or with the atoms of `classes` alone -> (R, P)."""
    if classes is None:
        return (vectors @ atoms.flatten(0, 1).T).unflatten(1, atoms.shape[:2])
    products = products_by_row if vectors.is_cuda else products_by_class
    return products(vectors, atoms, classes)


def products_by_row(vectors: Tensor, atoms: Tensor, classes: Tensor) -> Tensor:
    """Each row with a copy of its class's atoms: (R, D), (K, P, D), (R,) -> (R, P)."""
    return (atoms[classes] @ vectors[:, :, None]).squeeze(2)


def products_by_class(vectors: Tensor, atoms: Tensor, classes: Tensor) -> Tensor:
    """The same from one matrix product with the atoms of all classes that occur.

    A third of the time on a CPU. A GPU would have to be waited for: which classes occur?
    """
    present, own = classes.unique(return_inverse=True)
    products = _products(vectors, atoms[present], None)
    return products.take_along_dim(own[:, None, None], dim=1).squeeze(1)
