"""The one place that decides whether a command may write a file: never over an input or somebody's own file.

What detrkit writes bears a mark near its beginning, so that a later run can tell its own results, which it
may replace, from files of other origin.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from detrkit.common.errors import SettingError
from detrkit.common.files import check_writable
from detrkit.common.text import is_url

_HEAD = 4096  # bytes of a file in which its mark is

DOCUMENT_MARK = b'{"info": {"tool": "detrkit '
"""How JSON documents begin."""

SOFTWARE = "detrkit"
"""The text chunk ``Software`` of PNG files."""

COMMENT = "written by detrkit"
"""The comment of JPEG files."""

PNG_MARK, JPEG_MARK = b"tEXtSoftware\0detrkit", b"\xff\xfe\x00\x14written by detrkit"


@dataclass(frozen=True)
class Output:
    """A file that a command is going to write.

    Attributes:
        option: What the user gave it by, such as ``--json``.
        path: The file; ``-`` for stdout.
        mark: What a file that detrkit wrote there has near its beginning; one of them if there are several.
        witness: The file beside it that bears the mark, where its own format has no place for one.
        at_end: Whether the mark may be near the end instead, as in MP4 files.
    """

    option: str
    path: Path
    mark: bytes | tuple[bytes, ...]
    witness: str | None = None
    at_end: bool = False

    @property
    def is_own(self) -> bool:
        """Whether the file that is there was written by detrkit, or holds nothing."""
        marked = self.path if self.witness is None else self.path.with_name(self.witness)
        return not self.path.stat().st_size or has_mark(marked, self.mark, at_end=self.at_end)


def document_output(option: str, path: Path) -> Output:
    """A JSON document that begins with :data:`DOCUMENT_MARK`."""
    return Output(option, path, DOCUMENT_MARK)


def image_output(option: str, path: Path) -> Output:
    """A drawing or another image, in the format of its suffix."""
    return Output(option, path, PNG_MARK if path.suffix.lower() == ".png" else JPEG_MARK)


def video_output(option: str, path: Path) -> Output:
    """A drawn video."""
    return Output(option, path, COMMENT.encode(), at_end=True)


def has_mark(path: Path, mark: bytes | tuple[bytes, ...], *, at_end: bool = False) -> bool:
    """Whether a file has a mark, or one of several, near its beginning, or if allowed near its end."""
    try:
        with path.open("rb") as file:
            seen = file.read(_HEAD)
            if at_end:
                file.seek(-min(_HEAD, path.stat().st_size), 2)
                seen += file.read()
            return any(one in seen for one in (mark if isinstance(mark, tuple) else (mark,)))
    except OSError:
        return False


def check_outputs(
    outputs: Sequence[Output], inputs: Iterable[str | os.PathLike[str] | None], *, overwrite: bool = False
) -> None:
    """Refuses, before any work, outputs that would cost the user a file or cannot be written.

    Pipes, devices and stdout pass: nothing is lost there.

    Args:
        outputs: All files that the command is going to write.
        inputs: The files, folders and addresses that it reads. An input is never replaced; in a folder that
            is read, only results of earlier runs are.
        overwrite: Whether files that detrkit did not write may be replaced.

    Raises:
        SettingError: A file is a folder, is an input, is named twice, or was not written by detrkit.
        DetrkitError: A file cannot be written.
    """
    named = [Path(item) for item in inputs if item is not None and not is_url(os.fspath(item))]
    read = {identity for path in named if (identity := _identity(path)) is not None}
    folders = [Path(os.path.realpath(path)) for path in named if os.path.isdir(path)]  # noqa: PTH112 - never raises
    taken: dict[str, Output] = {}
    for output in outputs:
        path, option = output.path, output.option
        if str(path) == "-":
            continue
        if path.is_dir():
            raise SettingError(f"{option} must be a file, but {path} is a folder")
        if path.exists() and not path.is_file():
            continue
        real = Path(os.path.realpath(path))
        other = taken.setdefault(fold_name(str(real)), output)
        if other is not output:
            raise SettingError(f"{option} and {other.option} would both write {path}; choose another place")
        if path.is_file():
            _check_replacement(output, read, any(real.is_relative_to(f) for f in folders), overwrite)
    for path in {output.path.parent: output.path for output in reversed(taken.values())}.values():
        check_writable(path)  # one file of each folder


def _check_replacement(output: Output, read: set[tuple[int, int]], in_folder: bool, overwrite: bool) -> None:
    """Raises a SettingError if an existing file must not be replaced."""
    path, option = output.path, output.option
    own = output.is_own
    if _identity(path) in read or (in_folder and not (own and output.witness is None)):
        raise SettingError(f"{option} would overwrite the input {path}; choose another place")
    if not path.stat().st_mode & 0o222 and not overwrite:
        raise SettingError(
            f"{option} would overwrite {path}, which is write-protected; choose another place, or add "
            "--overwrite"
        )
    if not own and not overwrite:
        raise SettingError(
            f"{option} would overwrite {path}, which detrkit did not write; choose another place, or add "
            "--overwrite"
        )


def unique_names(names: Iterable[str]) -> list[str]:
    """The names, numbered where two would be one file, even if case and the form of accents do not count."""
    taken: set[str] = set()
    unique = []
    for wanted in names:
        stem, suffix = os.path.splitext(wanted)  # noqa: PTH122 - a name, not a path
        name, number = wanted, 2
        while fold_name(name) in taken:
            name, number = f"{stem}-{number}{suffix}", number + 1
        taken.add(fold_name(name))
        unique.append(name)
    return unique


def fold_name(name: str) -> str:
    """A file name in the form in which file systems that ignore case compare it."""
    return unicodedata.normalize("NFC", name).casefold()


def _identity(path: Path) -> tuple[int, int] | None:
    """What is the same for all names of a file: device and number on it."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
