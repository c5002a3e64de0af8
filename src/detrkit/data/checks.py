"""Checks of a data set before training or evaluation: its problems, and the data set without them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from numbers import Real
from pathlib import Path

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Annotation, Category, Document, Image, Segment
from detrkit.data.coco import DetectionDataset
from detrkit.data.image_sizes import read_image_sizes
from detrkit.processing.annotations import decode_segmentations

logger = logging.getLogger("detrkit")

_OUTSIDE_TOLERANCE = 1.0  # pixels; annotation tools round, and COCO's own boxes exceed images by fractions

# The description of each kind of problem, and what happens to the entries that have it.
_KINDS = {
    "missing_image": ("image file missing", "dropped"),
    "unreadable_image": ("image file unreadable", "dropped"),
    "size_mismatch": ("image size differs from the annotation file", "dropped"),
    "duplicate_image_id": ("image id used for several entries", "dropped"),
    "duplicate_file_name": ("image file listed twice", "dropped"),
    "missing_panoptic": ("image without panoptic annotation", "dropped"),
    "broken_panoptic": ("panoptic PNG missing, unreadable or of a different size", "dropped"),
    "duplicate_category": ("category id or name used twice", "merged"),
    "broken_entry": ("entry with a missing or malformed key", "dropped"),
    "unknown_image": ("annotation refers to an image that is not listed", "dropped"),
    "unknown_category": ("annotation refers to a category that is not listed", "dropped"),
    "degenerate_box": ("box without area or with infinite values", "dropped"),
    "outside_box": ("box completely outside its image", "dropped"),
    "clipped_box": ("box partly outside its image", "clipped"),
    "broken_segmentation": ("segmentation missing or malformed", "dropped"),
    "identical_annotation": ("annotation listed twice", "dropped"),
    "duplicate_annotation_id": ("annotation id used twice", "renumbered"),
}


@dataclass(frozen=True)
class Problem:
    """One kind of problem.

    Attributes:
        kind: Its name, such as ``"missing_image"``.
        count: Number of images or annotations that have it.
        example: The first of them.
    """

    kind: str
    count: int
    example: str

    def __str__(self) -> str:
        name, action = _KINDS[self.kind]
        return f"{name}: {self.count} {action} (first: {self.example})"


@dataclass(frozen=True)
class DatasetReport:
    """The result of ``check_dataset``.

    Attributes:
        dataset: The data set without the entries that have problems.
        problems: The kinds of problems found, those of images first.
        images: Number of usable images.
        objects: Number of usable annotated objects, including crowds.
        empty_images: Number of usable images without objects, which are not a problem.
    """

    dataset: DetectionDataset
    problems: tuple[Problem, ...]
    images: int
    objects: int
    empty_images: int

    def __str__(self) -> str:
        summary = f"{self.dataset.source}: {self.images} images, {self.objects} objects"
        if self.empty_images:
            summary += f", {self.empty_images} images without objects"
        return "\n".join([summary, *map(str, self.problems)])


def check_dataset(dataset: DetectionDataset, *, strict: bool = False, decode: bool = False) -> DatasetReport:
    """Finds entries that would break or distort training and evaluation, and leaves them out.

    Reads only the headers of image files. Each kind of problem is logged as one line.

    Args:
        dataset: The data set as it was read.
        strict: Raise an error if there is any problem. Images without objects are not a problem.
        decode: Decode every image, which also finds truncated files; takes a few milliseconds per image.

    Returns:
        The report, with a data set in which every image has a size and every annotation an ``id``, ``area``
        and ``iscrowd``.

    Raises:
        AnnotationError: No usable image or object is left, or ``strict`` is set and there are problems.
        MissingExtraError: Polygons must be converted to masks, and no package that can do so is installed.
    """
    findings = _Findings()
    categories, ids = _check_categories(dataset, findings)
    images = _check_images(dataset, findings, decode)
    sizes = {image["id"]: (image["height"], image["width"]) for image in images}
    rows = _rows_of_images(dataset, findings, sizes)
    if dataset.panoptic_dir is not None:
        annotations = _check_panoptic(dataset.panoptic_dir, rows, sizes, ids, findings, decode)
        objects_of = Counter({a["image_id"]: len(a["segments_info"]) for a in annotations})
        images = [image for image in images if image["id"] in objects_of]
    else:
        annotations = _check_objects(rows, sizes, ids, findings, dataset.return_masks)
        objects_of = Counter(annotation["image_id"] for annotation in annotations)

    polygons = (a for a in annotations if isinstance(a.get("segmentation"), list))
    if dataset.return_masks and (first := next(polygons, None)):
        # That a package is missing should not show in the first step of a training.
        decode_segmentations([first["segmentation"]], *sizes[first["image_id"]], first["image_id"])

    problems = tuple(
        Problem(kind, findings.counts[kind], findings.examples[kind])
        for kind in _KINDS
        if kind in findings.counts
    )
    found = "; ".join(map(str, problems))
    objects = sum(objects_of.values())
    for what, left in (("image", len(images)), ("category", len(categories)), ("object", objects)):
        if not left:
            raise AnnotationError(f"{dataset.source}: no usable {what} is left. {found or 'It lists none'}")
    if strict and problems:
        raise AnnotationError(f"{dataset.source} has problems. {found}. Correct them, or leave out --strict")
    for problem in problems:
        logger.warning("%s: %s", dataset.source, problem)
    document: Document = {"images": images, "annotations": annotations, "categories": categories}
    return DatasetReport(
        dataset=replace(dataset, document=document),
        problems=problems,
        images=len(images),
        objects=objects,
        empty_images=sum(not objects_of[image["id"]] for image in images),
    )


def _rows_of_images(
    dataset: DetectionDataset, findings: _Findings, sizes: Mapping[int, tuple[int, int]]
) -> list[Annotation]:
    """The annotations of usable images."""
    listed = {i["id"] for i in dataset.document["images"] if _fault(i, {"id": int}) is None}
    rows: list[Annotation] = []
    for row in dataset.document["annotations"]:
        if findings.lacks(row, {"image_id": int}, f"annotation {_name(row)}"):
            continue
        if row["image_id"] not in listed:
            findings.add("unknown_image", f"annotation {_name(row)}, image {row['image_id']}")
        elif row["image_id"] in sizes:  # annotations of dropped images are dropped with them
            rows.append(row)
    return rows


@dataclass
class _Findings:
    """The number and first example of each kind of problem."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        self.examples.setdefault(kind, example)

    def lacks(self, entry: object, keys: Mapping[str, type], name: str) -> bool:
        """Whether an entry lacks a key with a value of its type, which is noted."""
        fault = _fault(entry, keys)
        if fault:
            self.add("broken_entry", f"{name} {fault}")
        return fault is not None


