"""Coupled matching pursuit in two feature spaces: the maths of GlobalKD's Eq. (2) to (5).

Pure functions on tensors of any device. Not here: classes, levels, normalisation settings
(`prototype_generation`) and what a training step needs (`prototype_bank`).

Shapes: R instances, P atoms (prototypes of one class), D_t and D_s channels in the teacher's and
the student's space, D = D_t + D_s. An atom is one instance in both spaces, (p_t, p_s).

How `select_atoms` avoids residuals: write the residuals side by side as R = [R_t R_s] (rows are
instances) and an atom as the D x 2 matrix E = diag(p_t, p_s). Then [u v] = R E, and Eq. (5) is
[w_t w_s] = R E A with a symmetric 2 x 2 matrix A of the atom alone. The gain of the atom is the
sum of the entries of A * Q with Q = E' M E and M = R' R. Taking the atom turns R into R - R E A E',
hence, with H = M E A and S = A Q A,

    M  becomes  M - H E' - E H' + E S E'
    Q_i  of candidate i  becomes  Q_i - X Y - Y X' + Y S Y,     X = E_i' H,  Y = E_i' E (diagonal),

where X and Y need one tall matrix product a space with the original features.
"""

from typing import Iterator, List, Optional, Tuple

import torch
from torch import Tensor

#: Gains that differ by less than this share of the total energy are a tie: the first row wins.
TIE = 1e-12


def unit_rows(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale the last dimension to unit length; vectors shorter than `eps` become zero.

    The gradient of those is zero too, so that an empty feature cannot send a huge one back.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > eps, x / norm.clamp_min(eps), torch.zeros_like(x))


def pair_coefficients(
    u: Tensor, v: Tensor, n_t: Tensor, n_s: Tensor, lam: float
) -> Tuple[Tensor, Tensor]:
    """Coefficients of instances on one atom in both spaces, Eq. (5) in closed form.

    They minimise |r_t - w_t p_t|^2 + |r_s - w_s p_s|^2 + lam (w_t - w_s)^2.

    Args:
        u: inner products <r_t, p_t>.
        v: inner products <r_s, p_s>.
        n_t: squared norm of p_t; broadcasts with `u`.
        n_s: squared norm of p_s.
        lam: weight of the agreement, >= 0.

    Returns:
        (w_t, w_s), each of the broadcast shape; 0 where the atom is the zero vector in both spaces
        (with lam = 0: in either).
    """
    determinant = n_t * n_s + lam * (n_t + n_s)
    scale = 1.0 / determinant.masked_fill(determinant <= 0, float("inf"))
    w_t = ((n_s + lam) * u + lam * v) * scale
    w_s = ((n_t + lam) * v + lam * u) * scale
    return w_t, w_s


@torch.no_grad()
def select_atoms(
    teacher: Tensor,
    student: Tensor,
    num_atoms: int,
    lam: float,
    *,
    candidates: Optional[Tensor] = None,
    chunk_size: int = 16384,
) -> Tuple[Tensor, Tensor]:
    """Choose atoms among the instances by greedy descent on Eq. (2).

    Exact, in O(R D^2 + P R D) time; beyond the features it holds O(D^2 + R + chunk_size D) numbers.
    All sums are in float64, so that the picks are those of the direct O(R^2 D) method there.

    Args:
        teacher: (R, D_t) features, any float dtype.
        student: (R, D_s) features, same rows and device.
        num_atoms: the most atoms to choose.
        lam: weight of the agreement between the two spaces, lambda of Eq. (2).
        candidates: (R,) bool, the rows that may be chosen; all rows count as instances. An instance
            that is the zero vector in either space is never chosen.
        chunk_size: rows converted to float64 at a time. It does not change the picks.

    Returns:
        indices: (<= num_atoms,) int64 distinct rows in order of choice; fewer where there are fewer
            candidates, none for R = 0.
        gains: float64, same length, by how much each pick lowered the objective of Eq. (2).

    Raises:
        ValueError: features that are not finite.
    """
    assert len(teacher) == len(student), (teacher.shape, student.shape)
    chunks = _Chunks(teacher, student, chunk_size)
    moment = _second_moment(chunks)
    forms, norms = _quadratic_forms(chunks, moment)
    mixing = _mixing(norms[:, 0], norms[:, 1], lam)
    free = (norms > 0).all(dim=1)
    if candidates is not None:
        free &= candidates
    tolerance = TIE * moment.trace()

    indices: List[int] = []
    gains = []
    for _ in range(min(num_atoms, int(free.sum()))):
        gain = (mixing * forms).sum(dim=(1, 2)).masked_fill(~free, float("-inf"))
        pick = int((gain >= gain.max() - tolerance).nonzero()[0])
        indices.append(pick)
        gains.append(gain[pick].clamp_min(0))
        free[pick] = False
        atom = torch.block_diag(teacher[pick, :, None].double(), student[pick, :, None].double())
        step = moment @ atom @ mixing[pick]  # H
        overlap = mixing[pick] @ forms[pick] @ mixing[pick]  # S
        _deflate_forms(forms, chunks, atom, step, overlap)
        moment += atom @ overlap @ atom.T - step @ atom.T - atom @ step.T
    picks = torch.tensor(indices, dtype=torch.int64, device=teacher.device)
    return picks, torch.stack(gains) if gains else moment.new_zeros(0)


