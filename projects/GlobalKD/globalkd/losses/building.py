"""Building the losses that a config names, and holding them to what `DistillLoss` asks of them."""

from typing import Dict, Sequence

from detectron2.config import CfgNode
from torch import Tensor, nn

from .base import DISTILL_LOSS_REGISTRY, READ, DistillLoss


def active_losses(losses: Sequence[DistillLoss]) -> nn.ModuleDict:
    """Those with a weight, by the names of their classes.

    Raises:
        ValueError: there is none, one stands there twice, or two return terms of one name.
    """
    active = [loss for loss in losses if loss.weights]
    if not active:
        raise ValueError(
            "MODEL.GLOBALKD.LOSSES names no loss with a weight above 0. To train the student "
            "alone, set MODEL.GLOBALKD.ENABLED False."
        )
    named = nn.ModuleDict({type(loss).__name__: loss for loss in active})
    if len(named) < len(active):
        raise ValueError("MODEL.GLOBALKD.LOSSES names a loss twice.")
    source: Dict[str, str] = {}
    for name, loss in named.items():
        if unknown := sorted(loss.reads - READ):
            raise ValueError(f"{name}.reads has {unknown}; there are {sorted(READ)}.")
        for term in loss.weights:
            if term in source:
                raise ValueError(
                    f"MODEL.GLOBALKD.LOSSES: {source[term]} and {name} both return {term!r}, but "
                    "terms need names of their own."
                )
            source[term] = name
    return named


def check_terms(loss: DistillLoss, terms: Dict[str, Tensor], others: Dict[str, Tensor]) -> None:
    """Raise a ValueError where a loss's `forward` does not return what `DistillLoss` asks for."""
    name = type(loss).__name__
    if not isinstance(terms, dict) or terms.keys() != loss.weights.keys():
        found = sorted(terms) if isinstance(terms, dict) else type(terms).__name__
        raise ValueError(
            f"{name}.forward must return a dict with the terms of its `weights`, "
            f"{sorted(loss.weights)}; it returned {found}."
        )
    if wrong := [n for n, x in terms.items() if not isinstance(x, Tensor) or x.dim()]:
        raise ValueError(f"{name}.forward must return scalar tensors; {wrong} are none.")
    if taken := sorted(terms.keys() & others.keys()):
        raise ValueError(f"{name} returns {taken}, which the detector's own losses are called.")


def build_loss(cfg: CfgNode, name: str) -> DistillLoss:
    """Build a registered loss from a config."""
    if name not in DISTILL_LOSS_REGISTRY:
        known = sorted(key for key, _ in DISTILL_LOSS_REGISTRY)
        raise ValueError(
            f"MODEL.GLOBALKD.LOSSES names {name!r}; registered are {known}. A loss of your own "
            "needs its module to be imported: --import my_project.my_loss."
        )
    loss = DISTILL_LOSS_REGISTRY.get(name)(cfg)
    if not isinstance(loss, DistillLoss):
        raise ValueError(
            f"MODEL.GLOBALKD.LOSSES names {name!r}, which gives a {type(loss).__name__} and no "
            "DistillLoss (docs/own_loss.md)."
        )
    return loss
