"""Choosing prototypes for every class and level (PGM, Sec. 3.1 and Alg. 1 of GlobalKD).

Takes the instance features of a dataset and returns a `PrototypeSet`: groups the instances by
class, settles which of them are candidates and hands each class and level to a generator. Not here:
the generators (`generators`) and extracting features (`extraction`).

Shapes: R instances of one class on one level, P prototypes, K classes, D_t and D_s channels.
"""

import logging
import math
from typing import Dict, List, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from ..requirement import require
from .generators import PROTOTYPE_GENERATOR_REGISTRY, ClassInstances
from .settings import GenerationSettings
from .sparse_coding import unit_rows
from .structures import PairedFeatures, PrototypeSet

logger = logging.getLogger(__name__)

#: Kernel width of the density, in units of 1 - cosine (as in the authors' released code).
DENSITY_WIDTH = 0.1
#: Entries of the density's kernel matrix that are held at a time.
DENSITY_BLOCK = 2**22
#: Rows that are normalised at a time.
NORMALIZED_ROWS = 4096


@torch.no_grad()
def generate_prototypes(
    features: PairedFeatures,
    settings: GenerationSettings,
    *,
    num_classes: int,
    progress: bool = False,
    device: Optional[torch.device] = None,
) -> PrototypeSet:
    """Choose the prototypes of every class on every level.

    Deterministic: equal input and seed give equal prototypes. No gradient.

    Args:
        features: all instances, raw.
        settings: how they are chosen.
        num_classes: K.
        progress: show a progress bar.
        device: where to compute, one class and level at a time; default: where the features are.

    Returns:
        The prototypes, on the features' device; nothing in them is valid if `features` is empty.
        An instance shorter than 1e-6 (a zero vector) in either space never becomes a prototype.

    Raises:
        ValueError: a setting out of range, a class id outside [0, num_classes), or features that
            are not finite.
    """
    check_settings(settings)
    generate = PROTOTYPE_GENERATOR_REGISTRY.get(settings.generator)
    percentile = settings.density_percentile
    device = torch.device(device or features.classes.device)
    groups = rows_by_class(features.classes, num_classes)
    jobs = [(level, k) for level in features.levels for k, rows in enumerate(groups) if len(rows)]
    shape = (num_classes, settings.num_prototypes)
    chosen = {n: features.classes.new_full(shape, -1) for n in features.levels}
    gain = {n: torch.zeros(shape, device=features.classes.device) for n in features.levels}
    without_dense = 0
    with torch.autocast(device.type, enabled=False):
        for level, k in tqdm(jobs, desc="Prototypes", disable=not progress):
            instances = _class_instances(
                features, level, groups[k], normalize=settings.normalize, device=device
            )
            if percentile > 0 and instances.candidates.any():
                dense = dense_instances(instances, percentile)
                instances.candidates = dense if dense.any() else instances.candidates
                without_dense += int(not dense.any())
            rows, gains = generate(instances, settings)
            chosen[level][k, : len(rows)] = groups[k][rows.to(groups[k].device)]
            if gains is not None:
                gain[level][k, : len(rows)] = gains.to(gain[level])
    if without_dense:
        logger.warning(
            f"MODEL.GLOBALKD.PROTOTYPES.DENSITY_PERCENTILE = {percentile:g} left no "
            f"candidate in {without_dense} of {len(jobs)} pairs of class and level; there every "
            "instance was one."
        )
    counts = torch.tensor([len(rows) for rows in groups]).to(features.classes)
    return _prototype_set(features, chosen, gain, counts)


def rows_by_class(classes: Tensor, num_classes: int) -> List[Tensor]:
    """The rows of each class, ascending: K tensors of int64.

    Raises:
        ValueError: a class id outside [0, num_classes).
    """
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if len(outside):
        raise ValueError(
            f"Class id {int(outside[0])} among the instances; ids must lie in [0, {num_classes}): "
            "MODEL.ROI_HEADS.NUM_CLASSES or MODEL.RETINANET.NUM_CLASSES and the dataset disagree."
        )
    order = torch.argsort(classes, stable=True)
    return list(order.split(torch.bincount(classes, minlength=num_classes).tolist()))


