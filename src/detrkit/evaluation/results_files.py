"""Detections in files: COCO results, and the documents that ``detrkit detect`` writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from detrkit.common.errors import AnnotationError
from detrkit.common.files import read_json
from detrkit.common.schema import Annotation, Category, Document, Image
from detrkit.data.documents import box_of, category_name, field, name_of, number, whole_number
from detrkit.evaluation.categories import match_categories

RESULT_KEYS = {"bbox": "bbox", "segm": "segmentation"}
"""Where an entry of a COCO results file holds its shape."""


@dataclass(frozen=True)
class Results:
    """Detections as a file has them.

    Attributes:
        name: What errors call them.
        entries: Entries of a COCO results file.
        images: What the entries' image ids stand for, if the file says.
        categories: What the entries' category ids stand for, if the file says.
    """

    name: str
    entries: Sequence[Annotation]
    images: Sequence[Image] = ()
    categories: Sequence[Category] = ()


def read_results(source: Sequence[Annotation] | str | os.PathLike[str]) -> Results:
    """Reads COCO results: a list of detections, its file, or that of a COCO document with them.

    Raises:
        AnnotationError: The file cannot be read, or is neither.
    """
    content: Any = source
    if isinstance(source, (str, os.PathLike)):
        content = read_json(source, AnnotationError, compressed=True)
    entries, named = content, {}
    if isinstance(content, Mapping):
        entries = content.get("annotations")
        named = {key: content.get(key) or [] for key in ("images", "categories")}
    if not _is_list(entries) or not all(map(_is_list, named.values())):
        raise AnnotationError(
            f"{name_of(source)} must contain a list of detections, as COCO's results files do"
        )
    return Results(name_of(source), entries, **named)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, Mapping) for entry in value)


def aligned(results: Results, truth: Document) -> Sequence[Annotation]:
    """The detections with the ground truth's image and category ids, by the names that the file gives them.

    Detections of classes that the ground truth does not have are left out, as in an evaluation of the model.

    Raises:
        AnnotationError: The file's images or classes are not those of the ground truth.
    """
    images = _image_ids(results, truth)
    categories = None
    if results.categories:
        names = {
            whole_number(entry, "id", f"a category of {results.name}"): category_name(entry)
            for entry in results.categories
        }
        used_categories = {entry["category_id"] for entry in truth["annotations"]}
        categories = match_categories(names, truth["categories"], used_categories)
    if images is None and categories is None:
        return results.entries
    moved: list[Annotation] = []
    for entry in results.entries:
        image, category = entry.get("image_id"), entry.get("category_id")
        if categories is not None and category not in categories:
            continue
        changed = entry.copy()
        if images is not None and image in images:
            changed["image_id"] = images[image]
        if categories is not None and category is not None:
            changed["category_id"] = categories[category]
        moved.append(changed)
    return moved


def _image_ids(results: Results, truth: Document) -> dict[int, int] | None:
    """The ground truth's id of each image of the results, by file name; None if a file has no names."""
    known = {image["id"]: _base_name(image) for image in truth["images"]}
    found = {image["id"]: _base_name(image) for image in results.images if "id" in image}
    if not found or not all(known.values()) or not all(found.values()):
        return None
    if all(known.get(image_id) == name for image_id, name in found.items()):
        return None
    numbers = Counter(known.values())
    by_name = {name: image_id for image_id, name in known.items() if numbers[name] == 1}
    ids = {image_id: by_name[name] for image_id, name in found.items() if name in by_name}
    missing = [name for name in found.values() if name not in by_name]
    if missing or len(set(ids.values())) < len(ids):
        raise AnnotationError(
            f"the images of {results.name}, such as {(missing or list(found.values()))[0]}, are not those of "
            "the ground truth, or several share a name; run detect on the images of the ground truth"
        )
    return ids


def _base_name(image: Image) -> str:
    return PurePosixPath(str(image.get("file_name") or "").replace("\\", "/")).name


def check_results(entries: Sequence[Mapping[str, object]], name: str, iou_type: str, truth: Document) -> None:
    """Refuses, with an AnnotationError, detections without a shape or of an unknown image or category."""
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for place, entry in enumerate(entries):
        what = f"detection {place} of {name}"
        for key in ("image_id", "category_id"):
            whole_number(entry, key, what)
        number(entry, "score", what)
        if iou_type == "bbox":
            box_of(entry, what)
        else:
            field(entry, RESULT_KEYS[iou_type], what)
        if entry["image_id"] not in images:
            raise AnnotationError(
                f"{what} refers to image {entry['image_id']}, which is not in the ground truth"
            )
        if entry["category_id"] not in categories:
            listed = ", ".join(f"{c['id']} ({category_name(c)})" for c in truth["categories"][:5])
            raise AnnotationError(
                f"{what} has category {entry['category_id']}, which is not in the ground truth ({listed}); "
                "write the ground truth's category ids"
            )
