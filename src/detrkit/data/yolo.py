"""YOLO data sets: a text file of classes and fractions for each image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Annotation, Category, Document, Image
from detrkit.data.coco import DetectionDataset
from detrkit.data.documents import read_lines
from detrkit.data.image_files import image_files_in
from detrkit.data.image_sizes import ImageSize, read_image_sizes
from detrkit.data.problems import Findings

SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What tools call the splits of a data set."""

_IMAGES, _LABELS = "images", "labels"
# What PyYAML raises at a value that is not of the type it claims, such as !!int ''.
_YAML_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
_LARGEST_FRACTION = 1.01  # tools round


def read_yolo(
    data_yaml: str | os.PathLike[str], split: str = "train", *, return_masks: bool = False
) -> DetectionDataset:
    """Reads one split of a YOLO data set.

    The file ``data.yaml`` contains ``names`` and, for each split, the folder of the images (with the folders
    inside), a text file that lists images, or a list of these. The labels are in a folder ``labels`` in place
    of ``images``, or beside the images. An image without a label file has no objects. Labels refer to images
    rotated as their EXIF orientation says, and the data set rotates its images accordingly.

    Args:
        data_yaml: The file, or its folder.
        split: "train", "val" (or "valid") or "test".
        return_masks: Whether targets have masks, made from the polygons of the labels.

    Returns:
        A data set whose category ids are the class numbers. ``check_dataset`` reports the lines that cannot
        be read.

    Raises:
        AnnotationError: The file or a folder is missing or invalid.
    """
    path = Path(data_yaml)
    path = path / "data.yaml" if path.is_dir() else path
    settings = read_settings(path)
    value = split_of(settings, split)
    if value is None:
        known = [name for names in SPLITS.values() for name in names if settings.get(name)]
        raise AnnotationError(
            f"{path}: no folder of images for the split {split!r} (it has {', '.join(known) or 'none'}); "
            "add one"
        )
    images = [image for part in value for image in _images(path, settings, part, split)]
    if not images:
        raise AnnotationError(f"{path}: no images in {', '.join(value)}; check the path")
    return read_labels(images, settings, str(path), return_masks=return_masks)


def read_settings(path: Path) -> Mapping[str, Any]:
    """The content of a ``data.yaml``.

    Raises:
        AnnotationError: It cannot be read, or has no names.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise AnnotationError(f"cannot read {path}: {error.strerror or error}") from error
    except (*_YAML_ERRORS, RecursionError, yaml.YAMLError) as error:
        raise AnnotationError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(settings, Mapping) or not isinstance(settings.get("names"), (Mapping, list)):
        raise AnnotationError(f"{path} is not a YOLO data file: it has no names")
    return settings


def split_of(settings: Mapping[str, Any], split: str) -> list[str] | None:
    """What a ``data.yaml`` gives for a split; None if nothing."""
    aliases = next((names for names in SPLITS.values() if split in names), (split,))
    for name in (split, *aliases):
        value = settings.get(name)
        if isinstance(value, str) and value:
            return [value]
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            return value
    return None


def read_labels(
    images: Sequence[Path], settings: Mapping[str, Any], source: str, *, return_masks: bool = False
) -> DetectionDataset:
    """The data set of some images, each with its label file.

    Args:
        images: The files of the images.
        settings: ``names``, and ``kpt_shape`` if the labels have keypoints.
        source: Names the data set in messages.
        return_masks: Whether targets have masks.

    Raises:
        AnnotationError: No image has a label file.
    """
    findings = Findings()
    root = Path(os.path.commonpath([image.absolute().parent for image in images]))
    listed = settings["names"]
    names = dict(listed) if isinstance(listed, Mapping) else dict(enumerate(listed))
    categories: list[Category] = [
        {"id": int(number), "name": name} for number, name in names.items() if _is_class(number)
    ]
    document: Document = {"images": [], "annotations": [], "categories": categories}
    known = {category["id"] for category in categories}
    has_keypoints = bool(settings.get("kpt_shape"))
    any_labels = False
    for image_id, (path, size) in enumerate(zip(images, read_image_sizes(images)), start=1):
        entry: Image = {"id": image_id, "file_name": os.path.relpath(path.absolute(), root)}
        document["images"].append(entry)
        labels = _label_file(path)
        any_labels |= labels is not None
        if not isinstance(size, ImageSize):  # check_dataset reports it
            continue
        height, width = size.frame(True)
        entry["height"], entry["width"] = height, width
        if labels is None:
            continue
        for place, row in _rows(labels, has_keypoints, known, findings):
            shape = _shape(row, width, height, place, findings)
            if shape:
                number = len(document["annotations"]) + 1
                category = int(row[0])
                document["annotations"].append(
                    {"id": number, "image_id": image_id, "category_id": category, "iscrowd": 0, **shape}
                )
    if not any_labels:
        raise AnnotationError(
            f"{source}: folder of YOLO labels not found; put it beside {images[0].parent} and call it labels"
        )
    return DetectionDataset(
        document,
        root,
        source,
        return_masks=return_masks,
        exif_orientation=True,
        problems=findings.problems(),
        format="YOLO",
    )


def _is_class(number: object) -> bool:
    text = str(number)
    return text.isdecimal() and len(text) < 10  # Python refuses to read very long numbers


def _rows(
    path: Path, has_keypoints: bool, known: set[int], findings: Findings
) -> Iterator[tuple[str, list[float]]]:
    """The place and numbers of each line that can be read: a class, and a box or polygon."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        findings.add("broken_entry", f"{path}: {error}")
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            findings.add("broken_entry", f"{place}: {line.strip()[:60]!r} is not a row of numbers")
            continue
        if has_keypoints:
            row = row[:5]
        if len(row) != 5 and (len(row) < 7 or len(row) % 2 == 0):
            findings.add(
                "broken_entry", f"{place} has {len(row)} numbers, not a class with a box or a polygon"
            )
        elif not all(map(math.isfinite, row)) or not row[0].is_integer():
            findings.add("broken_entry", f"{place}: {line.strip()[:60]!r}")
        elif int(row[0]) not in known:
            findings.add("unknown_category", f"{place}, class {row[0]:g}")
        elif max(map(abs, row[1:])) > _LARGEST_FRACTION:
            findings.add(
                "broken_entry", f"{place} has {max(row[1:]):g}, but YOLO's numbers are fractions of the image"
            )
        else:
            yield place, row


