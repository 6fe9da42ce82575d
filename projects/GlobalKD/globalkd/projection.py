"""The prototypes of one level and the projection of instance features onto them (Sec. 3.2).

What depends on the prototypes alone is computed when they change, so that a training step costs one
normalisation and one matrix product a space. Not here: classes of instances, reliability, files
(`prototype_bank`) and the maths of the operator (`sparse_coding`).

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
        lam: Optional[float],
        normalize: bool,
    ):
        """
        Args:
            shape: (K, P).
            widths: (D_t, D_s).
            lam: lambda of Eq. (5) in `by_pursuit`; None where that is not used.
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
        self.unit_teacher, self.unit_student = (x.flatten(0, 1).float() for x in unit)
        if self.lam is not None:
            atoms = unit if self.normalize else raw
            operator = projection_operator(*atoms, self.valid, self.lam)
            self.operator = operator.transpose(0, 1).flatten(1, 2).float()  # (2, K P, D_t + D_s)

    def by_cosine(self, teacher: Tensor, student: Tensor) -> Tuple[Tensor, Tensor]:
        """Cosine with each prototype, each space on its own.

        Args:
            teacher: (R, D_t) float32 features.
            student: (R, D_s) float32 features.

        Returns:
            (w_t, w_s), each (R, K * P); 0 in slots without a prototype.
        """
        return (
            unit_rows(teacher) @ self.unit_teacher.float().T,
            unit_rows(student) @ self.unit_student.float().T,
        )

    def by_pursuit(self, teacher: Tensor, student: Tensor) -> Tuple[Tensor, Tensor]:
        """Eq. (5), prototype after prototype on the residual, the spaces coupled.

        As `by_cosine`; w_t carries no gradient.
        """
        if self.normalize:
            teacher, student = unit_rows(teacher), unit_rows(student)
        both = torch.cat([teacher, student], dim=1)
        to_teacher, to_student = self.operator.float()
        return both.detach() @ to_teacher.T, both @ to_student.T
