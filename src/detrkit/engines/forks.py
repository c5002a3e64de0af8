"""A process that forks, as web servers and data loaders do, after it has run a model.

GNU's OpenMP, with which PyTorch computes on several cores, keeps the threads of a parallel region for the
next one. A forked process has none of its parent's threads but is not told so: its first parallel region
waits for them for ever.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

_SOFT = 1  # omp_pause_soft: what was set stays set


@cache
def survive_forks() -> None:
    """Has OpenMP end this thread's helpers before each fork; it starts new ones when it needs some."""
    if sys.platform == "linux" and _pause() is not None:
        os.register_at_fork(before=end_helpers)


def end_helpers() -> None:
    """Ends the helper threads that OpenMP keeps for the calling thread."""
    pause = _pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _pause() -> ctypes._NamedFuncPointer | None:
    """OpenMP's ``omp_pause_resource_all``, of the library that PyTorch has loaded."""
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
