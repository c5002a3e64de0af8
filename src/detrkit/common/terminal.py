"""Lines for a person at a terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table

# Of so few inputs the messages of those that cannot be read are still in sight at the end.
_SHORT_RUN = 20


def say(message: str, *, title: str | None = None, indent: str = "") -> None:
    """Prints one line on stderr, whatever line breaks the message has."""
    line = " ".join(message.split())
    print(f"{indent}{title}: {line}" if title else indent + line, file=sys.stderr)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def list_failures(failures: Sequence[str], total: int) -> None:
    """Says at the end of a run how many of its inputs could not be read, and of a long run which.

    Args:
        failures: What was said of each when it was met.
        total: How many inputs there were.
    """
    if not failures:
        return
    end = ":" if total > _SHORT_RUN else "."
    say(f"{len(failures)} of {total} inputs could not be read{end}")
    if total > _SHORT_RUN:
        for failure in failures:
            say(failure, indent="  ")


def print_table(table: Table) -> None:
    """Prints a table on stdout, in full width where that is no terminal, so that nothing is cut."""
    from rich.console import Console

    if sys.stdout.isatty():
        Console().print(table)
    else:
        Console(file=sys.stdout, width=100_000, color_system=None).print(table)


def show_warnings_in_one_line() -> None:
    """Prints Python warnings like the other messages, without the place in the source."""

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
    """Says once that the Hub does not answer, in place of two lines for each attempt to reach it."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        if "Retrying" in record.getMessage() and not self.said:
            self.said = True
            say("No answer from the Hub; trying again for half a minute.")


def quiet_libraries() -> None:
    """Keeps the libraries' remarks and loading bars off the terminal; downloads still show their bar."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    hub_logger.handlers, hub_logger.propagate = [_FirstAttempt(logging.WARNING)], False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
