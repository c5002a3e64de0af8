"""Detections as rows: one for each object, one for each image, or one line of JSON for each image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from detrkit import __version__
from detrkit.common.schema import Annotation, JsonObject

Cell: TypeAlias = str | int | float | None

_FILE, _TOTAL = "file_name", "total"
_FRAME = ("frame_index", "timestamp")
_OBJECT = ("label", "name", "score", "x0", "y0", "x1", "y1", "width", "height")

OBJECTS_MARK = ",".join(_OBJECT).encode()
"""What the heading of a table of objects ends with."""

COUNTS_MARKS = (b"file_name,total,", b"file_name,frame_index,timestamp,total,")
"""What a table of counts begins with."""

LINES_MARK = b'{"tool": "detrkit '
"""What every line of JSON begins with."""


def object_columns(*, frames: bool = False, tracks: bool = False) -> list[str]:
    """The columns of a table of objects.

    Args:
        frames: Whether images are frames, which have an index and a time.
        tracks: Whether objects are followed from frame to frame.
    """
    return [_FILE, *(_FRAME if frames else ()), *(["track_id"] if tracks else ()), *_OBJECT]


def object_rows(
    image: JsonObject,
    annotations: Iterable[Annotation],
    names: Mapping[int, str],
    *,
    frames: bool = False,
    tracks: bool = False,
) -> Iterator[list[Cell]]:
    """A row for each object of an image, with the columns of :func:`object_columns`.

    Args:
        image: The image as in a COCO document.
        annotations: Its objects as in a COCO document.
        names: Label -> class name.
        frames: As for the columns.
        tracks: As for the columns.
    """
    file = _file_cells(image, frames)
    for found in annotations:
        label = found["category_id"]
        row: list[Cell] = [*file, found.get("track_id")] if tracks else [*file]
        row += [label, names.get(label, str(label)), found["score"]]
        row += corners(found["bbox"])
        row += [image["width"], image["height"]]
        yield row


def count_columns(names: Mapping[int, str], *, frames: bool = False) -> list[str]:
    """The columns of a table of counts: the file, all objects, then one column for each class.

    Classes of one name, or called as another column is, get their label behind their name.

    Args:
        names: Label -> class name.
        frames: Whether images are frames, which have an index and a time.
    """
    first = [_FILE, *(_FRAME if frames else ()), _TOTAL]
    uses = Counter(first) + Counter(names.values())
    return [*first, *(n if uses[n] == 1 else f"{n} ({label})" for label, n in sorted(names.items()))]


def count_row(
    image: JsonObject, annotations: Iterable[Annotation], names: Mapping[int, str], *, frames: bool = False
) -> list[Cell]:
    """The row of an image with the columns of :func:`count_columns`.

    Arguments are those of :func:`object_rows`.
    """
    counts = Counter(found["category_id"] for found in annotations)
    return [*_file_cells(image, frames), counts.total(), *(counts[label] for label in sorted(names))]


def json_line(image: JsonObject, annotations: Iterable[Annotation], names: Mapping[int, str]) -> str:
    """An image as one line of JSON; arguments as for :func:`object_rows`.

    It holds what the image's entry in a COCO document does, and ``objects``: for each ``label``, ``name``,
    ``score`` and ``box`` (x0, y0, x1, y1 in pixels), and ``track_id`` where objects are followed.
    """
    objects = []
    for found in annotations:
        label = found["category_id"]
        entry = {"label": label, "name": names.get(label, str(label)), "score": found["score"]}
        track = {"track_id": found["track_id"]} if "track_id" in found else {}
        objects.append({**entry, "box": corners(found["bbox"]), **track})
    about = {name: value for name, value in image.items() if name != "id"}
    return json.dumps({"tool": f"detrkit {__version__}", **about, "objects": objects}) + "\n"


def corners(bbox: Sequence[float]) -> list[float]:
    """x0, y0, x1, y1 of a COCO box, each the float of fewest digits that is the same float32."""
    import numpy as np  # only where there are results: the command line reads its options without

    x, y, width, height = np.asarray(bbox, dtype=np.float32)
    return [float(str(value)) for value in (x, y, x + width, y + height)]


def _file_cells(image: JsonObject, frames: bool) -> list[Cell]:
    if not frames:
        return [image[_FILE]]
    # The frame has a column of its own.
    index = image.get("frame_index")
    name = image[_FILE] if index is None else (image[_FILE] or "").removesuffix(f"#frame={index + 1}")
    return [name, index, image.get("timestamp")]
