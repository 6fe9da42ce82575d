"""How much of a feature the span of some prototypes explains."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: A prototype closer to the span of the earlier ones, as a share of its length, adds nothing.
DEPENDENT = 1e-6


@torch.no_grad()
def explained_shares(x: Tensor, atoms: Tensor) -> Tensor:
    """Share of each row's squared length that lies in the span of the first k atoms, k = 1 to P.

    The best that any coefficients on these atoms can do. Lengths of atoms do not matter.

    Args:
        x: (R, D) features.
        atoms: (P, D) prototypes, in order.

    Returns:
        (R, P) float64 in [0, 1], not falling along P; 0 for a zero row.
    """
    x, atoms = x.double(), normalize(atoms.double(), dim=1)
    basis = torch.zeros_like(atoms)
    for k, atom in enumerate(atoms):  # Gram-Schmidt
        rest = atom - basis[:k].T @ (basis[:k] @ atom)
        length = torch.linalg.vector_norm(rest)
        basis[k] = rest / length if length > DEPENDENT else 0
    squares = (x @ basis.T).square().cumsum(dim=1)
    return (squares / x.square().sum(dim=1, keepdim=True).clamp_min(1e-30)).clamp(max=1.0)
