"""A progress bar for long work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_PROGRESS_AFTER_SECONDS = 3.0

_Item = TypeVar("_Item")


def with_progress(
    results: Iterable[_Item], total: int | None, description: str = "Detecting"
) -> Iterator[_Item]:
    """Yields the results, with a progress bar on stderr once they take more than a few seconds.

    Shows no bar if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield from results
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
