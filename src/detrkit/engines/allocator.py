"""The C library's allocator, set for large activations.

By default glibc maps each large block afresh and gives it back at once, so that every activation is paid
for in page faults: more time than the arithmetic of a convolution takes. Keeping the memory makes a
forward pass about a third faster. It is a setting of the whole process, so only programs (the command
line, :class:`~detrkit.detector.Detector`) make it, never an import.
"""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_KEEP_BYTES = 2**31 - 1


def keep_memory() -> bool:
    """Makes glibc keep freed memory for the next activation instead of returning it to the system.

    Environment variables that set the same (``MALLOC_MMAP_THRESHOLD_`` and its like, ``GLIBC_TUNABLES``)
    are a user's own choice and win.

    Returns:
        Whether the setting was made: False on systems without glibc, or where the user has set it.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP_BYTES))
