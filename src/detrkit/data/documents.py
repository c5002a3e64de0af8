"""Reading COCO's JSON documents and other tools' lists, with one clear message for an invalid one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from detrkit.common.errors import AnnotationError
from detrkit.common.files import read_json
from detrkit.common.schema import Category, Document

# Products of two numbers below it are still finite.
_LARGEST = 1e30

DocumentSource: TypeAlias = Document | str | os.PathLike[str]
"""A COCO document, or the path of its file."""


def read_lists(source: DocumentSource, *lists: str) -> Document:
    """Reads a COCO document, whose lists may have any entries.

    Args:
        source: The document, or its JSON file.
        lists: Keys that must have a list.

    Raises:
        AnnotationError: The file cannot be read, is not a JSON object, or does not have all of the lists.
    """
    document: Any = source
    if isinstance(source, (str, os.PathLike)):
        document = read_json(source, AnnotationError, compressed=True)
    name = name_of(source)
    if (other := _other_format(document)) is not None:
        raise AnnotationError(f"{name} is not a COCO document but {other}")
    if not isinstance(document, Mapping):
        raise AnnotationError(f"{name} is not a COCO document: it contains a {type(document).__name__}")
    lacking = [key for key in lists if not isinstance(document.get(key), list)]
    if lacking:
        there = ", ".join(map(str, document)) or "nothing"
        raise AnnotationError(
            f"{name} is not a COCO document: it has no list of {' and '.join(lacking)} (it has {there})"
        )
    copied: Any = dict(document)
    return copied


def _other_format(document: Any) -> str | None:
    """What a JSON file of another annotation tool is, and how to get COCO JSON; None if unknown."""
    values = list(document.values()) if isinstance(document, Mapping) else document
    if isinstance(document, Mapping) and "_via_img_metadata" in document:
        values = list(document["_via_img_metadata"].values()) or [{"regions": [], "filename": ""}]
    first = values[0] if isinstance(values, list) and values else None
    keys = set(first) if isinstance(first, Mapping) else set()
    if {"filename", "regions"} <= keys:
        return "a project of VIA (VGG Image Annotator); export annotations there in COCO format"
    if isinstance(document, Mapping) and {"shapes", "imagePath"} <= set(document):
        return "LabelMe's annotation of one image; convert its folder with labelme2coco"
    if isinstance(document, list) and "data" in keys and keys & {"annotations", "completions"}:
        return "Label Studio's own export; choose the export format COCO there"
    if isinstance(document, list) and {"image_id", "category_id", "score"} <= keys:
        return "a list of detections (COCO results); pass the ground truth instead"
    return None


def read_document(source: DocumentSource, *lists: str) -> Document:
    """Reads a COCO document like :func:`read_lists`; each list must hold objects, at least one."""
    document: Any = read_lists(source, *lists)
    for key in lists:
        if not all(isinstance(entry, Mapping) for entry in document[key]):
            raise AnnotationError(
                f"{name_of(source)} is not a COCO document: {key} contains something other than objects"
            )
        if not document[key]:
            raise AnnotationError(f"{name_of(source)} has no {key}, so nothing can be evaluated")
    return document


def category_name(category: Category) -> str:
    """The name of a category of a COCO document; its id if it has no name."""
    return str(category.get("name", category["id"]))


def name_of(source: object) -> str:
    """The name of a document in errors."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else "the document"


def whole_number(entry: Mapping[str, object], key: str, what: str) -> int:
    """A value that must be an integer, such as an id; else an AnnotationError."""
    value = field(entry, key, what)
    if not isinstance(value, int) or isinstance(value, bool):
        raise AnnotationError(f"{what} has the {key} {shortened(value)}, which is not a whole number")
    return value


def number(entry: Mapping[str, object], key: str, what: str) -> float:
    """A value that must be a finite number; else an AnnotationError."""
    value = field(entry, key, what)
    if not is_number(value):
        raise AnnotationError(f"{what} has the {key} {shortened(value)}, which is not a number")
    return float(value)


def box_of(entry: Mapping[str, object], what: str) -> list[float]:
    """A ``bbox`` of x, y, width and height; an AnnotationError if it is missing or not four numbers."""
    box = field(entry, "bbox", what)
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)):
        raise AnnotationError(f"{what} has a bbox that is not four numbers (x, y, width, height)")
    return [float(value) for value in box]


def is_number(value: object) -> bool:
    """Whether a value of a document is a number in the range of a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def shortened(value: object) -> str:
    """A value for a message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def field(entry: Mapping[str, object], key: str, what: str) -> Any:
    """A value that an entry must have; if it is missing, an AnnotationError that calls the entry ``what``."""
    if key not in entry:
        raise AnnotationError(f"{what} has no {key!r} (it has {', '.join(map(str, entry)) or 'nothing'})")
    return entry[key]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that hold something, with their numbers from 1.

    Raises:
        AnnotationError: It cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise AnnotationError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
