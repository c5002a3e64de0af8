"""Messages and tables for a person at a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

from detrkit.common.text import printable
from detrkit.common.without_torch import has_torch

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

# With so few inputs, the messages about unreadable ones are still visible at the end.
_SHORT_RUN = 20


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does."""


def interrupt_status(error: BaseException | None) -> int:
    """The exit status after an interrupt: 128 and the signal's number."""
    return 143 if isinstance(error, Terminated) else 130


class _Log:
    as_json = False


@contextlib.contextmanager
def log_format(name: str) -> Iterator[None]:
    """Within the block, messages are lines of text, or with ``json`` of JSON."""
    before, _Log.as_json = _Log.as_json, name == "json"
    try:
        yield
    finally:
        _Log.as_json = before


def say(message: str, *, title: str | None = None, indent: str = "", **facts: object) -> None:
    """Prints a message on one line of stderr, without its line breaks, and with control characters escaped.

    Args:
        message: The message.
        title: What kind of message it is, such as "Error".
        indent: What the line begins with.
        facts: What the message says, as entries of a line of JSON.
    """
    line = printable(" ".join(message.split()))
    if _Log.as_json:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        level = (title or "info").lower()
        print(
            json.dumps({"time": now, "level": level, "message": line, **facts}), file=sys.stderr, flush=True
        )
    else:
        print(f"{indent}{title}: {line}" if title else indent + line, file=sys.stderr, flush=True)


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def list_failures(failures: Sequence[str], total: int | None) -> None:
    """Reports at the end of a run how many inputs could not be read; after a long run, also which.

    Args:
        failures: The message about each when it was read.
        total: Number of inputs; None if some are videos, of which single frames may have failed.
    """
    if not failures:
        return
    again = total is None or total > _SHORT_RUN
    end = ":" if again else "."
    if total is None:
        say(f"{count(len(failures), 'part')} of the inputs could not be read{end}")
    else:
        say(f"{len(failures)} of {total} inputs could not be read{end}")
    if again:
        for failure in failures:
            say(failure, indent="  ")


def make_table(texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table without rows: columns of texts, then columns of numbers, which are aligned right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    class PlainTable(Table):
        """Shows strings as they are: neither as commands of a terminal nor as rich's markup."""

        def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
            super().add_row(*(Text(printable(c)) if isinstance(c, str) else c for c in cells), **options)

    table = PlainTable(*texts, box=box.SIMPLE)
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


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Within the block, Python warnings are printed like other messages, without their location."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        say(str(message), title="Warning")

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


class _Say(logging.Handler):
    """Prints what the library logs as other messages."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), level=record.levelname.lower())


@contextlib.contextmanager
def log_in_one_line(*loggers: str) -> Iterator[None]:
    """Within the block, warnings of loggers, by default of detrkit's own, are printed like other messages."""
    found, handler = [logging.getLogger(name) for name in loggers or ("detrkit",)], _Say(logging.WARNING)
    for logger in found:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in found:
            logger.removeHandler(handler)


class _FirstAttempt(logging.Handler):
    """Reports once that the Hub does not answer, instead of two lines for each attempt."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        if "Retrying" in record.getMessage() and not self.said:
            self.said = True
            say("No answer from the Hub; trying again for half a minute.")


_restored = contextlib.ExitStack()


@contextlib.contextmanager
def libraries_as_they_were() -> Iterator[None]:
    """Takes back at the end of the block what :func:`quiet_libraries` did within."""
    try:
        yield
    finally:
        _restored.close()


def _restore_hub_logger(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> None:
    logger.handlers, logger.propagate = handlers, propagate


def quiet_libraries() -> None:
    """Silences the libraries' messages and loading bars; downloads still show their progress bar."""
    if not has_torch():
        return  # nor is there a library
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    hub_logger = logging.getLogger("huggingface_hub")
    _restored.callback(_restore_hub_logger, hub_logger, list(hub_logger.handlers), hub_logger.propagate)
    _restored.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
    if transformers_logging.is_progress_bar_enabled():
        _restored.callback(transformers_logging.enable_progress_bar)
    hub_logger.handlers, hub_logger.propagate = [_FirstAttempt(logging.WARNING)], False
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    enable_progress_bars()
