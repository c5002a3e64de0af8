"""A record of finished work, one line each, from which an interrupted command can be resumed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_file
from detrkit.common.schema import JsonObject


class Journal:
    """Lines of JSON in a file: first the settings, then an entry for each finished piece of work.

    An entry is in the file as soon as :meth:`add` returns. A truncated last line is not an entry. Entries are
    addressed by their position in the file, so that none needs to be held in memory.
    """

    def __init__(self, path: Path, settings: JsonObject) -> None:
        """Opens a journal; nothing is written before :meth:`start`.

        Args:
            path: The file.
            settings: What the results depend on, such as the model's name.
        """
        self.path = path
        self.settings = settings
        self._whole: int | None = None  # bytes of complete lines, if the file is an earlier run's

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Place and content of each entry; none if the file does not exist.

        After the last one, entries can be added.

        Raises:
            DetrkitError: The journal cannot be read, or is from work with different settings.
        """
        place = 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    entry = None
                    with suppress(ValueError):
                        entry = json.loads(line)
                    if place == 0:
                        self.check(entry, self.path)
                    elif isinstance(entry, dict):
                        yield place, entry
                    place += len(line)
        except FileNotFoundError:
            return
        except OSError as error:
            raise DetrkitError(f"cannot read {self.path}: {error.strerror or error}") from error
        self._whole = place

    def at(self, place: int) -> JsonObject:
        """The entry at a place in the file."""
        with self.path.open("rb") as file:
            file.seek(place)
            return dict(json.loads(file.readline()))

    def check(self, found: object, where: Path) -> None:
        """Compares the settings of earlier work with those of this one.

        Raises:
            DetrkitError: They differ.
        """
        for name, value in self.settings.items():
            before = found.get(name) if isinstance(found, dict) else None
            if before != value:
                raise DetrkitError(
                    f"cannot resume: {where} was made with {name} {before}, not {value}; use the same "
                    "settings, or start from scratch without --resume"
                )

    def start(self, entries: Iterable[JsonObject] = ()) -> list[int]:
        """Atomically replaces the content with these entries; returns their places.

        Raises:
            DetrkitError: The file cannot be written.
        """
        places = []
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            file.write(_line(self.settings))
            for entry in entries:
                places.append(file.tell())
                file.write(_line(entry))
        self._whole = None
        return places

    def add(self, entry: JsonObject) -> int:
        """Appends an entry; returns its place.

        Raises:
            DetrkitError: The file cannot be written.
        """
        try:
            with self.path.open("ab") as file:
                if self._whole is not None:
                    file.truncate(self._whole)  # a truncated line would spoil the new one
                    self._whole = None
                file.seek(0, 2)
                place = file.tell()
                file.write(_line(entry))
        except OSError as error:
            raise DetrkitError(f"cannot write {self.path}: {error.strerror or error}") from error
        return place

    def remove(self) -> None:
        """Deletes the file, because the result of the work is written."""
        self.path.unlink(missing_ok=True)


def _line(entry: JsonObject) -> bytes:
    return json.dumps(entry).encode() + b"\n"
