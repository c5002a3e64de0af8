"""A progress bar for long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from detrkit.common.terminal import say

_PROGRESS_AFTER_SECONDS = 3.0

_FIRST_LINE_AFTER_SECONDS, _SECONDS_BETWEEN_LINES = 10.0, 60.0

_Item = TypeVar("_Item")


def with_progress(
    results: Iterable[_Item], total: int | None, description: str = "Detecting"
) -> Iterator[_Item]:
    """Yields the results, with a progress bar on stderr once they take more than a few seconds.

    If stderr is not a terminal, there is a line after ten seconds and every minute instead.
    """
    if not sys.stderr.isatty():
        yield from _with_lines(results, total, description)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    start, shown = time.monotonic(), False
    try:
        for result in results:
            bar.advance(task)
            if not shown and time.monotonic() - start > _PROGRESS_AFTER_SECONDS:
                bar.start()
                shown = True
            yield result
    finally:
        if shown:
            bar.stop()


def _with_lines(results: Iterable[_Item], total: int | None, description: str) -> Iterator[_Item]:
    """Yields the results, and tells a log now and then how many there are."""
    start = time.monotonic()
    due = start + _FIRST_LINE_AFTER_SECONDS
    for done, result in enumerate(results, 1):
        now = time.monotonic()
        if now >= due:
            of = "" if total is None else f" of {total}"
            rate = done / (now - start)
            say(f"{description}: {done}{of}, {rate:.2f} a second", done=done, total=total)
            due = now + _SECONDS_BETWEEN_LINES
        yield result
