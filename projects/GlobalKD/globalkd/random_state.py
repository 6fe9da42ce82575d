"""Random numbers as a function of where training stands, not of what was drawn before."""

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch

#: First numbers of the keys, so that images and steps draw from streams of their own.
IMAGES, STEPS = 0, 1


def seed_cpu(*key: int) -> int:
    """Seed Python, NumPy and PyTorch on the CPU from numbers, each 0 or more.

    Returns:
        the seed that PyTorch got.
    """
    words = [int(x) for x in np.random.SeedSequence(key).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def seed_all(*key: int) -> None:
    """`seed_cpu`, and the generators of all GPUs."""
    torch.manual_seed(seed_cpu(*key))


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Leave every random state of the CPU as it was."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
