"""COCO annotations as training targets.

Source: ``datasets/coco.py`` and ``datasets/coco_panoptic.py`` of facebookresearch/detr.

Boxes of a target are normalised to the resized image **without** the batch's padding, as its predictions are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from detrkit.common.boxes import xyxy_to_cxcywh
from detrkit.common.errors import AnnotationError, ImageError
from detrkit.common.schema import Target
from detrkit.processing.coco_masks import decode_segmentations
from detrkit.processing.images import load_image
from detrkit.processing.options import COCO_DETECTION, COCO_PANOPTIC
from detrkit.processing.panoptic_png import rgb_to_id

PER_OBJECT: Final = ("class_labels", "boxes", "area", "iscrowd", "masks")
"""Entries of a target that have one row for each object."""


def check_annotations(annotations: Sequence[object], annotation_format: str) -> None:
    """Checks that a batch's annotations have the shape of their format.

    Args:
        annotations: One annotation for each image.
        annotation_format: ``"coco_detection"`` or ``"coco_panoptic"``.

    Raises:
        AnnotationError: An unknown format, or annotations that are not of it.
    """
    keys: tuple[str, ...]
    if annotation_format == COCO_DETECTION:
        keys, entries = ("image_id", "annotations"), "annotations"
    elif annotation_format == COCO_PANOPTIC:
        keys, entries = ("image_id", "file_name", "segments_info"), "segments_info"
    else:
        raise AnnotationError(
            f"{annotation_format} is not a valid AnnotationFormat; "
            f"use {COCO_DETECTION!r} or {COCO_PANOPTIC!r}"
        )
    for index, annotation in enumerate(annotations):
        problem = _problem_with(annotation, keys, entries)
        if problem:
            kind = annotation_format.removeprefix("coco_")
            raise AnnotationError(
                f"Invalid COCO {kind} annotations for image {index} of the batch: {problem}. "
                f"Each image needs {', '.join(keys)}, where {entries} is a list of dictionaries"
            )


def prepare_detection(
    annotation: Mapping[str, Any], height: int, width: int, *, return_masks: bool = False
) -> Target:
    """Converts the COCO detection annotations of one image; crowds and boxes without area are left out.

    Args:
        annotation: ``image_id`` and ``annotations``, a list of COCO annotations.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        return_masks: Whether to make masks of the segmentations.

    Returns:
        The target, with boxes xyxy in pixels, clipped to the image, and masks of the image's size.

    Raises:
        AnnotationError: An entry lacks a key or holds a value that makes no sense.
        MissingExtraError: Masks of polygons are asked for and no package can draw them.
    """
    image_id = annotation["image_id"]
    objects = [entry for entry in annotation["annotations"] if not entry.get("iscrowd", 0)]
    boxes = _tensor([_value(o, "bbox", image_id) for o in objects], torch.float32, "bbox", image_id)
    if boxes.numel() != 4 * len(objects) or not bool(torch.isfinite(boxes).all()):
        raise AnnotationError(
            f"image {image_id}: every bbox must be four finite numbers (x, y, width, height)"
        )
    boxes = boxes.reshape(-1, 4)
    areas = [o["area"] if "area" in o else o["bbox"][2] * o["bbox"][3] for o in objects]
    labels = [_value(o, "category_id", image_id) for o in objects]
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] + boxes[:, :2]], dim=1)
    corners = torch.minimum(
        corners.clamp(min=0), torch.tensor([width, height, width, height], dtype=torch.float32)
    )
    keep = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    target: Target = {
        "image_id": _tensor([image_id], torch.int64, "image_id", image_id),
        "class_labels": _tensor(labels, torch.int64, "category_id", image_id)[keep],
        "boxes": corners[keep],
        "area": _tensor(areas, torch.float32, "area", image_id)[keep],
        "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }
    if objects and all("keypoints" in o for o in objects):
        keypoints = _tensor([o["keypoints"] for o in objects], torch.float32, "keypoints", image_id)
        target["keypoints"] = keypoints[keep].reshape(-1, 3)
    if return_masks:
        segmentations = [_value(o, "segmentation", image_id) for o in objects]
        masks = decode_segmentations(segmentations, height, width, image_id)
        target["masks"] = torch.from_numpy(masks)[keep]
    return target


def prepare_panoptic(
    annotation: Mapping[str, Any],
    height: int,
    width: int,
    *,
    masks_path: str | Path | None,
    return_masks: bool = True,
) -> Target:
    """Converts the COCO panoptic annotation of one image: one object a segment, crowds included.

    Args:
        annotation: ``image_id``, ``file_name`` of the PNG, and ``segments_info``.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        masks_path: The folder of the PNG files, in which a pixel's segment is R + 256 G + 65536 B.
        return_masks: Whether to give the masks as well as the boxes around them.

    Returns:
        The target, with boxes xyxy in pixels from the first to the last pixel of each mask, as in the
        original.

    Raises:
        AnnotationError: The PNG is missing, unreadable or of another size, or a segment lacks a key.
    """
    image_id = annotation["image_id"]
    if masks_path is None:
        raise AnnotationError(
            f"image {image_id}: panoptic annotations need masks_path, the folder of their PNG files"
        )
    if not isinstance(masks_path, (str, Path)):
        raise AnnotationError(f"masks_path must be a path, not {type(masks_path).__name__}")
    path = Path(masks_path) / annotation["file_name"]
    try:
        colours = np.asarray(load_image(path))
    except ImageError as error:
        raise AnnotationError(f"image {image_id}: panoptic PNG {error}") from error
    if colours.shape[:2] != (height, width):
        raise AnnotationError(
            f"image {image_id}: {path} has {colours.shape[1]}x{colours.shape[0]} pixels, "
            f"its image {width}x{height}"
        )
    segment_ids = torch.from_numpy(rgb_to_id(colours))
    segments = annotation["segments_info"]
    ids = _tensor([_value(s, "id", image_id) for s in segments], torch.int64, "id", image_id)
    masks = segment_ids == ids[:, None, None]
    target: Target = {
        "image_id": _tensor([image_id], torch.int64, "image_id", image_id),
        "class_labels": _field(segments, "category_id", torch.int64, image_id),
        "boxes": boxes_of_masks(masks),
        "area": _field(segments, "area", torch.float32, image_id),
        "iscrowd": _tensor([s.get("iscrowd", 0) for s in segments], torch.int64, "iscrowd", image_id),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
    }
    if return_masks:
        target["masks"] = masks
    return target


def resize_target(target: Target, height: int, width: int) -> Target:
    """Scales a target from its ``size`` to that of the resized image.

    Args:
        target: Boxes in pixels.
        height: New height in pixels.
        width: New width in pixels.

    Returns:
        A new target: boxes and areas scaled, masks resized to the nearest pixel, ``size`` set.
    """
    old_height, old_width = target["size"].tolist()
    ratio_height, ratio_width = height / old_height, width / old_width
    ratios = torch.tensor([ratio_width, ratio_height, ratio_width, ratio_height])
    resized: Target = {
        **target,
        "boxes": target["boxes"] * ratios,
        "area": target["area"] * (ratio_width * ratio_height),
        "size": torch.tensor([height, width]),
    }
    if "masks" in target and len(target["masks"]):
        bytes_ = target["masks"].to(torch.uint8)
        resized["masks"] = F.interpolate(bytes_[None], size=(height, width), mode="nearest")[0] > 0
    elif "masks" in target:
        resized["masks"] = torch.zeros(0, height, width, dtype=torch.bool)
    return resized


def normalize_boxes(target: Target) -> Target:
    """Turns a target's boxes from xyxy in pixels into cxcywh, normalised to its ``size``."""
    height, width = target["size"].tolist()
    lengths = torch.tensor([width, height, width, height], dtype=torch.float32)
    return {**target, "boxes": xyxy_to_cxcywh(target["boxes"]) / lengths}


