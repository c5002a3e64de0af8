"""From an exported model's masks to masks and maps of one image, with NumPy.

The same rules as in :mod:`detrkit.processing.segmentation` (:mod:`detrkit.processing.panoptic_rule` has what
both share). Only those pixels are computed that a result of the target size needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from detrkit.common.schema import Segment
from detrkit.processing.array_post_processing import sigmoid, softmax
from detrkit.processing.panoptic_rule import (
    MaskSizes,
    PanopticRule,
    list_segments,
    pixel_centres,
    pixel_corners,
    settle,
)

# Numbers of masks that are held at the size of the result: 130 MiB.
_NUMBERS_AT_ONCE = 32 * 800 * 1333
# Logits this close can become equal probabilities when a softmax rounds them.
_ROUNDED_AWAY = np.float32(1e-6)

_Axis = tuple[np.ndarray, np.ndarray, np.ndarray]


class ArrayGrid:
    """How masks become pixels of one image: only those at which the image's nearest pixels are.

    Args:
        sizes: What masks are resized to, cropped to, and sampled at.
        nearest: Which pixels are the nearest ones, :func:`pixel_centres` or :func:`pixel_corners`.
    """

    def __init__(self, sizes: MaskSizes, nearest: Callable[[int, int], np.ndarray] = pixel_centres) -> None:
        self.target = sizes.target
        self._padded = sizes.padded
        if sizes.image == sizes.target:
            places = [np.arange(length) for length in sizes.image]
        else:
            places = [nearest(*lengths) for lengths in zip(sizes.image, sizes.target)]
        # Where an image is enlarged, its pixels repeat: each is computed once.
        distinct = [np.unique(line, return_inverse=True) for line in places]
        self._lines = [line for line, _ in distinct]
        self._repeats = [repeat for _, repeat in distinct]
        self.shape = len(self._lines[0]), len(self._lines[1])
        """(height, width) of what is computed."""

    def resize(self, mask: np.ndarray) -> np.ndarray:
        """A mask (h, w) as float32 at the pixels that are computed."""
        rows, columns = (
            _interpolation(length, new, line)
            for length, new, line in zip(mask.shape, self._padded, self._lines)
        )
        mask = np.asarray(mask, np.float32)
        # The few rows of the mask first: their columns are cheap.
        wide = mask[:, columns[0]] * (1 - columns[2]) + mask[:, columns[1]] * columns[2]
        resized = wide[rows[0]]
        resized *= (1 - rows[2])[:, None]
        below = wide[rows[1]]
        below *= rows[2][:, None]
        resized += below
        return resized

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values (..., *shape) of the pixels that are computed as the result (..., *target)."""
        if self.shape == tuple(self.target):
            return values
        rows, columns = self._repeats
        return values[..., rows, :][..., columns]

    def counts(self) -> np.ndarray:
        """How many pixels of the result each computed one stands for: (*shape)."""
        rows, columns = (np.bincount(repeat) for repeat in self._repeats)
        return rows[:, None] * columns


def _interpolation(length: int, new: int, places: np.ndarray) -> _Axis:
    """Neighbours and weight of the second one, for places of an axis that is resized bilinearly.

    Computed in float32 as PyTorch does without aligned corners.
    """
    step = np.float32(length) / np.float32(new)
    exact = np.maximum(step * (places.astype(np.float32) + np.float32(0.5)) - np.float32(0.5), 0)
    low = np.minimum(exact.astype(np.int64), length - 1)
    high = np.minimum(low + 1, length - 1)
    return low, high, np.clip(exact - low.astype(np.float32), 0, 1)


