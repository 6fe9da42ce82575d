"""How large each distillation term of one step is, and how strongly it pulls at the student.

Read by `cost`, which judges the numbers, and by `tools/loss_scales.py`, which tabulates them.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..distiller import Distiller
from ..features import record_outputs

#: An iteration past every loss's own start.
LATE = 10**9


@dataclass
class StepTerms:
    """The distillation terms of one step, next to the detection losses.

    Attributes:
        detection: sum of the detection losses.
        values: term name -> its value, weighted, as it is added to the loss.
        gradients: term name -> its gradient on the backbone's parameters, as one vector.
        unit: norm of the gradient of the detection losses, likewise; above 0.
        instances: annotated boxes in the batch.
        unread: levels that are distilled, yet reach no term.
    """

    detection: float
    values: Dict[str, float]
    gradients: Dict[str, Tensor]
    unit: float
    instances: int
    unread: List[str]

    def share(self, names: Iterable[str]) -> Tuple[float, float]:
        """Some terms' sum, and the norm of its gradient, as ratios to the detection losses'."""
        names = list(names)
        value = sum(self.values[name] for name in names) / max(self.detection, 1e-12)
        return value, sum(self.gradients[name] for name in names).norm().item() / self.unit


def measure_terms(model: nn.Module, batch: List[dict]) -> StepTerms:
    """Forward a batch and differentiate each distillation term by itself.

    Sizes are those at full weight and past every loss's start: warm-up, decay and stop of the
    weights are left out. In float32, also where the run is to use mixed precision.

    Args:
        model: a distilling meta-architecture; prototypes are made where its bank has none.
        batch: from the training loader.
    """
    distiller = model.distiller
    model.train()
    with _at_full_weight(distiller):
        distiller.prepare(model, LATE)  # whose passes of the backbone are not the step's
        with record_outputs({"backbone": model.backbone}) as recorded:
            losses = model(batch)
    names = [name for loss in distiller.losses.values() for name in loss.weights]
    terms = {name: losses.pop(name) for name in names}
    detection = sum(losses.values())
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]
    maps = {pair.student: recorded["backbone"][pair.student] for pair in distiller.levels}
    reached = torch.autograd.grad(
        sum(terms.values()), list(maps.values()), retain_graph=True, allow_unused=True
    )
    return StepTerms(
        detection=detection.item(),
        values={name: term.item() for name, term in terms.items()},
        gradients={name: _gradient(term, parameters) for name, term in terms.items()},
        unit=max(_gradient(detection, parameters).norm().item(), 1e-12),
        instances=sum(len(x["instances"]) for x in batch),
        unread=[name for name, gradient in zip(maps, reached) if gradient is None],
    )


@contextmanager
def _at_full_weight(distiller: Distiller) -> Iterator[None]:
    """The iteration LATE, without a course of the weights and without a refresh that is due."""
    schedule, refresher = distiller.schedule, distiller.refresher
    epochs = refresher.refresh_epochs
    distiller.schedule = replace(schedule, warmup_iters=0, stop_iter=0, decay="none")
    refresher.refresh_epochs = 0
    try:
        with EventStorage(LATE):
            yield
    finally:
        distiller.schedule, refresher.refresh_epochs = schedule, epochs


def _gradient(term: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient as one vector; 0 where the term does not reach a parameter."""
    parts = [None] * len(parameters)
    if term.requires_grad:
        parts = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters)]
    return torch.cat([g.float().flatten() for g in parts])
