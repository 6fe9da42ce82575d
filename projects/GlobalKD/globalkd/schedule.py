"""The course of the distillation weights over training: warm-up, decay, stop."""

import math
from dataclasses import dataclass

from .requirement import require

DECAYS = ("none", "linear", "cosine")


@dataclass(frozen=True)
class WeightSchedule:
    """The factor on all distillation weights, by iteration; the keys of MODEL.GLOBALKD.

    Attributes:
        weight: the largest factor, above 0.
        warmup_iters: linear rise over the first iterations; 0 for none.
        stop_iter: 0 from this iteration on; 0 for never.
        decay: "none", "linear" or "cosine", from 1 at the start to 0 at `max_iter`.
        max_iter: SOLVER.MAX_ITER.

    Raises:
        ValueError: a weight that is not positive, an unknown decay, or one without `max_iter`.
    """

    weight: float = 1.0
    warmup_iters: int = 0
    stop_iter: int = 0
    decay: str = "none"
    max_iter: int = 0

    def __post_init__(self):
        require("WEIGHT", self.weight, 0 < self.weight < math.inf, "a finite number above 0")
        require("DECAY", self.decay, self.decay in DECAYS, DECAYS)
        ends = self.decay == "none" or self.max_iter > 0
        require("DECAY", self.decay, ends, "'none' where there is no `max_iter` to fall towards")

    def __call__(self, iteration: int) -> float:
        """The factor at an iteration, from 0."""
        if self.stop_iter and iteration >= self.stop_iter:
            return 0.0
        progress = min(iteration / max(self.max_iter, 1), 1.0)
        decay = {
            "none": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        }[self.decay]
        return self.weight * decay * min((iteration + 1) / (self.warmup_iters + 1), 1.0)
