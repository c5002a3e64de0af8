"""Silences internal messages of libraries."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_depth = 0
_caught = warnings.catch_warnings()


@contextmanager
def no_warnings(message: str = "") -> Iterator[None]:
    """Suppresses Python warnings whose text begins with a regular expression; all by default.

    The filters belong to the whole process, so blocks of several threads at once share one copy of them, and
    the last one to end puts back what the first one found.
    """
    global _depth, _caught
    with _lock:
        if not _depth:
            _caught = warnings.catch_warnings()
            _caught.__enter__()
        _depth += 1
        warnings.filterwarnings("ignore", message=message)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth:
                _caught.__exit__(None, None, None)


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Suppresses Python warnings, and messages of these loggers below the level of an error."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    try:
        for logger in found:
            logger.setLevel(logging.ERROR)
        with no_warnings():
            yield
    finally:
        for logger, level in zip(found, levels):
            logger.setLevel(level)