def dense_instances(instances: ClassInstances, percentile: float) -> Tensor:
    """The candidates strictly above a percentile of the density among them in both spaces.

    The density is the sum over candidates of exp(-((1 - cosine) / 0.1)^2). It takes O(R^2 D) time,
    a block of the kernel matrix at a time.

    Note:
        From the authors' released code, where the percentile is the density of rank 0.4 R, from
        0 and ascending; the paper has no such filter.

    Returns:
        (R,) bool; possibly False everywhere.
    """
    pool = instances.candidates.nonzero().squeeze(1)
    keep = torch.ones_like(pool, dtype=torch.bool)
    for x in (instances.teacher, instances.student):
        unit = unit_rows(x[pool])
        blocks = unit.split(max(1, DENSITY_BLOCK // max(len(pool), 1)))
        kernel = [torch.exp(-(((1 - b @ unit.T) / DENSITY_WIDTH) ** 2)).sum(dim=1) for b in blocks]
        density = torch.cat(kernel)
        rank = min(int(percentile / 100 * len(pool)), len(pool) - 1)
        keep &= density > density.sort().values[rank : rank + 1]
    return torch.zeros_like(instances.candidates).index_fill(0, pool[keep], True)


def _class_instances(
    features: PairedFeatures, level: str, rows: Tensor, *, normalize: bool, device: torch.device
) -> ClassInstances:
    """One class on one level, in float32 or better, on `device`."""
    spaces, candidates = {}, torch.ones(len(rows), dtype=torch.bool, device=device)
    for space in ("teacher", "student"):
        x = getattr(features, space)[level][rows].to(device)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        # In place and part by part: `x` is a copy already, and may be most of the memory.
        for part, candidate in zip(x.split(NORMALIZED_ROWS), candidates.split(NORMALIZED_ROWS)):
            if not part.isfinite().all():
                raise ValueError(
                    f"The {space} features of class {int(features.classes[rows[0]])} on level "
                    f"{level} are not finite; check the weights of the {space}."
                )
            unit = unit_rows(part)
            candidate &= unit.any(dim=1)
            if normalize:
                part.copy_(unit)
        spaces[space] = x
    return ClassInstances(**spaces, boxes=features.boxes[rows].to(device), candidates=candidates)


def _prototype_set(
    features: PairedFeatures, rows: Dict[str, Tensor], gain: Dict[str, Tensor], counts: Tensor
) -> PrototypeSet:
    valid = {level: x >= 0 for level, x in rows.items()}

    def gather(source: Dict[str, Tensor]) -> Dict[str, Tensor]:
        out = {}
        for level, x in source.items():
            out[level] = x.new_zeros(*rows[level].shape, x.shape[1])
            out[level][valid[level]] = x[rows[level][valid[level]]]
        return out

    return PrototypeSet(
        teacher=gather(features.teacher),
        student=gather(features.student),
        valid=valid,
        rows=rows,
        gain=gain,
        counts=counts,
    )


def check_settings(settings: GenerationSettings) -> None:
    """Raise a ValueError that names the key where a setting is out of range."""
    names = [name for name, _ in PROTOTYPE_GENERATOR_REGISTRY]
    percentile, lam, eps = settings.density_percentile, settings.lam, settings.dbscan_eps
    for key, value, right, needed in (
        ("GENERATOR", settings.generator, settings.generator in names, names),
        ("NUM", settings.num_prototypes, settings.num_prototypes >= 1, "1 or more"),
        ("LAMBDA", lam, lam >= 0 and math.isfinite(lam), "finite and 0 or more"),
        ("DENSITY_PERCENTILE", percentile, 0 <= percentile < 100, "in [0, 100)"),
        ("SPACE", settings.space, settings.space in ("teacher", "student"), ("teacher", "student")),
        ("DBSCAN_EPS", eps, eps > 0 and math.isfinite(eps), "finite and above 0"),
        ("SEED", settings.seed, 0 <= settings.seed < 2**32, "in [0, 2^32)"),
    ):
        require(f"PROTOTYPES.{key}", value, right, needed)
