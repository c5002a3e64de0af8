"""The extent of segments in a map: the boxes around them and their deepest pixels, with NumPy."""

from __future__ import annotations

import numpy as np


def find_boxes(labels: np.ndarray, count: int) -> list[tuple[slice, slice] | None]:
    """The rows and columns of the smallest box around the pixels of each label.

    Args:
        labels: (height, width) integers; 0 for pixels of no label.
        count: The labels are 1 to this number.

    Returns:
        For each label the slices of rows and columns; None for one without a pixel.
    """
    # Numbers of 16 bits are sorted several times faster than others.
    small = labels.ravel().astype(np.uint16 if count < 2**16 else np.int64)
    order = np.argsort(small, kind="stable")
    ends = np.cumsum(np.bincount(small, minlength=count + 1))
    rows, columns = np.divmod(order, labels.shape[1])
    boxes: list[tuple[slice, slice] | None] = []
    for start, end in zip(ends[:count].tolist(), ends[1 : count + 1].tolist()):
        if start == end:
            boxes.append(None)
            continue
        across = columns[start:end]
        left, right = int(across.min()), int(across.max())
        boxes.append((slice(int(rows[start]), int(rows[end - 1]) + 1), slice(left, right + 1)))
    return boxes


def deepest_pixel(inside: np.ndarray) -> tuple[int, int]:
    """Row and column of the pixel that is farthest from those outside, the first of several.

    Args:
        inside: (height, width) bool; what is beyond its edges is outside.
    """
    padded = np.pad(np.asarray(inside, bool), 1)
    lines = np.arange(len(padded), dtype=np.int32)[:, None]
    above = np.maximum.accumulate(np.where(padded, -1, lines), axis=0)
    below = np.minimum.accumulate(np.where(padded, len(padded), lines)[::-1], axis=0)[::-1]
    vertical = np.minimum(lines - above, below - lines) ** 2
    # Squared distances: the nearest pixel outside is in some column, as far as the columns are apart.
    distances = vertical.copy()
    for step in range(1, padded.shape[1]):
        if step % 4 == 1 and step**2 >= distances.max():
            break
        np.minimum(distances[:, step:], vertical[:, :-step] + step**2, out=distances[:, step:])
        np.minimum(distances[:, :-step], vertical[:, step:] + step**2, out=distances[:, :-step])
    row, column = np.unravel_index(distances.argmax(), distances.shape)
    return int(row) - 1, int(column) - 1