@torch.no_grad()
def projection_operator(
    teacher_atoms: Tensor, student_atoms: Tensor, valid: Tensor, lam: float
) -> Tensor:
    """The linear map from a stacked feature [f_t; f_s] to its pursuit coefficients.

    Eq. (5) applied atom after atom to the residual, in the order given. No gradient.

    Args:
        teacher_atoms: (..., P, D_t); the leading dimensions (classes) are independent problems.
        student_atoms: (..., P, D_s), same dtype.
        valid: (..., P) bool.
        lam: weight of the agreement between the two spaces.

    Returns:
        (..., 2, P, D_t + D_s): `operator[..., 0, :, :] @ [f_t; f_s]` are the coefficients w_t,
        `operator[..., 1, :, :] @ [f_t; f_s]` are w_s. Zero rows for atoms that are not valid.
    """
    p_t = teacher_atoms.masked_fill(~valid[..., None], 0)
    p_s = student_atoms.masked_fill(~valid[..., None], 0)
    gram = torch.stack([p_t @ p_t.mT, p_s @ p_s.mT], dim=-3)  # (..., 2, P, P)
    basis = torch.stack(
        [
            torch.cat([p_t, torch.zeros_like(p_s)], dim=-1),
            torch.cat([torch.zeros_like(p_t), p_s], dim=-1),
        ],
        dim=-3,
    )
    operator = torch.zeros_like(basis)
    for k in range(valid.shape[-1]):
        # The map to (<r_t, p_t>, <r_s, p_s>); rows of `operator` from k on are still zero.
        earlier = gram[..., k].unsqueeze(-2) @ operator
        inner = basis[..., k, :] - earlier.squeeze(-2)  # (..., 2, D)
        norms = gram[..., k, k].unsqueeze(-1)  # (..., 2, 1)
        w_t, w_s = pair_coefficients(
            inner[..., 0, :], inner[..., 1, :], norms[..., 0, :], norms[..., 1, :], lam
        )
        operator[..., 0, k, :] = w_t
        operator[..., 1, k, :] = w_s
    return operator


class _Chunks:
    """Iterates over (rows, teacher, student): a few rows at a time, in float64."""

    def __init__(self, teacher: Tensor, student: Tensor, size: int):
        self.teacher, self.student, self.size = teacher, student, size

    def __iter__(self) -> Iterator[Tuple[slice, Tensor, Tensor]]:
        for start in range(0, len(self.teacher), self.size):
            rows = slice(start, start + self.size)
            yield rows, self.teacher[rows].double(), self.student[rows].double()


def _second_moment(chunks: _Chunks) -> Tensor:
    """M = [F_t F_s]' [F_t F_s], (D, D)."""
    split = chunks.teacher.shape[1]
    width = split + chunks.student.shape[1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=chunks.teacher.device)
    for _, t, s in chunks:
        both = torch.cat([t, s], dim=1)
        moment.addmm_(both.T, both)
    finite = moment.diagonal().isfinite()
    for name, x, part in (
        ("teacher", chunks.teacher, finite[:split]),
        ("student", chunks.student, finite[split:]),
    ):
        if not part.all():
            bad = int((~x.isfinite().all(dim=1)).sum())
            raise ValueError(
                f"The {name} features are NaN, infinite or too large to square in {bad} of "
                f"{len(x)} rows; they must be finite."
            )
    return moment


def _quadratic_forms(chunks: _Chunks, moment: Tensor) -> Tuple[Tensor, Tensor]:
    """Q_i = E_i' M E_i of every row, (R, 2, 2), and squared norms in both spaces, (R, 2)."""
    count, split = chunks.teacher.shape
    forms = moment.new_zeros(count, 2, 2)
    norms = moment.new_zeros(count, 2)
    for rows, t, s in chunks:
        forms[rows, 0, 0] = ((t @ moment[:split, :split]) * t).sum(dim=1)
        cross = ((t @ moment[:split, split:]) * s).sum(dim=1)
        forms[rows, 0, 1] = cross
        forms[rows, 1, 0] = cross
        forms[rows, 1, 1] = ((s @ moment[split:, split:]) * s).sum(dim=1)
        norms[rows, 0] = t.square().sum(dim=1)
        norms[rows, 1] = s.square().sum(dim=1)
    return forms, norms


def _mixing(n_t: Tensor, n_s: Tensor, lam: float) -> Tensor:
    """The matrix A of Eq. (5) with [w_t w_s] = [u v] A, (R, 2, 2)."""
    one, zero = torch.ones_like(n_t), torch.zeros_like(n_t)
    of_u = pair_coefficients(one, zero, n_t, n_s, lam)
    of_v = pair_coefficients(zero, one, n_t, n_s, lam)
    return torch.stack([torch.stack(of_u, dim=-1), torch.stack(of_v, dim=-1)], dim=-2)


def _deflate_forms(
    forms: Tensor, chunks: _Chunks, atom: Tensor, step: Tensor, overlap: Tensor
) -> None:
    """Update every Q_i in place for a taken atom; see the module's docstring."""
    split = chunks.teacher.shape[1]
    left = torch.cat([atom[:split, :1], step[:split]], dim=1)  # (D_t, 3)
    right = torch.cat([atom[split:, 1:], step[split:]], dim=1)
    for rows, t, s in chunks:
        both = torch.stack([t @ left, s @ right], dim=1)  # (rows, 2, 3)
        y, x = both[..., 0], both[..., 1:]
        cross = x * y[:, None, :]
        forms[rows] += y[:, :, None] * overlap * y[:, None, :] - cross - cross.mT
