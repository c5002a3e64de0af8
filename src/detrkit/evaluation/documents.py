"""Reading COCO's JSON files, with one clear message for a file that is none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detrkit.errors import AnnotationError


def read_document(path: str | os.PathLike[str], *lists: str) -> dict[str, Any]:
    """Reads a COCO document.

    Args:
        path: A JSON file.
        lists: Keys that must hold a list of objects with at least one entry.

    Raises:
        AnnotationError: The file cannot be read, is no JSON object, or lacks one of the lists.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise AnnotationError(f"{path} is not a COCO document: it holds a {type(document).__name__}")
    for key in lists:
        entries = document.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise AnnotationError(f"{path} is not a COCO document: it has no list of {key}")
        if not entries:
            raise AnnotationError(f"{path} has no {key}, so there is nothing to evaluate")
    return document


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises:
        AnnotationError: The file cannot be found or read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not JSON, or not text
        raise AnnotationError(f"{path} is not a JSON file: {error}") from error


def field(entry: dict[str, Any], key: str, what: str) -> Any:
    """A value that an entry of a document must have.

    Raises:
        AnnotationError: It has none; ``what`` names the entry.
    """
    if key not in entry:
        raise AnnotationError(f"{what} has no {key!r} (it has {', '.join(map(str, entry)) or 'nothing'})")
    return entry[key]
