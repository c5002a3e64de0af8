"""Masks of COCO's segmentations: polygons and run lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from detrkit.common.errors import AnnotationError, MissingExtraError
from detrkit.common.quiet import same_environment

# Maximum distance of a polygon's point from the image's corner, in pixels: more than any image has.
_FARTHEST_POINT = 1e5


def decode_segmentations(
    segmentations: Sequence[object], height: int, width: int, image_id: object
) -> np.ndarray:
    """Masks of COCO segmentations: polygons, or run lengths as a list or a compressed string.

    Args:
        segmentations: One for each object.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        image_id: Names the image in errors.

    Returns:
        bool (n, height, width).

    Raises:
        AnnotationError: Run lengths that do not fit the image, or an unknown form.
        MissingExtraError: There are polygons and no package can draw them.
    """
    masks = np.zeros((len(segmentations), height, width), dtype=bool)
    for mask, segmentation in zip(masks, segmentations):
        try:
            if isinstance(segmentation, Mapping):
                decoded = decode_run_lengths(segmentation["counts"], *segmentation["size"])
            elif isinstance(segmentation, (list, tuple)):
                decoded = _draw_polygons(list(segmentation), height, width)
            else:
                raise TypeError(f"a segmentation cannot be {type(segmentation).__name__}")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise AnnotationError(f"image {image_id}: bad segmentation ({error})") from error
        if decoded.shape != (height, width):
            raise AnnotationError(
                f"image {image_id}: a mask of {decoded.shape[1]}x{decoded.shape[0]} "
                f"in an image of {width}x{height}"
            )
        mask[:] = decoded
    return masks


def decode_run_lengths(counts: Sequence[int] | str | bytes, height: int, width: int) -> np.ndarray:
    """Mask of COCO's run lengths.

    The runs go down the columns and alternate between 0 and 1, from 0. In the compressed string every length
    takes as many characters as it has groups of five bits, lowest first; a character is 48 plus the group
    plus 32 where more follow, the sign is in bit 4 of the last group, and from the fourth on a length is
    stored as the difference to the last but one.

    Args:
        counts: Run lengths, or their compressed string.
        height: Height of the mask in pixels.
        width: Width of the mask in pixels.

    Returns:
        bool (height, width).

    Raises:
        ValueError: The runs do not fill the mask.
    """
    runs = _uncompress(counts) if isinstance(counts, (str, bytes)) else [int(c) for c in counts]
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"run lengths sum to {sum(runs)}, not to {height} x {width}")
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _uncompress(counts: str | bytes) -> list[int]:
    text = counts.encode() if isinstance(counts, str) else counts
    runs: list[int] = []
    value = shift = 0
    for character in text:
        group = character - 48
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs


def _draw_polygons(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    if not polygons:
        return np.zeros((height, width), dtype=bool)
    # The outline is walked pixel by pixel, in memory.
    for value in (value for polygon in polygons for value in polygon):
        if not abs(value) <= _FARTHEST_POINT:  # nor is NaN
            raise ValueError(f"a polygon reaches to {value:g}, the image has {width}x{height} pixels")
    coco_mask = _coco_mask_module()
    decoded = coco_mask.decode(coco_mask.frPyObjects(polygons, height, width))
    return decoded.reshape(height, width, -1).any(axis=2)


def _coco_mask_module() -> ModuleType:
    """COCO's own polygon drawing, from whichever package has it.

    Which pixels a polygon covers is part of the annotations' meaning, so no other drawing will do.
    """
    try:
        from pycocotools import mask  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError:
        try:
            with same_environment():
                from faster_coco_eval.core import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
                    mask,
                )
        except ImportError:
            raise MissingExtraError(
                "making masks of COCO polygons", "coco", package="faster-coco-eval"
            ) from None
    return mask
