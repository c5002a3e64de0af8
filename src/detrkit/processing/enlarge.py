"""Pillow's bilinear enlargement, straight to the network's floats.

Pillow resizes bytes in two passes, first along the rows and then along the columns, and rounds to bytes after
each. For a photo of 640x480 the second pass and what follows it (splitting the channels, converting to float,
normalising) take longer than the first. Here Pillow does the first pass, and the second one is done together
with the normalisation, in float arithmetic that provably gives Pillow's integers. It works for enlargement,
where each new row lies between two old ones.

All of it is NumPy on pieces that fit a core's cache. The same in torch would meet at a barrier of torch's
threads after every piece, and takes a hundred times as long where other programs keep the cores busy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import PIL.Image

MAX_HEIGHT = 2048
"""Largest new height in pixels for which the arithmetic of :func:`row_weights` is exact."""

# Floats in a piece: the handful of buffers of this size stay in a core's second-level cache.
_PIECE = 64 * 1024
# Pillow's weights are integers of 22 bits (PRECISION_BITS in its Resample.c).
_ONE = 1 << 22


def can_enlarge(old_size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    """Whether :func:`write_enlarged` can resize from (height, width) to (height, width), both in pixels."""
    return 2 <= old_size[0] < new_size[0] <= MAX_HEIGHT


def write_enlarged(
    image: PIL.Image.Image, out: np.ndarray, scale: Sequence[float], bias: Sequence[float]
) -> None:
    """Resizes an RGB image bilinearly and writes ``pixel * scale + bias``.

    Args:
        image: An RGB image with fewer rows than ``out``; the width can shrink or grow.
        out: float32 (3, height, width) to write to, may be a view.
        scale: Factor for each channel.
        bias: Summand for each channel.
    """
    _, height, width = out.shape
    stretched = image.resize((width, image.height), PIL.Image.Resampling.BILINEAR)
    rows, weights = row_weights(image.height, height)
    for band, plane, factor, summand in zip(stretched.split(), out, scale, bias):
        _enlarge_height(np.asarray(band), plane, rows, weights, np.float32(factor), np.float32(summand))


@lru_cache(maxsize=64)
def row_weights(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Where new rows lie between old ones, so that float arithmetic rounds as Pillow does.

    New row y is ``a + floor((b - a) * weight + 0.5)`` of the old rows a at ``rows[y]`` and b after it.
    Pillow computes ``(a * (2**22 - k) + b * k + 2**21) >> 22`` with the integer k nearest to ``2**22 * x``,
    where x is a multiple of 1 / (2 * new). The two agree: ``(b - a) * x + 0.5`` is either an integer, or at
    least 2.4e-4 off one (as new is at most 2048), more than all the roundings involved. Where it is an
    integer, Pillow's result depends on whether k was rounded up or down, and so the weight is moved off x in
    that direction, by more than float32 can lose and by too little to matter elsewhere.

    Args:
        old: Number of old rows, at least 2.
        new: Number of new rows, more than ``old``.

    Returns:
        ``rows`` int64 (new,) from 0 to old - 2, and ``weights`` float32 (new, 1).
    """
    # Twice ``new`` times the position of each new row's centre among the centres of the old rows.
    positions = (2 * np.arange(new, dtype=np.int64) + 1) * old - new
    rows, parts = np.divmod(positions, 2 * new)
    exact = parts / (2 * new)
    integers = np.floor(exact * _ONE + 0.5).astype(np.int64)
    direction = np.sign(integers * (2 * new) - parts * _ONE)
    weights = exact * (1 + direction * 2.0**-21)
    weights[rows < 0] = 0  # above the first centre: the first row itself
    weights[rows > old - 2] = 1  # below the last centre: the last row itself
    rows = rows.clip(0, old - 2)
    return rows, weights.astype(np.float32)[:, None]


def _enlarge_height(
    plane: np.ndarray,
    out: np.ndarray,
    rows: np.ndarray,
    weights: np.ndarray,
    scale: np.float32,
    bias: np.float32,
) -> None:
    """The second pass for one channel: uint8 (old, width) to float32 (new, width)."""
    height, width = out.shape
    step = max(1, min(height, _PIECE // width))
    low_buffer, rise_buffer = np.empty((2, step, width), dtype=np.float32)
    half = np.float32(0.5)
    for top in range(0, height, step):
        bottom = min(top + step, height)
        first = int(rows[top])
        old = plane[first : int(rows[bottom - 1]) + 2].astype(np.float32)
        between = rows[top:bottom] - first
        # mode="clip" as the default takes a detour over a copy of ``out``; no index is out of bounds.
        rise = np.take(old[1:] - old[:-1], between, axis=0, out=rise_buffer[: bottom - top], mode="clip")
        rise *= weights[top:bottom]
        rise += half
        np.floor(rise, out=rise)
        rise *= scale
        old *= scale
        old += bias
        low = np.take(old, between, axis=0, out=low_buffer[: bottom - top], mode="clip")
        np.add(low, rise, out=out[top:bottom])
