"""The course of the distillation weights over training: warm-up, decay, stop. A pure function."""

import math


def weight_factor(
    iteration: int, *, warmup_iters: int, stop_iter: int, decay: str, max_iter: int
) -> float:
    """Factor in [0, 1] on all distillation weights at an iteration.

    Args:
        warmup_iters: linear rise over the first iterations; 0 for none.
        stop_iter: 0 from this iteration on; 0 for never.
        decay: "none", "linear" or "cosine", from 1 at the start to 0 at `max_iter`.
    """
    if stop_iter and iteration >= stop_iter:
        return 0.0
    progress = min(iteration / max(max_iter, 1), 1.0)
    factor = {
        "none": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[decay]
    return factor * min((iteration + 1) / (warmup_iters + 1), 1.0)