def _shape(row: Sequence[float], width: int, height: int, place: str, findings: Findings) -> Annotation:
    """``bbox`` and ``segmentation`` of a line in pixels."""
    if len(row) == 5:
        x, y, w, h = row[1] * width, row[2] * height, row[3] * width, row[4] * height
        box = [x - w / 2, y - h / 2, w, h]
        shape: Annotation = {"bbox": box}
    else:
        points = [value * (width, height)[i % 2] for i, value in enumerate(row[1:])]
        xs, ys = points[::2], points[1::2]
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        shape = {"bbox": box, "segmentation": [points]}
    if box[2] <= 0 or box[3] <= 0:
        findings.add("degenerate_box", place)
        return {}
    return shape


def _images(data_yaml: Path, settings: Mapping[str, Any], value: str, split: str) -> list[Path]:
    """The images of one value of a split: a folder, or a file that lists images."""
    # Downloaded data files contain paths of the machine that wrote them, or (from Roboflow) paths relative to
    # a folder further up.
    value = value.replace("\\", "/")
    base = data_yaml.parent
    root = base / str(settings.get("path") or "").replace("\\", "/")
    inside = Path(*(part for part in Path(value).parts if part not in ("..", ".", "/")))
    tails = [base / Path(*inside.parts[start:]) for start in range(len(inside.parts))]
    candidates = [root / value, base / value, *tails]
    for candidate in candidates:
        if os.path.isdir(candidate):  # noqa: PTH112 - raises at no name, however long
            nested = candidate / _IMAGES
            return image_files_in(nested if nested.is_dir() else candidate)
        if _is_file(candidate) and candidate.suffix == ".txt":
            return _listed(candidate, root)
        if _is_file(candidate):
            return [candidate]
    raise AnnotationError(f"{data_yaml}: folder {candidates[0]} of the split {split!r} not found")


def _listed(path: Path, root: Path) -> list[Path]:
    """The images that a text file lists, relative to itself or the root, or as on another machine."""
    found = []
    for number, line in read_lines(path):
        name = line.replace("\\", "/")
        inside = [part for part in Path(name).parts if part not in ("..", ".", "/")]
        tails = [Path(*inside[start:]) for start in range(len(inside))]
        candidates = [folder / tail for tail in [Path(name), *tails] for folder in (path.parent, root)]
        image = next((candidate for candidate in candidates if _is_file(candidate)), None)
        if image is None:
            raise AnnotationError(f"{path} line {number}: image {name} not found")
        found.append(image)
    return found


def _is_file(path: Path) -> bool:
    """Whether there is a file; a name that no file can have is none."""
    return os.path.isfile(path)  # noqa: PTH113 - raises at no name, however long


def _label_file(image: Path) -> Path | None:
    """The label file of an image; None if it has none."""
    parts = list(image.absolute().with_suffix(".txt").parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position].lower() == _IMAGES:
            candidate = Path(*parts[:position], _LABELS, *parts[position + 1 :])
            if candidate.is_file():
                return candidate
    beside = image.with_suffix(".txt")
    candidates = [beside, image.parent / _LABELS / beside.name]
    for folder in image.absolute().parents[:3]:
        inside = image.absolute().relative_to(folder).with_suffix(".txt")
        candidates += [folder.parent / _LABELS / inside, folder / _LABELS / inside]
    return next((candidate for candidate in candidates if candidate.is_file()), None)
