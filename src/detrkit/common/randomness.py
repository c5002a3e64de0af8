"""The random generators of the process, which belong to the program that uses detrkit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def same_randomness() -> Iterator[None]:
    """Puts back the states of Python's, NumPy's and PyTorch's generators at the end of the block.

    So a program that has seeded them gets the numbers it would get without the work of the block.
    """
    import torch

    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Not where no GPU has been used: reading a state would begin to use it.
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