def _check_categories(
    dataset: DetectionDataset, findings: _Findings
) -> tuple[list[Category], dict[int, int]]:
    """Usable categories, and the id that each id stands for: another one's if that has the same name."""
    kept: dict[int, Category] = {}
    ids_by_name: dict[str, int] = {}
    merged: dict[int, int] = {}
    for position, entry in enumerate(dataset.document["categories"], start=1):
        if findings.lacks(entry, {"id": int, "name": str}, f"category {position} in the list"):
            continue
        if entry["id"] in kept or entry["name"] in ids_by_name:
            findings.add("duplicate_category", f"{entry['id']} ({entry['name']})")
            merged.setdefault(entry["id"], ids_by_name.get(entry["name"], entry["id"]))
        else:
            kept[entry["id"]] = entry
            ids_by_name[entry["name"]] = entry["id"]
    return list(kept.values()), merged | {category: category for category in kept}


def _check_images(dataset: DetectionDataset, findings: _Findings, decode: bool) -> list[Image]:
    """Usable image entries, all with their height and width."""
    listed: dict[int, list[Image]] = {}
    for position, entry in enumerate(dataset.document["images"], start=1):
        if not findings.lacks(entry, {"id": int, "file_name": str}, f"image {position} in the list"):
            listed.setdefault(entry["id"], []).append(entry)
    candidates: dict[str, Image] = {}
    for image_id, entries in listed.items():
        names = [entry["file_name"] for entry in entries]
        if len(set(names)) > 1:
            # It is unknown which annotations belong to which file.
            for name in names:
                findings.add("duplicate_image_id", f"{image_id} ({name})")
            continue
        for _ in entries[1:]:
            findings.add("duplicate_image_id", f"{image_id} ({names[0]})")
        if names[0] in candidates:
            findings.add("duplicate_file_name", names[0])
        else:
            candidates[names[0]] = entries[0]

    kept: list[Image] = []
    sizes = read_image_sizes(
        [dataset.images_dir / name for name in candidates],
        exif_orientation=dataset.exif_orientation,
        decode=decode,
    )
    for (name, entry), size in zip(candidates.items(), sizes):
        if isinstance(size, FileNotFoundError):
            findings.add("missing_image", str(dataset.images_dir / name))
        elif isinstance(size, Exception):
            findings.add("unreadable_image", str(size))
        else:
            height, width = size
            stated = entry.get("height", height), entry.get("width", width)
            if stated == size:
                kept.append({**entry, "height": height, "width": width})
                continue
            rotated = "; rotated by its EXIF orientation?" if stated == (width, height) else ""
            findings.add("size_mismatch", f"{name} is {width}x{height}, not {stated[1]}x{stated[0]}{rotated}")
    return kept


