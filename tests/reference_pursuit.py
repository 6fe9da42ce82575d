"""The direct method of Eq. (2) to (5), the reference of the tests: residuals, no shortcut.

Every candidate is tried on every instance, the 2 x 2 system of each pair is solved numerically and
the objective is evaluated as printed, in float64: O(R^2 D) a pick.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor


class Pursuit(NamedTuple):
    indices: List[int]
    gains: Tensor  # (P,) decrease of the objective of Eq. (2) by each pick
    errors: Tensor  # (P + 1,) |R_t|^2 + |R_s|^2 before each pick and after the last


def solve_pair(r_t: Tensor, r_s: Tensor, p_t: Tensor, p_s: Tensor, lam: float):
    """argmin of Eq. (4) for every row: the zero of its two derivatives. (R,), (R,)."""
    system = torch.stack(
        [
            torch.stack([p_t @ p_t + lam, torch.as_tensor(-lam, dtype=p_t.dtype)]),
            torch.stack([torch.as_tensor(-lam, dtype=p_t.dtype), p_s @ p_s + lam]),
        ]
    )
    w_t, w_s = torch.linalg.solve(system, torch.stack([r_t @ p_t, r_s @ p_s]))
    return w_t, w_s


def objective(r_t: Tensor, r_s: Tensor, w_t: Tensor, w_s: Tensor, lam: float) -> Tensor:
    """Eq. (4) with the residuals after the pick."""
    return r_t.square().sum() + r_s.square().sum() + lam * (w_t - w_s).square().sum()


def direct_pursuit(
    teacher: Tensor,
    student: Tensor,
    num_atoms: int,
    lam: float,
    candidates: Optional[Tensor] = None,
) -> Pursuit:
    """Greedy minimisation of Eq. (2); among equal candidates the first row."""
    r_t, r_s = teacher.double().clone(), student.double().clone()
    atoms_t, atoms_s = r_t.clone(), r_s.clone()
    energy = r_t.square().sum() + r_s.square().sum()
    open_rows = [
        i
        for i in range(len(r_t))
        if atoms_t[i].any() and atoms_s[i].any() and (candidates is None or candidates[i])
    ]
    indices, gains, errors = [], [], [energy]
    while open_rows and len(indices) < num_atoms:
        gain = []
        for i in open_rows:
            p_t, p_s = atoms_t[i], atoms_s[i]
            w_t, w_s = solve_pair(r_t, r_s, p_t, p_s, lam)
            after = objective(r_t - w_t[:, None] * p_t, r_s - w_s[:, None] * p_s, w_t, w_s, lam)
            gain.append(errors[-1] - after)
        gain = torch.stack(gain)
        best = int((gain >= gain.max() - 1e-12 * energy).nonzero()[0])
        pick = open_rows.pop(best)
        w_t, w_s = solve_pair(r_t, r_s, atoms_t[pick], atoms_s[pick], lam)
        r_t = r_t - w_t[:, None] * atoms_t[pick]
        r_s = r_s - w_s[:, None] * atoms_s[pick]
        indices.append(pick)
        gains.append(gain[best])
        errors.append(r_t.square().sum() + r_s.square().sum())
    return Pursuit(
        indices, torch.stack(gains) if gains else energy.new_zeros(0), torch.stack(errors)
    )


def sequential_coefficients(
    teacher: Tensor, student: Tensor, teacher_atoms: Tensor, student_atoms: Tensor, lam: float
) -> Tuple[Tensor, Tensor]:
    """Coefficients of each row by going through the atoms one by one; (R, P), (R, P)."""
    r_t, r_s = teacher.double(), student.double()
    coefficients = []
    for p_t, p_s in zip(teacher_atoms.double(), student_atoms.double()):
        w_t, w_s = solve_pair(r_t, r_s, p_t, p_s, lam)
        r_t, r_s = r_t - w_t[:, None] * p_t, r_s - w_s[:, None] * p_s
        coefficients.append(torch.stack([w_t, w_s]))
    return tuple(torch.stack(coefficients, dim=-1))
