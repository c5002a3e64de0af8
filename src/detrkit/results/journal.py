"""A record of finished work, one line each, from which an interrupted command can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_file
from detrkit.common.locks import hold
from detrkit.common.outputs import Output
from detrkit.common.schema import JsonObject

_Result = TypeVar("_Result")

_START, _MIDDLE = b'{"check": "', b'", "entry": '
_DIGITS = 16
_BODY = len(_START) + _DIGITS + len(_MIDDLE)

# Of the settings these may differ: when the work began, and by what name the model was called.
_NOT_COMPARED = ("date", "model")


class Journal:
    """Lines of JSON in a file: first the settings, then an entry for each finished piece of work.

    An entry is in the file as soon as :meth:`add` returns. A truncated last line is not an entry; any other
    line that is not as it was written is refused. Entries are addressed by their position in the file, so
    that none needs to be held in memory.
    """

    def __init__(
        self, path: Path, settings: JsonObject, is_valid: Callable[[Any], bool] = lambda entry: True
    ) -> None:
        """Opens a journal; nothing is written before :meth:`start`.

        Args:
            path: The file.
            settings: What the results depend on, such as the model's name.
            is_valid: Whether what a line holds is an entry.
        """
        self.path = path
        self.settings = dict(settings)
        self._is_valid = is_valid
        self._whole: int | None = None  # bytes of complete lines, if the file is an earlier run's
        self._lock: BinaryIO | None = None

    def output(self, option: str) -> Output:
        """The file as what a command is going to write."""
        return Output(option, self.path, _START)

    def exists(self) -> bool:
        """Whether there are entries of an earlier run, or could be."""
        return self.path.exists() and (not self.path.is_file() or self.path.stat().st_size > 0)

    def hold(self) -> None:
        """Keeps other processes from this journal until :meth:`close` or the end of the process.

        Raises:
            DetrkitError: Another process holds it.
        """
        if self._lock is None:
            self._lock = hold(self.path, self.path)

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Place and content of each entry; none if the file does not exist.

        After the last one, entries can be added.

        Raises:
            DetrkitError: The journal cannot be read, is damaged, or is from work with different settings.
        """
        place = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break
                    entry = _read(line)
                    if number == 1:
                        self.check(entry, self.path)
                    elif not isinstance(entry, dict) or not self._is_valid(entry):
                        raise DetrkitError(
                            f"line {number} of {self.path} is damaged; delete the line to process its image "
                            f"again, or start from scratch without --resume"
                        )
                    else:
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
            return dict(json.loads(file.readline())["entry"])

    def check(self, found: object, where: Path) -> None:
        """Compares the settings of earlier work with those of this one, and takes over its date.

        Raises:
            DetrkitError: They differ.
        """
        before = found if isinstance(found, dict) else {}
        for name, value in self.settings.items():
            if name not in _NOT_COMPARED and before.get(name) != value:
                model = f" of model {before.get('model')}" if name in ("weights", "revision") else ""
                raise DetrkitError(
                    f"cannot resume: {where} was made with {name} {before.get(name)}{model}, not {value}; "
                    "use the same settings, or start from scratch without --resume"
                )
        self.settings |= {name: before[name] for name in _NOT_COMPARED if name in before}

    def start(self, entries: Iterable[JsonObject] = ()) -> list[int]:
        """Atomically replaces the content with these entries; returns their places.

        Raises:
            DetrkitError: The file cannot be written, or another process holds it.
        """
        places = []
        self.hold()
        with atomic_file(self.path) as temporary, temporary.open("wb") as file:
            lock = hold(temporary, self.path)  # before others can see it under its final name
            file.write(_line(self.settings))
            for entry in entries:
                places.append(file.tell())
                file.write(_line(entry))
        self.close()
        self._lock = lock
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
        self.close()

    def close(self) -> None:
        """Lets other processes have the journal."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def match_results(
    earlier: Iterable[tuple[JsonObject, _Result]],
    position_of: Callable[[JsonObject], int | None],
    fingerprint: Callable[[int], str | None],
) -> tuple[dict[int, _Result], list[_Result]]:
    """Which results of an earlier run are those of this run's images: same name, same content.

    Args:
        earlier: The entry of each image in a journal, with its result; a later one of an image counts.
        position_of: Gives the position of this run's image of the same name as an entry's ``image``.
        fingerprint: Gives the fingerprint of the image at a position; None for one that has none.

    Returns:
        Position -> result, and the results of other images.
    """
    found, others = {}, []
    for entry, result in earlier:
        position = position_of(entry["image"])
        if position is None or entry["fingerprint"] is None or entry["fingerprint"] != fingerprint(position):
            others.append(result)
        else:
            found[position] = result
    return found, others


def position_by_name(names: Sequence[str]) -> Callable[[JsonObject], int | None]:
    """What gives the position of an image among those of these file names."""
    positions = {name: position for position, name in enumerate(names)}
    return lambda image: positions.get(image["file_name"])


def _line(entry: JsonObject) -> bytes:
    body = json.dumps(entry).encode()
    return _START + _check(body) + _MIDDLE + body + b"}\n"


def _check(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest()[:_DIGITS].encode()


def _read(line: bytes) -> object:
    """What a complete line holds; None if it is not as it was written."""
    body = line[_BODY:-2]
    try:
        return json.loads(body) if line == _START + _check(body) + _MIDDLE + body + b"}\n" else None
    except (ValueError, RecursionError):
        return None
