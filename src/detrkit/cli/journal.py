"""A record of finished work, a line each, from which an interrupted command goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from detrkit.errors import DetrkitError
from detrkit.files import atomic_file


class Journal:
    """Lines of JSON in a file: the settings of the work first, then an entry for each finished piece.

    An entry is in the file as soon as :meth:`add` returns. A last line that was cut off is not an entry.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Opens a journal; nothing is written before the first entry.

        Args:
            path: The file.
            settings: What the results depend on, such as the model's name.
        """
        self.path = path
        self.settings = settings

    def read(self) -> list[dict[str, Any]]:
        """The entries so far, none where there is no journal.

        Raises:
            DetrkitError: The journal cannot be read, or is of work with other settings.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DetrkitError(f"cannot read {self.path}: {error.strerror or error}") from error
        entries = []
        for line in lines:
            with suppress(ValueError):
                entries.append(json.loads(line))
        if entries:
            self.check(entries[0], self.path)
        return entries[1:]

    def check(self, found: Any, where: Path) -> None:
        """Compares the settings of earlier work with those of this one.

        Raises:
            DetrkitError: They differ.
        """
        for name, value in self.settings.items():
            before = found.get(name) if isinstance(found, dict) else None
            if before != value:
                raise DetrkitError(
                    f"cannot resume: {where} was made with {name} {before}, not {value}; use the same "
                    "settings, or start anew without --resume"
                )

    def start(self, entries: Sequence[dict[str, Any]] = ()) -> None:
        """Replaces what was there by these entries, at one stroke.

        Raises:
            DetrkitError: The file system refuses.
        """
        with atomic_file(self.path) as temporary:
            lines = [json.dumps(entry) + "\n" for entry in (self.settings, *entries)]
            temporary.write_text("".join(lines), encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Appends an entry.

        Raises:
            DetrkitError: The file system refuses.
        """
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise DetrkitError(f"cannot write {self.path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Deletes the file: the work is done and its result written."""
        self.path.unlink(missing_ok=True)
