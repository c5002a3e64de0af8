"""Overlapping boxes: their IoU, the filter that keeps the best, and objects that several tiles see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

# Places of the better and the worse box of each pair.
_Pairs: TypeAlias = tuple[np.ndarray, np.ndarray]

# Pairs of boxes that are compared at once: many for the speed, few enough for the memory.
_PAIRS_AT_ONCE = 1_000_000

# Two boxes of two tiles are one object from this IoU on. (Objects of BCCD: 0.4 to 0.6 give the same AP.)
_SAME_OBJECT = 0.5
# A box is cut if it comes this close to a border of its tile, in parts of the tile's longer side.
_BORDER = 0.01
# What the score of a cut box counts beside that of a whole one.
_CUT_WEIGHT = 0.5


class Views(NamedTuple):
    """Where the boxes of an image were found, if that was in tiles of it.

    Attributes:
        tiles: (n, 4) xyxy in pixels of the image, the tile that each of n boxes was found in.
        image_size: Height and width of the image in pixels.
    """

    tiles: np.ndarray
    image_size: tuple[int, int]


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes.

    Args:
        boxes: (n, 4) xyxy, in any unit.
        others: (m, 4) xyxy, in the same unit.

    Returns:
        (n, m) float32; 0 where both boxes are empty.
    """
    return _iou(boxes[:, None], others[None])


def without_overlaps(boxes: np.ndarray, iou: float, labels: np.ndarray | None = None) -> np.ndarray:
    """The boxes that are left when each one drops the worse ones that overlap it (non-maximum suppression).

    Args:
        boxes: (n, 4) xyxy, the best first.
        iou: A box is dropped if its IoU with a better one that is kept is higher.
        labels: (n,) classes; boxes of two classes then do not drop each other.

    Returns:
        (m,) int64, the places of those that are kept, in order.
    """

    def rivals() -> Iterator[_Pairs]:
        for better, worse in _touching_pairs(boxes, labels):
            overlap = _iou(boxes[better], boxes[worse]) > iou
            yield better[overlap], worse[overlap]

    return np.flatnonzero(_survivors(len(boxes), rivals()))


def without_repeats(
    boxes: np.ndarray, scores: np.ndarray, views: Views, labels: np.ndarray | None = None
) -> np.ndarray:
    """The boxes that are left when an object that several tiles see is kept once.

    Of two boxes of two tiles the worse is dropped if it is what its tile can see of the better one. A box
    that its tile cuts counts half: it gives way to the whole object in a neighbouring tile, unless that one
    is hardly believed in. Boxes of one tile do not drop each other.

    Args:
        boxes: (n, 4) xyxy in pixels.
        scores: (n,), as they are compared.
        views: The tiles that they were found in.
        labels: (n,) classes; boxes of two classes then do not drop each other.

    Returns:
        (m,) int64, the places of those that are kept, in order.
    """
    cut = _cut_by_their_tiles(boxes, views)
    order = np.argsort(-np.where(cut, scores * _CUT_WEIGHT, scores), kind="stable")
    boxes, tiles = boxes[order], views.tiles[order]
    labels = None if labels is None else labels[order]

    def rivals() -> Iterator[_Pairs]:
        for better, worse in _touching_pairs(boxes, labels):
            seen = np.concatenate(
                [
                    np.maximum(boxes[better, :2], tiles[worse, :2]),
                    np.minimum(boxes[better, 2:], tiles[worse, 2:]),
                ],
                axis=1,
            )
            same = _iou(seen, boxes[worse]) > _SAME_OBJECT
            same &= (tiles[better] != tiles[worse]).any(1)
            yield better[same], worse[same]

    return np.sort(order[_survivors(len(boxes), rivals())])


def _cut_by_their_tiles(boxes: np.ndarray, views: Views) -> np.ndarray:
    """(n,) bool: whether a box comes up to a border of its tile at which the image goes on."""
    height, width = views.image_size
    tiles = views.tiles
    margin = _BORDER * np.maximum(tiles[:, 2] - tiles[:, 0], tiles[:, 3] - tiles[:, 1])[:, None]
    before = (tiles[:, :2] > 0) & (boxes[:, :2] - tiles[:, :2] < margin)
    behind = (tiles[:, 2:] < (width, height)) & (tiles[:, 2:] - boxes[:, 2:] < margin)
    return (before | behind).any(1)


def _touching_pairs(boxes: np.ndarray, labels: np.ndarray | None) -> Iterator[_Pairs]:
    """All pairs of boxes (of one class) that share columns, the one that stands first in front."""
    order = np.argsort(boxes[:, 0], kind="stable")
    left, right = boxes[order, 0], boxes[order, 2]
    following = np.arange(1, len(boxes) + 1)
    counts = np.maximum(np.searchsorted(left, right) - following, 0)
    ends = np.cumsum(counts)
    start = 0
    while start < len(boxes):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        part = counts[start:stop]
        first = np.repeat(np.arange(start, stop), part)
        behind = np.arange(len(first)) - np.repeat(np.cumsum(part) - part, part)
        one, other = order[first], order[first + 1 + behind]
        start = stop
        wanted = (boxes[one, 1] < boxes[other, 3]) & (boxes[other, 1] < boxes[one, 3])
        if labels is not None:
            wanted &= labels[one] == labels[other]
        one, other = one[wanted], other[wanted]
        yield np.minimum(one, other), np.maximum(one, other)


def _survivors(number: int, rivals: Iterable[_Pairs]) -> np.ndarray:
    """(number,) bool: those that are left if each drops its worse rivals, unless it was dropped itself."""
    pairs = list(rivals)
    kept = np.ones(number, bool)
    if not pairs:
        return kept
    better, worse = (np.concatenate(side) for side in zip(*pairs))
    order = np.argsort(better, kind="stable")
    worse = worse[order]
    dropping, starts = np.unique(better[order], return_index=True)
    for place, start, stop in zip(dropping, starts, [*starts[1:], len(worse)]):
        if kept[place]:
            kept[worse[start:stop]] = False
    return kept


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4), as NumPy broadcasts them; 0 where both are empty."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    union = _areas(boxes) + _areas(others) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def _areas(boxes: np.ndarray) -> np.ndarray:
    return np.prod(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None), axis=-1)