def panoptic_map(
    scores: np.ndarray, labels: np.ndarray, masks: np.ndarray, sizes: MaskSizes, rule: PanopticRule
) -> tuple[np.ndarray, list[Segment]]:
    """The panoptic segmentation of one image, see :func:`detrkit.processing.segmentation.panoptic_segments`.

    Args:
        scores: (n,), of the queries above the threshold.
        labels: int64 (n,).
        masks: (n, h, w), logits.
        sizes: How masks become pixels.
        rule: Things and stuff.

    Returns:
        Ids, int32 (height, width) at the target size, 0 where there is no segment; and the segments.
    """
    names = [int(label) for label in labels]
    grid = ArrayGrid(sizes)
    contest = _Contest(masks, grid)
    queries, areas = settle(names, rule, contest)
    if not queries:
        return np.zeros(sizes.target, np.int32), []
    ids = np.zeros(len(names), np.int32)
    ids[queries] = np.arange(1, len(queries) + 1)
    segments = list_segments(queries, names, [float(score) for score in scores], areas, rule)
    return grid.spread(ids[contest.winners]), segments


def masks_above(masks: np.ndarray, sizes: MaskSizes, mask_threshold: float = 0.5) -> np.ndarray:
    """Masks of objects at the target size; they may overlap.

    Args:
        masks: (n, h, w), logits.
        sizes: How masks become pixels.
        mask_threshold: Probability above which a pixel belongs to a mask.

    Returns:
        bool (n, height, width).
    """
    grid = ArrayGrid(sizes, pixel_corners)
    found = np.empty((len(masks), *sizes.target), bool)
    for out, mask in zip(found, masks):
        out[:] = grid.spread(sigmoid(grid.resize(mask)) > mask_threshold)
    return found


class _Contest:
    """Which query wins each pixel of an image: under a softmax over the masks of those that are left.

    A softmax keeps the order of logits, so that it need not be computed, except where rounding makes equal
    probabilities of different logits and the first of them wins.
    """

    def __init__(self, masks: np.ndarray, grid: ArrayGrid) -> None:
        self._masks, self._grid = masks, grid
        self._counts = grid.counts()
        # Few masks stay at full size, so that a further turn looks only at the pixels that have to change.
        few = len(masks) * grid.shape[0] * grid.shape[1] <= _NUMBERS_AT_ONCE
        self._maps = np.empty((len(masks), *grid.shape), np.float32) if few else None
        self._best: np.ndarray | None = None
        self._close: np.ndarray | None = None
        # The query that wins each computed pixel.
        self.winners = np.zeros(grid.shape, np.int64)

    def areas(self, queries: list[int], merged: list[int] | None) -> list[int]:
        """See :class:`detrkit.processing.panoptic_rule.Contest`."""
        winners = self._winners(queries)
        self.winners = winners if merged is None else np.array(merged)[winners]
        weights = np.bincount(self.winners.ravel(), self._counts.ravel(), minlength=len(self._masks))
        return [int(weight) for weight in weights]

    def _winners(self, queries: list[int]) -> np.ndarray:
        """The winner of each pixel among ``queries``, of which later calls have fewer."""
        if self._best is None or self._close is None or self._maps is None:
            self._best, self._close = self._all_pixels(queries)
            stale = self._close
        else:
            stale = ~np.isin(self._best, queries) | self._close
        if stale.any():
            self._best[stale] = np.array(queries)[self._of_pixels(queries, stale)]
        return self._best

    def _all_pixels(self, queries: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The query with the greatest logit at each pixel, and where others come close to it."""
        best = np.full(self._grid.shape, -np.inf, np.float32)
        winners = np.zeros(self._grid.shape, np.int64)
        close = np.zeros(self._grid.shape, bool)
        for query in queries:
            logits = self._grid.resize(self._masks[query])
            if self._maps is not None:
                self._maps[query] = logits
            close &= logits <= best + _ROUNDED_AWAY  # what is far above all before it has no rival yet
            close |= np.abs(logits - best) <= _ROUNDED_AWAY
            winners[logits > best] = query
            np.maximum(best, logits, out=best)
        return winners, close

    def _of_pixels(self, queries: Sequence[int], pixels: np.ndarray) -> np.ndarray:
        """Which of the queries has the greatest probability at some pixels: its place among them."""
        if self._maps is not None:
            logits = self._maps[:, pixels][list(queries)]
        else:
            logits = np.stack([self._grid.resize(self._masks[query])[pixels] for query in queries])
        return softmax(logits.T).argmax(-1)
