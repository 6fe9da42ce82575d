"""Coupled matching pursuit in two feature spaces: the maths of GlobalKD's Eq. (2) to (5).

Pure functions on tensors of any device. Not here: classes, levels, normalisation settings
(`generation`) and what a training step needs (`bank`).

Shapes: R instances, P atoms (prototypes of one class), D_t and D_s channels in the teacher's and
the student's space, D = D_t + D_s. An atom is one instance in both spaces, (p_t, p_s).

How `select_atoms` avoids residuals: write the residuals side by side as R = [R_t R_s] (rows are
instances) and an atom as the D x 2 matrix E = diag(p_t, p_s). Then [u v] = R E, and Eq. (5) is
[w_t w_s] = R E A with a symmetric 2 x 2 matrix A of the atom alone. The gain of the atom is the
sum of the entries of A * Q with Q = E' M E and M = R' R. Taking the atom turns R into R - R E A E',
hence, with S = A Q A and H = M E A - E S / 2,

    M  becomes  M - H E' - E H'
    Q_i  of candidate i  becomes  Q_i - X Y - Y X',     X = E_i' H,  Y = E_i' E (diagonal),

where X and Y need one tall matrix product a space with the original features. A symmetric Q is kept
as its three entries (tt, ts, ss).
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
    chunk_size: int = 1024,
) -> Tuple[Tensor, Tensor]:
    """Choose atoms among the instances by greedy descent on Eq. (2).

    Exact, in O(R D^2 + P R D) time; beyond the features it holds O(D^2 + R + chunk_size D) numbers.
    All sums are in float64, so that the picks are those of the direct O(R^2 D) method there.

    Features may lie in a memory-mapped file (`torch.from_file`, or `torch.from_numpy` of a
    `numpy.memmap`): they are read front to back, P + 1 times, a chunk at a time.

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
    forms, weights, free = _score(chunks, moment, lam)
    if candidates is not None:
        free &= candidates
    tolerance = TIE * moment.trace()

    indices: List[int] = []
    gains = []
    num_atoms = min(num_atoms, int(free.sum()))
    while len(indices) < num_atoms:
        gain = (weights * forms).sum(dim=1).masked_fill_(~free, float("-inf"))
        pick = int((gain >= gain.max() - tolerance).nonzero()[0])
        indices.append(pick)
        gains.append(gain[pick].clamp_min(0))
        free[pick] = False
        if len(indices) < num_atoms:
            atom = torch.block_diag(teacher[pick, :, None], student[pick, :, None]).double()
            step = _step(moment, atom, lam)
            moment.addmm_(step, atom.T, alpha=-1).addmm_(atom, step.T, alpha=-1)
            _deflate_forms(forms, chunks, atom, step)
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
    """Iterates over (rows, teacher, student): a few rows at a time, in float64.

    What it yields is overwritten by the next step: fresh memory for each chunk would cost as much
    time as a product with it.
    """

    def __init__(self, teacher: Tensor, student: Tensor, size: int):
        self.teacher, self.student = teacher, student
        self.size = min(size, max(1, len(teacher)))

    def __iter__(self) -> Iterator[Tuple[slice, Tensor, Tensor]]:
        sources = self.teacher, self.student
        buffers = [x.new_empty(self.size, x.shape[1], dtype=torch.float64) for x in sources]
        for start in range(0, len(self.teacher), self.size):
            rows = slice(start, start + self.size)
            t, s = (b[: len(x[rows])].copy_(x[rows]) for b, x in zip(buffers, sources))
            yield rows, t, s


