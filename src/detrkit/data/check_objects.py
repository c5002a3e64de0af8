"""Checks of the annotations of a data set: boxes, segmentations and panoptic segments."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from itertools import count
from numbers import Real
from pathlib import Path
from typing import TypeAlias

import numpy as np

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Annotation, Segment
from detrkit.data.image_sizes import ImageSize, read_image_sizes
from detrkit.data.problems import Findings, fault_of
from detrkit.processing.images import load_image
from detrkit.processing.panoptic_png import rgb_to_id

_OUTSIDE_TOLERANCE = 1.0  # pixels; annotation tools round, and COCO's own boxes exceed images by fractions
_LARGEST = 1e30  # products of two numbers below it are still finite
_CORNER_SHARE = 0.1  # of boxes that exceed their image, above which all of them may be meant as two corners

Sizes: TypeAlias = Mapping[int, "tuple[int, int] | None"]
"""(height, width) in pixels by image id; None where it is not known, as without image files."""


def refuse_fractions(rows: Sequence[Annotation], source: str) -> None:
    """Raises an AnnotationError if no box is larger than a pixel: they are fractions of the image."""
    boxes = [row["bbox"] for row in rows if _is_box(row.get("bbox"))]
    if boxes and all(0 <= value <= 1 for box in boxes for value in box):
        raise AnnotationError(
            f"{source}: all {len(boxes)} boxes are smaller than a pixel, such as {boxes[0]}: they seem to "
            f"be normalised to 0..1, but COCO uses pixels; multiply them by the image's width and height"
        )


def find_corner_boxes(rows: Sequence[Annotation], sizes: Sizes, findings: Findings) -> None:
    """Notes boxes that exceed their image, if all boxes fit as two corners and many do not otherwise."""
    exceeding = []
    boxes = 0
    for row in rows:
        size = sizes[row["image_id"]]
        if size is None or not _is_box(row.get("bbox")):
            continue
        x, y, width, height = row["bbox"]
        if not (x < width <= size[1] + _OUTSIDE_TOLERANCE and y < height <= size[0] + _OUTSIDE_TOLERANCE):
            return
        boxes += 1
        if max(x + width - size[1], y + height - size[0]) > _OUTSIDE_TOLERANCE:
            exceeding.append(
                f"annotation {name_of_row(row)} with bbox {row['bbox']} in an image of {size[1]}x{size[0]}"
            )
    if len(exceeding) > max(1, _CORNER_SHARE * boxes):
        for example in exceeding:
            findings.add("corner_boxes", example)


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(value, Real) and not isinstance(value, bool) for value in box)
    )


def check_objects(
    rows: list[Annotation],
    sizes: Sizes,
    category_ids: Mapping[int, int],
    findings: Findings,
    masks: bool,
) -> list[Annotation]:
    """Usable annotations of a detection file, their boxes within the image."""
    kept: list[Annotation] = []
    ids: set[int] = set()
    seen: dict[tuple[float, ...], set[int | None]] = {}
    new_ids = count(1 + max((row["id"] for row in rows if isinstance(row.get("id"), int)), default=0))
    for row in rows:
        size = sizes[row["image_id"]]
        problem = _problem_with_object(row, size, category_ids)
        if problem is None and masks:
            problem = _problem_with_segmentation(row, size)
        if problem:
            findings.add(*problem)
            continue
        category = category_ids[row["category_id"]]
        crowd = int(row.get("iscrowd") or 0)
        # Objects of one box may have different masks.
        outline = hash(repr(row["segmentation"])) if row.get("segmentation") else None
        outlines = seen.setdefault((row["image_id"], category, crowd, *row["bbox"]), set())
        if outlines and (outline is None or outline in outlines or None in outlines):
            findings.add("identical_annotation", f"annotation {name_of_row(row)}")
            continue
        outlines.add(outline)
        box = row["bbox"]
        area = row.get("area")
        if not isinstance(area, Real) or isinstance(area, bool) or not math.isfinite(area):
            area = None
        if size is not None and (beyond := _beyond(box, size)) > _OUTSIDE_TOLERANCE:
            findings.add("clipped_box", f"annotation {name_of_row(row)} by {beyond:g} pixels")
            area = None if area == box[2] * box[3] else area
            box = _clipped(box, size)
        number = row.get("id")
        if not isinstance(number, int) or number in ids:
            if number is not None:
                findings.add("duplicate_annotation_id", str(number))
            number = next(new_ids)
        ids.add(number)
        mended: Annotation = {"id": number, "category_id": category, "iscrowd": crowd, "bbox": box}
        kept.append({**row, **mended, "area": box[2] * box[3] if area is None else area})
    return kept


def _beyond(box: Sequence[float], size: tuple[int, int]) -> float:
    """How far a box exceeds its image, in pixels."""
    x, y, width, height = box
    return max(-x, -y, x + width - size[1], y + height - size[0])


def _clipped(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    x, y, width, height = box
    left, top = max(0, x), max(0, y)
    return [left, top, min(x + width, size[1]) - left, min(y + height, size[0]) - top]


def _problem_with_object(
    row: Annotation, size: tuple[int, int] | None, known: Container[int]
) -> tuple[str, str] | None:
    name = f"annotation {name_of_row(row)}"
    fault = fault_of(row, {"category_id": int, "bbox": list})
    if fault:
        return "broken_entry", f"{name} {fault}"
    box = row["bbox"]
    if not _is_box(box):
        return "broken_entry", f"{name} has bbox {box}, not four numbers"
    if row["category_id"] not in known:
        return "unknown_category", f"{name}, category {row['category_id']}"
    if (row.get("iscrowd") or 0) not in (0, 1):
        return "broken_entry", f"{name} has iscrowd {row['iscrowd']}, not 0 or 1"
    x, y, width, height = box
    if not all(abs(value) <= _LARGEST for value in box) or width <= 0 or height <= 0:
        return "degenerate_box", f"{name} with bbox {box}"
    if size is None:
        return None
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        return "outside_box", f"{name} with bbox {box} in an image of {size[1]}x{size[0]}"
    return None


def _problem_with_segmentation(row: Annotation, size: tuple[int, int] | None) -> tuple[str, str] | None:
    """What is wrong with the format of a segmentation, without decoding it."""
    segmentation = row.get("segmentation")
    if isinstance(segmentation, list):
        sound = bool(segmentation) and all(map(_is_polygon, segmentation))
    elif isinstance(segmentation, Mapping):
        stated = segmentation.get("size")
        sound = "counts" in segmentation and (size is None or stated in (list(size), size))
    else:
        sound = False
    if sound:
        return None
    shape = "" if size is None else f" [{size[0]}, {size[1]}]"
    return (
        "broken_segmentation",
        f"annotation {name_of_row(row)} must have polygons of three points or more, or run lengths with "
        f"counts and size{shape}",
    )


def _is_polygon(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(isinstance(coordinate, (int, float)) and coordinate == coordinate for coordinate in value)
    )


def check_panoptic(
    folder: Path,
    rows: list[Annotation],
    sizes: Sizes,
    category_ids: Mapping[int, int],
    findings: Findings,
    decode: bool,
) -> list[Annotation]:
    """Usable annotations of a panoptic file: one for each image that has a PNG."""
    by_image: dict[int, Annotation] = {}
    for row in rows:
        if findings.lacks(
            row, {"file_name": str, "segments_info": list}, f"annotation of image {row['image_id']}"
        ):
            continue
        if row["image_id"] in by_image:
            findings.add("identical_annotation", f"image {row['image_id']}")
        else:
            by_image[row["image_id"]] = row
    with_row = {row["image_id"] for row in rows}
    for image_id in sizes:
        if image_id not in with_row:
            findings.add("missing_panoptic", str(image_id))
    pngs = read_image_sizes([folder / row["file_name"] for row in by_image.values()], decode=decode)
    kept: list[Annotation] = []
    for row, size in zip(by_image.values(), pngs):
        if not isinstance(size, ImageSize) or size.frame(False) != sizes[row["image_id"]]:
            why = f": {size.width}x{size.height}" if isinstance(size, ImageSize) else ""
            findings.add("broken_panoptic", f"{folder / row['file_name']}{why}")
            continue
        segments: dict[int, Segment] = {}
        for segment in row["segments_info"]:
            name = f"a segment of image {row['image_id']}"
            if findings.lacks(segment, {"id": int, "category_id": int}, name):
                continue
            if segment["category_id"] not in category_ids:
                findings.add("unknown_category", f"{name}, category {segment['category_id']}")
            elif segment["id"] in segments:
                findings.add("identical_annotation", f"segment {segment['id']} of image {row['image_id']}")
            else:
                category = category_ids[segment["category_id"]]
                segments[segment["id"]] = {**segment, "category_id": category}
        whole = list(segments.values())
        if not all(isinstance(segment.get("area"), Real) for segment in whole):
            whole = _with_areas(whole, folder / row["file_name"])
        kept.append({**row, "segments_info": whole})
    return kept


def _with_areas(segments: Sequence[Segment], png: Path) -> list[Segment]:
    """Segments with their numbers of pixels."""
    ids, areas = np.unique(rgb_to_id(np.asarray(load_image(png))), return_counts=True)
    counts = dict(zip(ids.tolist(), areas.tolist()))
    return [{**segment, "area": counts.get(segment["id"], 0)} for segment in segments]


def name_of_row(row: Annotation) -> str:
    """The name of an annotation in messages."""
    return str(row["id"]) if isinstance(row, Mapping) and "id" in row else "without id"
