"""Prototype generators: how R instances of one class on one level come down to P of them.

Chosen by name from PROTOTYPE_GENERATOR_REGISTRY: the paper's pursuit (Sec. 3.1) and what Table 6
and Fig. 1 compare it with. Not here: classes, levels and candidates (`generation`), and
the maths of the pursuit (`sparse_coding`).

Shapes: R instances, P prototypes, D_t and D_s channels in the teacher's and the student's space.
"""

import warnings
from dataclasses import dataclass
from typing import Optional, Tuple

import torch
from fvcore.common.registry import Registry
from torch import Tensor

from .settings import GenerationSettings
from .sparse_coding import select_atoms

PROTOTYPE_GENERATOR_REGISTRY = Registry("PROTOTYPE_GENERATOR")
PROTOTYPE_GENERATOR_REGISTRY.__doc__ = """
Prototype generators by name, as MODEL.GLOBALKD.PROTOTYPES.GENERATOR names them: functions
`(instances: ClassInstances, settings: GenerationSettings) -> (rows, gains)`. `rows` are at most P
distinct rows among `instances.candidates`; `gains`, or None, is the share of the class's energy
|F_t|^2 + |F_s|^2 by which each row lowered Eq. (2).
"""

#: Instances that `dbscan` sees at most, drawn at random: its neighbour lists grow quadratically.
DBSCAN_MAX_INSTANCES = 10_000

Choice = Tuple[Tensor, Optional[Tensor]]


@dataclass
class ClassInstances:
    """The instances of one class on one level.

    Attributes:
        teacher: (R, D_t) features, of unit length if generation normalises.
        student: (R, D_s).
        boxes: (R, 4) XYXY_ABS in pixels of the original image.
        candidates: (R,) bool, the instances that may become prototypes.
    """

    teacher: Tensor
    student: Tensor
    boxes: Tensor
    candidates: Tensor


@PROTOTYPE_GENERATOR_REGISTRY.register()
def pursuit(instances: ClassInstances, settings: GenerationSettings) -> Choice:
    """The paper's PGM: greedy descent on Eq. (2)."""
    rows, gains = select_atoms(
        instances.teacher,
        instances.student,
        settings.num_prototypes,
        settings.lam,
        candidates=instances.candidates,
    )
    norms = (torch.linalg.vector_norm(x, dim=1) for x in (instances.teacher, instances.student))
    energy = sum(x.double().square().sum() for x in norms)
    return rows, gains / energy.clamp_min(1e-30)


@PROTOTYPE_GENERATOR_REGISTRY.register()
def kmeans(instances: ClassInstances, settings: GenerationSettings) -> Choice:
    """The candidates nearest to the P centres of k-means in one space (Table 6)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    pool = _pool(instances)
    count = min(settings.num_prototypes, len(pool))
    if count == 0:
        return pool, None
    x = getattr(instances, settings.space)[pool]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct instances than centres
        model = KMeans(count, n_init="auto", random_state=settings.seed).fit(x.cpu().numpy())
    return pool[_nearest_distinct(x, torch.from_numpy(model.cluster_centers_).to(x))], None


@PROTOTYPE_GENERATOR_REGISTRY.register()
def dbscan(instances: ClassInstances, settings: GenerationSettings) -> Choice:
    """The candidates nearest to the means of DBSCAN's largest clusters in one space (Table 6).

    DBSCAN finds as many clusters as there are. Where they are fewer than P, the other prototypes
    are drawn at random from the clustered instances, and after those from the noise.
    """
    from sklearn.cluster import DBSCAN
    from sklearn.neighbors import NearestNeighbors

    pool = _shuffled_pool(instances, settings.seed)[:DBSCAN_MAX_INSTANCES]
    if len(pool) <= settings.num_prototypes:
        return pool, None
    x = getattr(instances, settings.space)[pool]
    points = x.cpu().numpy()
    distances, _ = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points)
    spacing = max(torch.from_numpy(distances[:, 1]).median().item(), 1e-6)
    labels = DBSCAN(eps=settings.dbscan_eps * spacing).fit_predict(points)
    labels = torch.from_numpy(labels).to(pool.device, torch.int64)
    sizes = torch.bincount(labels[labels >= 0])
    largest = sizes.argsort(descending=True, stable=True)[: settings.num_prototypes].tolist()
    means = [x[labels == label].mean(dim=0) for label in largest]
    rows = _nearest_distinct(x, torch.stack(means)) if means else pool[:0]
    rest = torch.argsort((labels < 0).to(torch.uint8), stable=True)  # `pool` is shuffled already
    rest = rest[~torch.isin(rest, rows)]
    return pool[torch.cat([rows, rest])[: settings.num_prototypes]], None


@PROTOTYPE_GENERATOR_REGISTRY.register()
def ambiguous(instances: ClassInstances, settings: GenerationSettings) -> Choice:
    """The candidates with the smallest boxes (Table 6).

    Note:
        The paper says small or truncated; truncation is not annotated in COCO.
    """
    pool = _pool(instances)
    sides = instances.boxes[pool, 2:] - instances.boxes[pool, :2]
    return pool[sides.prod(dim=1).argsort(stable=True)[: settings.num_prototypes]], None


@PROTOTYPE_GENERATOR_REGISTRY.register()
def random(instances: ClassInstances, settings: GenerationSettings) -> Choice:
    """Candidates drawn with equal probability; the same ones on every level (Fig. 1)."""
    return _shuffled_pool(instances, settings.seed)[: settings.num_prototypes], None


def _pool(instances: ClassInstances) -> Tensor:
    """Rows of the candidates."""
    return instances.candidates.nonzero().squeeze(1)


def _shuffled_pool(instances: ClassInstances, seed: int) -> Tensor:
    pool = _pool(instances)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order.to(pool.device)]


def _nearest_distinct(x: Tensor, centres: Tensor) -> Tensor:
    """For each centre in turn the nearest row of `x` that is not taken yet; len(centres) rows."""
    distances = torch.cdist(centres, x, compute_mode="donot_use_mm_for_euclid_dist")
    taken = []
    for row in distances:
        row[taken] = float("inf")
        taken.append(int(row.argmin()))
    return torch.tensor(taken, dtype=torch.int64, device=x.device)
