"""The C library's allocator, set for large activations.

By default glibc maps each large block afresh and gives it back at once, so that every activation is paid
for in page faults: more time than the arithmetic of a convolution takes. Keeping the memory makes a
forward pass about a third faster. It is a setting of the whole process, so only programs (the command
line, :class:`~detrkit.inference.detector.Detector`) make it, never an import.

Images of ever new sizes leave holes between what oneDNN remembers of each size, so what is kept grows with
the number of sizes: :class:`Excess` gives it back after so many sizes, and when it has grown too much.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Hashable
from pathlib import Path

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


class Excess:
    """Gives kept memory back to the system when it has grown beyond what the work takes.

    Afterwards the next images pay for page faults again, a few tenths of a second, so this must stay rare.
    It happens after ``SIZES`` images of sizes that have not been seen lately, and when what is held has grown
    much beyond what the work takes: the most that is held while the first images after the last time are run.
    Growth alone would not do: a level that was measured when much was kept permits as much for ever.
    """

    WATCHED = 8  # images that show what the work takes
    GROWTH = 1.25  # how far what is held may grow beyond
    SIZES = 32  # new sizes whose remains are kept

    def __init__(
        self, held: Callable[[], int | None] | None = None, give_back: Callable[[], object] | None = None
    ) -> None:
        self._held = held or resident_bytes
        self._give_back = give_back or trim
        self._watched = self._level = 0
        # Two generations, so that a few sizes which recur are not new each time.
        self._sizes: set[Hashable] = set()
        self._earlier: set[Hashable] = set()

    def check(self, size: Hashable = None) -> bool:
        """To be called after each image or batch; says whether memory was given back.

        Args:
            size: What has to be the same for memory to be used again as it is: the shape of the batch.
        """
        held = self._held()
        if held is None:
            return False
        if size not in self._earlier:
            self._sizes.add(size)
        if len(self._sizes) <= self.SIZES and not self._has_grown(held):
            return False
        self._give_back()
        if len(self._sizes) > self.SIZES:
            self._sizes, self._earlier = set(), self._sizes
        self._watched = self._level = 0
        return True

    def _has_grown(self, held: int) -> bool:
        if self._watched >= self.WATCHED:
            return held > self.GROWTH * self._level
        self._watched += 1
        self._level = max(self._level, held)
        return False


def resident_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def trim() -> None:
    """Has glibc give all free pages back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
