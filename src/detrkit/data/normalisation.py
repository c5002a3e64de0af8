"""Entries of a COCO document as exporters and people write them, read as what they mean.

Only what has one possible meaning is changed, and each change is counted. Everything else stays as it is, for
:func:`detrkit.data.check_dataset` to judge.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Document
from detrkit.data.documents import is_number, shortened
from detrkit.data.problems import Findings
from detrkit.processing.coco_masks import decode_segmentations

_NUMBER = re.compile(r"\s*[+-]?(\d{1,18}(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?\s*", re.ASCII)
_LARGEST_INTEGER = 2**53  # a float above it may stand for several integers


def normalise(document: Document, findings: Findings) -> Document:
    """A document whose numbers are numbers, whose names are text, and whose objects have boxes if possible.

    Args:
        document: Lists of any entries; not changed.
        findings: Where the changes are counted.
    """
    return {
        "images": [_image(entry, findings) for entry in document["images"]],
        "annotations": [_annotation(entry, findings) for entry in document["annotations"]],
        "categories": [_category(entry, findings) for entry in document["categories"]],
    }


def _image(entry: Any, findings: Findings) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    name = f"image {shortened(entry.get('id', entry.get('file_name', '?')))}"
    read = _with_integers(entry, ("id", "height", "width"), name, findings)
    sizes = [read[key] for key in ("height", "width") if key in read]
    if any(size is None or size == "" or (is_number(size) and size <= 0) for size in sizes):
        findings.add("unknown_size", f"{name} of {shortened(entry.get('file_name'))}")
        read = {key: value for key, value in read.items() if key not in ("height", "width")}
    return read


def _category(entry: Any, findings: Findings) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    read = _with_integers(entry, ("id",), f"category {shortened(entry.get('id', '?'))}", findings)
    name = read.get("name", read.get("id"))
    if name is None:
        name = read.get("id")
    if isinstance(name, (int, float)) and not isinstance(name, bool):
        text = str(int(name)) if isinstance(name, float) and name.is_integer() else str(name)
        findings.add("numeric_name", text)
        read["name"] = text
    return read


def _annotation(entry: Any, findings: Findings) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    name = f"annotation {shortened(entry['id'])}" if "id" in entry else "annotation without id"
    read = _with_integers(entry, ("id", "image_id", "category_id"), name, findings)
    crowd = read.get("iscrowd")
    if isinstance(crowd, (str, float)):
        _set(read, "iscrowd", _integer(crowd), name, findings)
    elif isinstance(crowd, bool):
        read["iscrowd"] = int(crowd)
    if isinstance(read.get("area"), str):
        _set(read, "area", _number(read["area"]), name, findings)
    if isinstance(read.get("segments_info"), list):
        read["segments_info"] = [
            _with_integers(segment, ("id", "category_id", "area"), f"a segment of {name}", findings)
            if isinstance(segment, Mapping)
            else segment
            for segment in read["segments_info"]
        ]
        return read
    box = read.get("bbox")
    if isinstance(box, (list, tuple)) and any(isinstance(value, str) for value in box):
        _set(read, "bbox", [_number(value) for value in box], name, findings)
    elif isinstance(box, tuple):
        read["bbox"] = list(box)
    polygon = read.get("segmentation")
    if isinstance(polygon, list) and len(polygon) >= 6 and all(map(is_number, polygon)):
        findings.add("flat_polygon", name)
        read["segmentation"] = [polygon]
    if not box and (found := _box_of(read.get("segmentation"))) is not None:
        findings.add("boxless", name)
        read["bbox"] = found
    elif not polygon and (found := _upright(read)) is not None:
        findings.add("rotated_box", name)
        read["bbox"], read["area"] = found, found[2] * found[3]
    return read


def _with_integers(
    entry: Mapping[str, Any], keys: Sequence[str], name: str, findings: Findings
) -> dict[str, Any]:
    read = dict(entry)
    for key in keys:
        if key in read and type(read[key]) is not int:
            _set(read, key, _integer(read[key]), name, findings)
    return read


def _set(entry: dict[str, Any], key: str, value: object, name: str, findings: Findings) -> None:
    """Sets a value that was read differently from how it is written."""
    if type(value) is not type(entry[key]) or value != entry[key]:
        findings.add("written_number", f"{name} with {key} {shortened(entry[key])}")
        entry[key] = value


def _integer(value: Any) -> Any:
    """The integer that a text or a whole float stands for; the value itself if it stands for none."""
    number = _number(value)
    if isinstance(number, float) and number.is_integer() and abs(number) <= _LARGEST_INTEGER:
        return int(number)
    return number if isinstance(number, int) else value


def _number(value: Any) -> Any:
    """The number that a text stands for; the value itself if it is not such a text."""
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    return float(value) if re.search(r"[.eE]", value) else int(value)


def _upright(entry: Mapping[str, Any]) -> list[float] | None:
    """The upright box around one that CVAT has rotated; None if it is not rotated.

    CVAT writes the box as it was before, and the angle around its centre in degrees as an attribute.
    """
    box, attributes = entry.get("bbox"), entry.get("attributes")
    angle = _number(attributes.get("rotation")) if isinstance(attributes, Mapping) else None
    if not isinstance(angle, (int, float)) or not is_number(angle) or angle % 180 == 0:
        return None
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return None
    left, top, width, height = box
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    wide, high = width * cosine + height * sine, width * sine + height * cosine
    return [left + (width - wide) / 2, top + (height - high) / 2, wide, high]


def _box_of(segmentation: Any) -> list[float] | None:
    """The box around polygons or run lengths; None if there are none."""
    if isinstance(segmentation, list) and segmentation:
        if not all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in segmentation):
            return None
        points = [value for part in segmentation for value in part]
        if not all(map(is_number, points)):
            return None
        xs, ys = points[::2], points[1::2]
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    if isinstance(segmentation, Mapping):
        try:
            height, width = (int(length) for length in segmentation["size"])
            if not 0 < height * width <= 2**28:
                return None
            (mask,) = decode_segmentations([segmentation], height, width, "?")
        except (AnnotationError, KeyError, TypeError, ValueError, OverflowError):
            return None
        if not mask.any():
            return None
        xs, ys = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (0, 1))
        return [float(length) for length in (xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0])]
    return None
