"""Messages and tables for a person at a terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table

# With so few inputs, the messages about unreadable ones are still visible at the end.
_SHORT_RUN = 20


def say(message: str, *, title: str | None = None, indent: str = "") -> None:
    """Prints a message on one line of stderr, without its line breaks."""
    line = " ".join(message.split())
    print(f"{indent}{title}: {line}" if title else indent + line, file=sys.stderr)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def list_failures(failures: Sequence[str], total: int) -> None:
    """Reports at the end of a run how many inputs could not be read; after a long run, also which.

    Args:
        failures: The message about each when it was read.
        total: Number of inputs.
    """
    if not failures:
        return
    end = ":" if total > _SHORT_RUN else "."
    say(f"{len(failures)} of {total} inputs could not be read{end}")
    if total > _SHORT_RUN:
        for failure in failures:
            say(failure, indent="  ")


def make_table(texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rows: columns of texts, then columns of numbers, which are aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(*texts, box=box.SIMPLE)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def print_table(table: Table) -> None:
    """Prints a table on stdout; its full width if that is not a terminal, so that nothing is cut."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
    else:
        Console(file=sys.stdout, width=100_000, color_system=None).print(table)


def show_warnings_in_one_line() -> None:
    """Prints Python warnings like other messages, without the location in the source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(str(message), title="Warning")

    warnings.showwarning = show


class _FirstAttempt(logging.Handler):
    """Reports once that the Hub does not answer, instead of two lines for each attempt."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        if "Retrying" in record.getMessage() and not self.said:
            self.said = True
            say("No answer from the Hub; trying again for half a minute.")


def quiet_libraries() -> None:
    """Silences the libraries' messages and loading bars; downloads still show their progress bar."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    hub_logger.handlers, hub_logger.propagate = [_FirstAttempt(logging.WARNING)], False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