def pad_masks(target: Target, height: int, width: int) -> Target:
    """Pads a target's masks at the bottom and right to (height, width) with zeros; nothing else changes."""
    if "masks" not in target:
        return target
    mask_height, mask_width = target["masks"].shape[-2:]
    padded = F.pad(torch.as_tensor(target["masks"]), (0, width - mask_width, 0, height - mask_height))
    return {**target, "masks": padded}


def only_objects(target: Target, kept: torch.Tensor) -> Target:
    """A target with some of its objects.

    Args:
        target: The target; its keypoints stay as they are.
        kept: bool (n,), which objects.
    """
    chosen = target.copy()
    for name in PER_OBJECT:
        if name in target:
            chosen[name] = target[name][kept]
    return chosen


def boxes_of_masks(masks: torch.Tensor) -> torch.Tensor:
    """Boxes around masks.

    Args:
        masks: bool (n, height, width).

    Returns:
        float32 (n, 4), xyxy, from the first to the last pixel of each mask; zeros for an empty one.
    """
    boxes = torch.zeros(len(masks), 4)
    for start, pixels in ((0, masks.any(dim=1)), (1, masks.any(dim=2))):
        if pixels.shape[1] == 0:
            continue
        bits = pixels.to(torch.uint8)
        first = bits.argmax(dim=1)
        last = bits.shape[1] - 1 - bits.flip(1).argmax(dim=1)
        filled = pixels.any(dim=1)
        boxes[:, start] = torch.where(filled, first, 0).float()
        boxes[:, start + 2] = torch.where(filled, last, 0).float()
    return boxes


def _problem_with(annotation: object, keys: Sequence[str], entries: str) -> str | None:
    if not isinstance(annotation, Mapping):
        return f"it is {type(annotation).__name__}, not a dictionary"
    missing = [key for key in keys if key not in annotation]
    if missing:
        return f"it lacks {', '.join(missing)}"
    if not isinstance(annotation[entries], (list, tuple)):
        return f"{entries} is {type(annotation[entries]).__name__}, not a list"
    if not all(isinstance(entry, Mapping) for entry in annotation[entries]):
        return f"{entries} holds something other than dictionaries"
    return None


def _value(entry: Mapping[str, Any], key: str, image_id: object) -> Any:
    if key not in entry:
        raise AnnotationError(
            f"image {image_id}: an annotation lacks {key!r} (it has {', '.join(map(str, entry))})"
        )
    return entry[key]


def _field(
    entries: Sequence[Mapping[str, Any]], key: str, dtype: torch.dtype, image_id: object
) -> torch.Tensor:
    return _tensor([_value(entry, key, image_id) for entry in entries], dtype, key, image_id)


def _tensor(values: list[object], dtype: torch.dtype, key: str, image_id: object) -> torch.Tensor:
    try:
        return torch.tensor(np.asarray(values).tolist(), dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AnnotationError(f"image {image_id}: bad {key} ({error})") from error
