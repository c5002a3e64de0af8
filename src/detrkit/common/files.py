"""Reading and writing files; an interrupt or a full disk never leaves half a file under its final name."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from detrkit.common.errors import DetrkitError
from detrkit.common.locks import locked
from detrkit.common.text import first_line

_GZIP = b"\x1f\x8b"
_LARGEST_UNPACKED = 2**32  # bytes; COCO's annotations of its training images take half a gigabyte

PRETRAINED = Path(__file__).parent.parent / "pretrained"
"""Folder of the models that come with the package."""


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuses, before any work, a file or folder that cannot be written or created.

    Args:
        path: The file, or the folder to write files to. It need not exist, and is not created.

    Raises:
        DetrkitError: ``path`` cannot be written.
    """
    nearest = Path(os.path.realpath(path))
    try:
        if nearest.is_file():
            nearest = nearest.parent  # it will be replaced
        while not nearest.exists():
            nearest = nearest.parent
        # Permissions alone do not show it: root has them all, also on a read-only file system.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = f"{nearest}: {error.strerror or error}"
        raise DetrkitError(f"cannot write {path} ({reason}); choose another place") from error


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, and renames it to ``path`` when the block succeeds.

    A file that is replaced passes its mode on. A link is followed, and its target replaced. A pipe or device
    is written to at the end, since renaming would replace it with a file.

    Args:
        path: Final name. Missing parent folders are created. The temporary name keeps the suffix, because
            some libraries choose the format by it.

    Raises:
        DetrkitError: The file cannot be written (disk full, read-only, ``path`` is a folder).
    """
    path = Path(path)
    special = path.exists() and not path.is_file() and not path.is_dir()
    if not special:  # the target of a link such as /dev/stdout has no name if it is a pipe
        path = Path(os.path.realpath(path))
    temporary = _temporary_name(path, Path(tempfile.gettempdir()) if special else path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(0o600 if special else 0o666, exist_ok=False)
        yield temporary
        if special:
            with temporary.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        else:
            keep_mode(path, temporary)
            temporary.replace(path)
    except OSError as error:
        raise DetrkitError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``, and moves its files to ``path`` when the block succeeds.

    Files in ``path`` with the same names are replaced and pass their modes on, others are kept.

    Args:
        path: Final folder, created if missing.

    Raises:
        DetrkitError: The folder cannot be written (disk full, read-only, ``path`` is a file), or another
            process writes it.
    """
    path = Path(path)
    temporary = _temporary_name(path, path.parent)
    place = Path(os.path.abspath(path))  # noqa: PTH100 - "." has no name
    try:
        with locked(place.with_name(f".{place.name}.lock"), path):
            if path.exists() and not path.is_dir():
                raise DetrkitError(f"cannot write into {path}: it is a file, not a folder")
            temporary.mkdir()
            yield temporary
            if path.exists():
                _move_into(path, temporary)
            else:
                temporary.rename(path)
    except OSError as error:
        raise DetrkitError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary)


def _move_into(path: Path, folder: Path) -> None:
    """Moves what is in a folder into another one, and what is in its folders into those of the same name."""
    for item in folder.iterdir():
        target = path / item.name
        if item.is_dir() and target.is_dir():
            _move_into(target, item)
        else:
            keep_mode(target, item)
            item.replace(target)


def keep_mode(path: Path, new: Path) -> None:
    """Gives a new file the mode of the file that it is about to replace, if there is one."""
    with suppress(FileNotFoundError):
        new.chmod(stat.S_IMODE(path.stat().st_mode))


def content_hash(path: str | os.PathLike[str]) -> str:
    """What is the same for files of the same content: "sha256:" and the digest.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def write_json(document: Mapping[str, object], path: Path) -> None:
    """Writes a document to a file, completely or not at all, to a pipe or device, or for ``-`` to stdout.

    Raises:
        DetrkitError: ``path`` cannot be written.
    """
    write_text([json.dumps(document), "\n"], path)


def write_text(parts: Iterable[str], path: Path) -> None:
    """Writes the parts of a text in order, to the places that :func:`write_json` writes to.

    Raises:
        DetrkitError: ``path`` cannot be written.
    """
    if str(path) == "-":
        sys.stdout.writelines(parts)
        return
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(parts)


def read_json(
    path: str | os.PathLike[str],
    error_type: type[DetrkitError] = DetrkitError,
    remedy: str = "",
    *,
    compressed: bool = False,
) -> Any:
    """The content of a JSON file.

    Args:
        path: The file.
        error_type: The kind of error to raise.
        remedy: What the error suggests for an invalid file.
        compressed: Whether the file may be compressed with gzip, whatever its name.

    Raises:
        DetrkitError: The file cannot be read or is not JSON.
    """
    hint = f"; {remedy}" if remedy else ""
    try:
        content = Path(path).read_bytes()
        if compressed and content.startswith(_GZIP):
            content = _decompressed(content)
        return json.loads(content)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise error_type(f"cannot read {path}: {reason}{hint}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
        raise error_type(f"{path} is not a JSON file: {first_line(error)}{hint}") from error


def _decompressed(content: bytes) -> bytes:
    """The content of a gzip file; a ValueError if it is out of proportion."""
    with gzip.open(io.BytesIO(content)) as stream:
        unpacked = stream.read(_LARGEST_UNPACKED + 1)
    if len(unpacked) > _LARGEST_UNPACKED:
        raise ValueError(f"it unpacks to more than {_LARGEST_UNPACKED} bytes")
    return unpacked


def _temporary_name(path: Path, folder: Path) -> Path:
    """A hidden name in ``folder``, known before the file exists: an interrupt at any moment can remove it."""
    return folder / f".{path.stem[:40]}-{secrets.token_hex(8)}{path.suffix}"
