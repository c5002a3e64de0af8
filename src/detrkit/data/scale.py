"""The scale at which a model meets objects in training, which tiles of larger images are to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np

from detrkit.data.coco import DetectionDataset

# Nearly all objects are no larger than this percentile of their longer sides.
_LARGE = 95


class TrainingScale(TypedDict):
    """What ``DetectionConfig.chosen["training_scale"]`` holds, for ``tiles="auto"``.

    All in pixels of the images before they are resized.
    """

    image_size: list[int]  # median height, median width
    large_object_side: float | None  # 95 of 100 objects are no longer; None without objects


def training_scale(dataset: DetectionDataset) -> TrainingScale:
    """The sizes of a data set's images and objects.

    Args:
        dataset: A data set that ``check_dataset`` has checked, with at least one image.
    """
    sizes = np.array(dataset.sizes, np.float64)
    sides = [max(box[2], box[3]) for box in _boxes(dataset)]
    return {
        "image_size": [round(side) for side in np.median(sizes, axis=0).tolist()],
        "large_object_side": round(float(np.percentile(sides, _LARGE)), 1) if sides else None,
    }


def _boxes(dataset: DetectionDataset) -> Iterator[Sequence[float]]:
    """x, y, width and height of the objects, without crowds and stuff."""
    things = {c["id"] for c in dataset.document["categories"] if c.get("isthing", True)}
    for row in dataset.document["annotations"]:
        entries: Sequence[Any] = row.get("segments_info", [row])
        for entry in entries:
            box = entry.get("bbox")
            if box and not entry.get("iscrowd") and entry.get("category_id") in things:
                yield box
