"""Files that the commands write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detrkit.errors import DetrkitError
from detrkit.files import atomic_file


def check_json_file(json_file: Path | None) -> None:
    """Refuses, before any work, a folder where ``--json`` needs a file.

    Raises:
        DetrkitError: It is a folder.
    """
    if json_file is not None and json_file.is_dir():
        raise DetrkitError(f"--json needs a file, but {json_file} is a folder")


def write_json(document: dict[str, Any], path: Path) -> None:
    """Writes a document into a file, whole or not at all, into a pipe or device, or for ``-`` to stdout.

    Raises:
        DetrkitError: It cannot be written.
    """
    text = json.dumps(document)
    if str(path) == "-":
        print(text)
    elif path.exists() and not path.is_file():
        _write_to_device(text + "\n", path)
    else:
        with atomic_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _write_to_device(text: str, path: Path) -> None:
    """Writes into a pipe or device such as /dev/null, which must not be replaced by a file."""
    try:
        with path.open("w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise DetrkitError(f"cannot write {path}: {error.strerror or error}") from error
