"""Distillation losses that are infinite or NaN: named, and fatal or left out.

Only loss terms are looked at. Gradients that overflow under mixed precision are the gradient
scaler's business. The training step gets no synchronisation with the device that it does not have:
see `NonFiniteLosses.check` and `report`.
"""

import logging
import math
from dataclasses import replace
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .losses import StudentOutputs

logger = logging.getLogger(__name__)


class _Step(NamedTuple):
    iteration: int
    images: List[str]
    names: List[str]
    values: Tensor


class _Pass:
    """Whether what one or several steps distil is finite: () bool, on the device; None: unknown."""

    def __init__(self):
        self.finite: Optional[Tensor] = None
        self.is_over = False  # its gradients have been asked for: what is added begins anew

    def add(self, finite: Tensor) -> None:
        """Take another step into account."""
        begins = self.finite is None or self.is_over
        self.finite = finite if begins else self.finite & finite
        self.is_over = False

    def let_through(self, gradient: Tensor) -> Tensor:
        """The gradient, or zeros in its place."""
        if self.finite is None:
            return gradient
        return torch.where(self.finite, gradient, torch.zeros_like(gradient))


class NonFiniteLosses:
    """Watches the terms of each step.

    With `skip`, a step with a term that is not finite distils nothing: all its terms are 0, and
    what flows back through them is replaced by 0 where it would enter the student or a loss's
    parameters (0 times an infinite derivative is NaN). The decision is made on the device.
    """

    def __init__(self, skip: bool):
        self.skip = skip
        self.count = 0  # of skipped steps that were reported
        self._steps: List[_Step] = []
        self._pass = _Pass()  # of the latest step
        self._since_backward = _Pass()  # of all steps whose gradients are still to come
        self._watches = False

    def __getstate__(self):
        # Copies of parameters have no hooks.
        return {**self.__dict__, "_watches": False}

    def watch_parameters(self, module: nn.Module) -> None:
        """Let gradients of a skipped step not reach these parameters; once is enough."""
        if self.skip and not self._watches:
            self._watches = True
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._into_parameter)

    def watch_student(self, student: StudentOutputs) -> StudentOutputs:
        """The same outputs, from which gradients of a skipped step do not flow back."""
        if not self.skip:
            return student
        own = self._pass = _Pass()  # several steps may come before one backward pass

        def alias(x: Tensor) -> Tensor:
            x = x.view_as(x)  # the detector's own losses keep the original
            if x.requires_grad:
                x.register_hook(own.let_through)
            return x

        def aliases(tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
            return {name: alias(x) for name, x in tensors.items()}

        dense = student.dense
        if dense is not None:
            dense = replace(
                dense,
                logits=aliases(dense.logits),
                deltas=aliases(dense.deltas),
                hidden={d: [(alias(x), alias(y)) for x, y in h] for d, h in dense.hidden.items()},
            )
        return replace(
            student,
            features=aliases(student.features),
            candidates=student.candidates.aliased(alias),
            dense=dense,
        )

    def watch_terms(
        self, terms: Dict[str, Tensor], iteration: int, batched_inputs: List[dict]
    ) -> Dict[str, Tensor]:
        """The terms that take part in the step: they, or zeros."""
        values = torch.stack([x.detach().float() for x in terms.values()])
        images = [str(x.get("file_name", x.get("image_id", "?"))) for x in batched_inputs]
        step = _Step(iteration, images, list(terms), values)
        if not self.skip:
            self._steps = [step]
            return terms
        self._steps.append(step)
        self._pass.finite = finite = values.isfinite().all()
        self._since_backward.add(finite)
        return {k: torch.where(finite, x, torch.zeros_like(x)) for k, x in terms.items()}

    def check(self) -> None:
        """Raise if a term of the last step is not finite.

        It waits for the device. To be called after the backward pass, where Detectron2's trainer
        is about to wait, too, for the values that it writes.

        Raises:
            FloatingPointError: the message names the terms, the iteration and the images.
        """
        if self.skip or not self._steps:
            return
        (step,) = self._steps
        self._steps = []
        values = step.values.tolist()
        if not all(map(math.isfinite, values)):
            raise FloatingPointError(
                f"{_describe(step, values)}. The weights are those before this step. To leave such "
                'steps out, set MODEL.GLOBALKD.NON_FINITE_LOSS "skip".'
            )

    def report(self) -> int:
        """Warn of the steps skipped since the last call; how many there were in this process."""
        if not self.skip or not self._steps:
            return self.count
        steps, self._steps = self._steps, []
        for step, values in zip(steps, torch.stack([x.values for x in steps]).tolist()):
            if not all(map(math.isfinite, values)):
                self.count += 1
                logger.warning(f"{_describe(step, values)}. This step did not distil.")
        return self.count

    def _into_parameter(self, gradient: Tensor) -> Tensor:
        """A parameter gets one gradient for all steps: none, if one of them is not finite."""
        self._since_backward.is_over = True
        return self._since_backward.let_through(gradient)


def _describe(step: _Step, values: List[float]) -> str:
    wrong = [f"{n} is {v}" for n, v in zip(step.names, values) if not math.isfinite(v)]
    return f"Iteration {step.iteration}: {', '.join(wrong)} on {', '.join(step.images)}"
