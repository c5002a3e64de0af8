"""Locks that keep two processes from writing one output; a process that ends releases its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from detrkit.common.errors import DetrkitError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def hold(path: Path, output: Path) -> BinaryIO:
    """Creates a file if necessary, and locks it until the returned handle is closed.

    Without effect on systems and network shares that have no locks.

    Args:
        path: The file to lock.
        output: What is written, for errors.

    Raises:
        DetrkitError: Another process holds the lock, or the file cannot be written.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("ab")
        except OSError as error:
            raise DetrkitError(f"cannot write {path}: {error.strerror or error}") from error
        if fcntl is None:
            handle.close()  # an open file could not be renamed
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.close()
            raise DetrkitError(
                f"another process is writing {output}; wait until it ends, or choose another place"
            ) from error
        except OSError:
            return handle
        if _is_at(handle, path):
            return handle
        handle.close()  # whoever held it has replaced or removed the file


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Holds a lock during a block, in a file that exists only then.

    Args:
        path: The file.
        output: What is written, for errors.

    Raises:
        DetrkitError: Another process holds the lock, or the file cannot be written.
    """
    new = not path.parent.exists()
    handle = hold(path, output)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        handle.close()
        with suppress(OSError):  # it is no longer empty
            if new:
                path.parent.rmdir()


def _is_at(handle: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one under its name."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