def _second_moment(chunks: _Chunks) -> Tensor:
    """M = [F_t F_s]' [F_t F_s], (D, D)."""
    split = chunks.teacher.shape[1]
    width = split + chunks.student.shape[1]
    moment = torch.zeros(width, width, dtype=torch.float64, device=chunks.teacher.device)
    for _, t, s in chunks:
        moment[:split, :split].addmm_(t.T, t)
        moment[:split, split:].addmm_(t.T, s)
        moment[split:, split:].addmm_(s.T, s)
    moment[split:, :split] = moment[:split, split:].T
    finite = moment.diagonal().isfinite()
    for name, x, part in (
        ("teacher", chunks.teacher, finite[:split]),
        ("student", chunks.student, finite[split:]),
    ):
        if not part.all():
            bad = sum(int((~rows.isfinite().all(dim=1)).sum()) for rows in x.split(chunks.size))
            raise ValueError(
                f"The {name} features are NaN, infinite or too large to square in {bad} of "
                f"{len(x)} rows; they must be finite."
            )
    return moment


def _score(chunks: _Chunks, moment: Tensor, lam: float) -> Tuple[Tensor, Tensor, Tensor]:
    """What the gain of every row is made of: gain = (weights * forms).sum(dim=1).

    Returns:
        forms: (R, 3), the entries tt, ts and ss of Q_i = E_i' M E_i.
        weights: (R, 3), the entries tt, twice ts, and ss of A.
        nonzero: (R,) bool, whether the row is a nonzero vector in both spaces.
    """
    count, split = chunks.teacher.shape
    forms, weights = moment.new_zeros(count, 3), moment.new_zeros(count, 3)
    nonzero = torch.zeros(count, dtype=torch.bool, device=moment.device)
    for rows, t, s in chunks:
        forms[rows, 0] = (t @ moment[:split, :split]).mul_(t).sum(dim=1)
        forms[rows, 1] = (t @ moment[:split, split:]).mul_(s).sum(dim=1)
        forms[rows, 2] = (s @ moment[split:, split:]).mul_(s).sum(dim=1)
        n_t, n_s = t.square().sum(dim=1), s.square().sum(dim=1)
        mixing = _mixing(n_t, n_s, lam)
        weights[rows, 0], weights[rows, 2] = mixing[:, 0, 0], mixing[:, 1, 1]
        weights[rows, 1] = 2 * mixing[:, 0, 1]
        nonzero[rows] = (n_t > 0) & (n_s > 0)
    return forms, weights, nonzero


def _mixing(n_t: Tensor, n_s: Tensor, lam: float) -> Tensor:
    """The symmetric matrix A of Eq. (5) with [w_t w_s] = [u v] A, (R,), (R,) -> (R, 2, 2)."""
    one, zero = torch.ones_like(n_t), torch.zeros_like(n_t)
    of_u = pair_coefficients(one, zero, n_t, n_s, lam)
    of_v = pair_coefficients(zero, one, n_t, n_s, lam)
    return torch.stack([torch.stack(of_u, dim=-1), torch.stack(of_v, dim=-1)], dim=-2)


def _step(moment: Tensor, atom: Tensor, lam: float) -> Tensor:
    """H = M E A - E S / 2 of an atom E, (D, 2)."""
    n_t, n_s = atom.square().sum(dim=0)
    mixing = _mixing(n_t, n_s, lam)
    step = moment @ atom @ mixing  # M E A
    overlap = mixing @ atom.T @ step  # S = A E' M E A
    return step - atom @ overlap / 2


def _deflate_forms(forms: Tensor, chunks: _Chunks, atom: Tensor, step: Tensor) -> None:
    """Update every Q_i in place for a taken atom; see the module's docstring."""
    split = chunks.teacher.shape[1]
    in_t = torch.cat([atom[:split, :1], step[:split]], dim=1)  # (D_t, 3)
    in_s = torch.cat([atom[split:, 1:], step[split:]], dim=1)
    for rows, t, s in chunks:
        y_t, x_tt, x_ts = (t @ in_t).unbind(dim=1)
        y_s, x_st, x_ss = (s @ in_s).unbind(dim=1)
        change = torch.stack([2 * x_tt * y_t, x_ts * y_s + x_st * y_t, 2 * x_ss * y_s], dim=1)
        forms[rows] -= change
