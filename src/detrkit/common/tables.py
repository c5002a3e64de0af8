"""Tables as CSV files, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from detrkit.common.files import write_text
from detrkit.common.text import spreadsheet_cell


def csv_lines(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """The lines of a CSV file: no cell is run as a formula, and any file name can be written.

    Args:
        heading: Names of the columns.
        rows: The cells of each row; None is an empty cell.
    """
    line = io.StringIO(newline="")
    writer = csv.writer(line)
    for row in itertools.chain([heading], rows):
        writer.writerow(map(_cell, row))
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Writes a table, completely or not at all, or to stdout for ``-``; gives its path.

    Raises:
        DetrkitError: ``path`` cannot be written.
    """
    write_text(csv_lines(heading, rows), path)
    return path


def _cell(value: object) -> object:
    if isinstance(value, str):  # the name of a file need not be text
        value = value.encode("utf-8", "backslashreplace").decode("utf-8")
    return spreadsheet_cell(value)
