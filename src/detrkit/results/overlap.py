"""Overlapping boxes: their IoU, and the filter that keeps the best of those that lie on one object."""

from __future__ import annotations

import numpy as np


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes.

    Args:
        boxes: (n, 4) xyxy, in any unit.
        others: (m, 4) xyxy, in the same unit.

    Returns:
        (n, m) float32; 0 where both boxes are empty.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = _areas(boxes)[:, None] + _areas(others)[None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def without_overlaps(boxes: np.ndarray, iou: float, labels: np.ndarray | None = None) -> np.ndarray:
    """The boxes that are left when each one drops the worse ones that overlap it (non-maximum suppression).

    Args:
        boxes: (n, 4) xyxy, the best first.
        iou: A box is dropped if its IoU with a better one that is kept is higher.
        labels: (n,) classes; boxes of two classes then do not drop each other.

    Returns:
        (m,) int64, the places of those that are kept, in order.
    """
    left = np.arange(len(boxes))
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        dropped = box_iou(boxes[best : best + 1], boxes[left])[0] > iou
        if labels is not None:
            dropped &= labels[left] == labels[best]
        left = left[~dropped]
    return np.array(kept, dtype=np.int64)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=-1)