def _check_objects(
    rows: list[Annotation],
    sizes: Mapping[int, tuple[int, int]],
    category_ids: Mapping[int, int],
    findings: _Findings,
    masks: bool,
) -> list[Annotation]:
    """Usable annotations of a detection file."""
    kept: list[Annotation] = []
    ids: set[int] = set()
    seen: set[tuple[float, ...]] = set()
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
        identity = (row["image_id"], category, crowd, *row["bbox"])
        if identity in seen:
            findings.add("identical_annotation", f"annotation {_name(row)}")
            continue
        seen.add(identity)
        x, y, width, height = row["bbox"]
        beyond = max(-x, -y, x + width - size[1], y + height - size[0])
        if beyond > _OUTSIDE_TOLERANCE:
            findings.add("clipped_box", f"annotation {_name(row)} by {beyond:g} pixels")
        number = row.get("id")
        if not isinstance(number, int) or number in ids:
            if number is not None:
                findings.add("duplicate_annotation_id", str(number))
            number = next(new_ids)
        ids.add(number)
        area = row.get("area")
        if not isinstance(area, Real) or not math.isfinite(area):
            area = width * height
        kept.append({**row, "id": number, "category_id": category, "iscrowd": crowd, "area": area})
    return kept


def _problem_with_object(
    row: Annotation, size: tuple[int, int], known: Container[int]
) -> tuple[str, str] | None:
    name = f"annotation {_name(row)}"
    fault = _fault(row, {"category_id": int, "bbox": list})
    if fault:
        return "broken_entry", f"{name} {fault}"
    box = row["bbox"]
    if len(box) != 4 or not all(isinstance(value, Real) for value in box):
        return "broken_entry", f"{name} has bbox {box}, not four numbers"
    if row["category_id"] not in known:
        return "unknown_category", f"{name}, category {row['category_id']}"
    if (row.get("iscrowd") or 0) not in (0, 1):
        return "broken_entry", f"{name} has iscrowd {row['iscrowd']}, not 0 or 1"
    x, y, width, height = box
    if not all(map(math.isfinite, box)) or width <= 0 or height <= 0:
        return "degenerate_box", f"{name} with bbox {box}"
    if x >= size[1] or y >= size[0] or x + width <= 0 or y + height <= 0:
        return "outside_box", f"{name} with bbox {box} in an image of {size[1]}x{size[0]}"
    return None


def _problem_with_segmentation(row: Annotation, size: tuple[int, int]) -> tuple[str, str] | None:
    """What is wrong with the format of a segmentation, without decoding it."""
    segmentation = row.get("segmentation")
    if isinstance(segmentation, list):
        sound = bool(segmentation) and all(map(_is_polygon, segmentation))
    elif isinstance(segmentation, Mapping):
        sound = "counts" in segmentation and segmentation.get("size") in (list(size), size)
    else:
        sound = False
    if sound:
        return None
    return (
        "broken_segmentation",
        f"annotation {_name(row)} must have polygons of three points or more, or run lengths with counts and "
        f"size [{size[0]}, {size[1]}]",
    )


def _is_polygon(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 6
        and len(value) % 2 == 0
        and all(isinstance(coordinate, (int, float)) and coordinate == coordinate for coordinate in value)
    )


def _check_panoptic(
    folder: Path,
    rows: list[Annotation],
    sizes: Mapping[int, tuple[int, int]],
    category_ids: Mapping[int, int],
    findings: _Findings,
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
        if size != sizes[row["image_id"]]:
            why = f": {size[1]}x{size[0]}" if isinstance(size, tuple) else ""
            findings.add("broken_panoptic", f"{folder / row['file_name']}{why}")
            continue
        segments: dict[int, Segment] = {}
        for segment in row["segments_info"]:
            name = f"a segment of image {row['image_id']}"
            if findings.lacks(segment, {"id": int, "category_id": int, "area": Real}, name):
                continue
            if segment["category_id"] not in category_ids:
                findings.add("unknown_category", f"{name}, category {segment['category_id']}")
            elif segment["id"] in segments:
                findings.add("identical_annotation", f"segment {segment['id']} of image {row['image_id']}")
            else:
                category = category_ids[segment["category_id"]]
                segments[segment["id"]] = {**segment, "category_id": category}
        kept.append({**row, "segments_info": list(segments.values())})
    return kept


def _fault(entry: object, keys: Mapping[str, type]) -> str | None:
    """What is wrong with an entry that must have these keys and types, as the end of a sentence."""
    if not isinstance(entry, Mapping):
        return f"is {type(entry).__name__}, not a dictionary"
    for key, kind in keys.items():
        if key not in entry:
            return f"has no {key}"
        if not isinstance(entry[key], kind):
            return f"has {key} {entry[key]!r}, which must be {_TYPE_NAMES[kind]}"
    return None


_TYPE_NAMES: dict[type, str] = {
    int: "an integer",
    str: "a string",
    list: "a list",
    Real: "a number",
}


def _name(row: Annotation) -> str:
    """The name of an annotation in messages."""
    return str(row["id"]) if isinstance(row, Mapping) and "id" in row else "without id"
