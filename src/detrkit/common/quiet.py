"""Silences internal messages of libraries, and leaves the process around them as it was."""

from __future__ import annotations

import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_SET_BY_OPENCV = ("LD_LIBRARY_PATH", "PATH", "QT_QPA_PLATFORM_PLUGIN_PATH", "QT_QPA_FONTDIR")

_lock = threading.Lock()
_importing = threading.RLock()
# Logger -> how many blocks silence it, and the level that the first one found.
_silenced: dict[logging.Logger, tuple[int, int]] = {}


@contextmanager
def no_warnings(message: str = "") -> Iterator[None]:
    """Suppresses Python warnings whose text begins with a regular expression; all by default.

    The filters belong to the whole process. Blocks of several threads each add one of their own and take it
    away again; ``warnings.catch_warnings`` would put back the list of one thread over that of another.
    """
    own = ("ignore", re.compile(message, re.IGNORECASE) if message else None, Warning, None, 0)
    found = warnings.filters
    found.insert(0, own)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        # Another thread's catch_warnings may have begun meanwhile: it works on a copy, and puts back this.
        for filters in (found, warnings.filters):
            for place, other in enumerate(list(filters)):
                if other is own:
                    del filters[place]  # type: ignore[attr-defined]
                    break


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Suppresses Python warnings, and messages of these loggers below the level of an error."""
    found = [logging.getLogger(name) for name in loggers]
    with _lock:
        for logger in found:
            blocks, level = _silenced.get(logger, (0, logger.level))
            _silenced[logger] = blocks + 1, level
            logger.setLevel(logging.ERROR)
    try:
        with no_warnings():
            yield
    finally:
        with _lock:
            for logger in found:
                blocks, level = _silenced.pop(logger)
                if blocks > 1:
                    _silenced[logger] = blocks - 1, level
                else:
                    logger.setLevel(level)


@contextmanager
def same_environment() -> Iterator[None]:
    """Takes back what the import of OpenCV within the block does to the environment.

    faster-coco-eval imports it, and it names its own copies of Qt and of other libraries there. Programs that
    the process starts, and PyQt within it, would load these instead of their own.
    """
    with _importing:
        before = {name: os.environ.get(name) for name in _SET_BY_OPENCV}
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
