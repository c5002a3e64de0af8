"""YOLO and Pascal VOC folders, read with supervision's loaders and converted to COCO-format data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml  # type: ignore[import-untyped,unused-ignore]

from detrkit.common.errors import AnnotationError, MissingExtraError
from detrkit.common.quiet import no_warnings
from detrkit.common.schema import Annotation, Category, Document, Image
from detrkit.data.coco import DetectionDataset, existing_folder
from detrkit.data.image_sizes import read_image_sizes

if TYPE_CHECKING:
    import supervision

_IMAGES, _LABELS = "images", "labels"


def read_yolo(
    data_yaml: str | os.PathLike[str], split: str = "train", *, return_masks: bool = False
) -> DetectionDataset:
    """Reads one split of a YOLO data set.

    The file ``data.yaml`` contains ``names`` and, for each split, the folder of the images. The labels are
    in a folder ``labels`` in place of ``images``, or beside the images. Labels refer to images rotated as
    their EXIF orientation says, and the data set rotates its images accordingly.

    Args:
        data_yaml: The file, or its folder.
        split: "train", "val" (or "valid") or "test".
        return_masks: Whether targets have masks, made from the polygons of the labels.

    Returns:
        A data set whose category ids are the class numbers.

    Raises:
        AnnotationError: The file, a folder or a label file is missing or invalid.
        MissingExtraError: The supervision package is not installed.
    """
    path = Path(data_yaml)
    path = path / "data.yaml" if path.is_dir() else path
    images_dir = _yolo_images(path, split)
    labels_dir = _yolo_labels(images_dir)
    folders = str(images_dir), str(labels_dir), str(path)
    loaded = _load("YOLO", images_dir, lambda library: library.from_yolo(*folders, force_masks=return_masks))
    return _convert(loaded, images_dir, loaded.classes, return_masks)


def read_voc(
    images_dir: str | os.PathLike[str],
    annotations_dir: str | os.PathLike[str] | None = None,
    *,
    return_masks: bool = False,
) -> DetectionDataset:
    """Reads a Pascal VOC data set: a folder of images and a folder of XML files.

    Images are rotated as their EXIF orientation says.

    Args:
        images_dir: The folder of the images (``JPEGImages``).
        annotations_dir: The folder of the XML files (``Annotations``); None for the folder of the images.
        return_masks: Whether targets have masks, made from the polygons of the files.

    Returns:
        A data set whose category ids are 0, 1, 2, ... in the order of the names.

    Raises:
        AnnotationError: A folder is missing or a file is invalid.
        MissingExtraError: The supervision package is not installed.
    """
    images = existing_folder(images_dir, "images")
    annotations = existing_folder(annotations_dir or images_dir, "Pascal VOC annotations")
    if not any(annotations.glob("*.xml")):
        raise AnnotationError(f"{annotations}: no XML files found; check the folder of annotations")
    folders = str(images), str(annotations)
    loaded = _load(
        "Pascal VOC", images, lambda library: library.from_pascal_voc(*folders, force_masks=return_masks)
    )
    return _convert(loaded, images, sorted(loaded.classes), return_masks)


def _load(
    format_name: str,
    images_dir: Path,
    load: Callable[[type[supervision.DetectionDataset]], supervision.DetectionDataset],
) -> supervision.DetectionDataset:
    """Calls a loader of supervision, and raises its errors as ours."""
    try:
        with no_warnings():  # such as that OpenCV is missing
            from supervision import DetectionDataset
    except ImportError as error:
        raise MissingExtraError(f"reading {format_name} folders", "supervision") from error
    try:
        with no_warnings():
            return load(DetectionDataset)
    except (OSError, ValueError, KeyError, IndexError, SyntaxError, yaml.YAMLError) as error:
        # SyntaxError is what XML parsers raise.
        raise AnnotationError(
            f"{images_dir}: cannot read the {format_name} annotations: {' '.join(str(error).split())}"
        ) from error


def _convert(
    loaded: supervision.DetectionDataset, images_dir: Path, names: Sequence[str], return_masks: bool
) -> DetectionDataset:
    """Converts a data set of supervision to ours."""
    from supervision import mask_to_rle

    paths = sorted(map(Path, loaded.image_paths))
    if not paths:
        raise AnnotationError(f"{images_dir}: no images in this folder; check the path")
    ids = {name: category for category, name in enumerate(names)}
    images: list[Image] = []
    annotations: list[Annotation] = []
    sizes = read_image_sizes(paths)
    for image_id, (path, size) in enumerate(zip(paths, sizes), start=1):
        image: Image = {"id": image_id, "file_name": os.path.relpath(path, images_dir)}
        if isinstance(size, tuple):  # otherwise check_dataset reports the error
            image["height"], image["width"] = size.frame(True)
        images.append(image)
        detections = loaded.annotations[str(path)]
        for i, (x0, y0, x1, y1) in enumerate(detections.xyxy.tolist()):
            entry: Annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": ids[loaded.classes[int(detections.class_id[i])]],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
            if return_masks and detections.mask is not None:
                mask = np.asarray(detections.mask[i])
                entry["segmentation"] = {"size": list(mask.shape), "counts": mask_to_rle(mask)}
                entry["area"] = float(mask.sum())
            annotations.append(entry)
    categories: list[Category] = [{"id": category, "name": name} for name, category in ids.items()]
    document: Document = {"images": images, "annotations": annotations, "categories": categories}
    return DetectionDataset(
        document, images_dir, str(images_dir), return_masks=return_masks, exif_orientation=True
    )


def _yolo_images(data_yaml: Path, split: str) -> Path:
    """The folder of a split's images."""
    try:
        settings = yaml.safe_load(data_yaml.read_text(encoding="utf-8"))
    except OSError as error:
        raise AnnotationError(f"cannot read {data_yaml}: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise AnnotationError(f"{data_yaml} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(settings, Mapping) or "names" not in settings:
        raise AnnotationError(f"{data_yaml} is not a YOLO data file: it has no names")
    aliases = {"val": ("val", "valid"), "valid": ("valid", "val")}.get(split, (split,))
    value = next((settings[name] for name in aliases if settings.get(name)), None)
    if not isinstance(value, str):
        splits = ", ".join(name for name in ("train", "val", "valid", "test") if settings.get(name)) or "none"
        raise AnnotationError(
            f"{data_yaml}: no folder of images for the split {split!r} (it has {splits}); add one"
        )
    # Downloaded data files contain paths of the machine that wrote them, or (from Roboflow) paths relative to
    # a folder further up.
    base = data_yaml.parent
    root = base / str(settings.get("path") or "")
    inside = Path(*(part for part in Path(value).parts if part not in ("..", ".")))
    candidates = [root / value, base / value, base / inside]
    for candidate in candidates:
        if candidate.is_dir():
            nested = candidate / _IMAGES
            return nested if nested.is_dir() else candidate
    raise AnnotationError(f"{data_yaml}: folder {candidates[0]} of the split {split!r} not found")


def _yolo_labels(images_dir: Path) -> Path:
    """The folder of the labels of a folder of images."""
    parts = list(images_dir.parts)
    for position in range(len(parts) - 1, -1, -1):
        if parts[position] == _IMAGES:
            candidate = Path(*parts[:position], _LABELS, *parts[position + 1 :])
            if candidate.is_dir():
                return candidate
    if any(images_dir.glob("*.txt")):
        return images_dir
    return existing_folder(images_dir.parent / _LABELS, "YOLO labels")
