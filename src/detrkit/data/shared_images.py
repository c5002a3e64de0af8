"""Images that two splits of a data set share, whatever their names: the same file, or the same photo.

A photo is recognised when it was encoded again, resized, stretched, turned or mirrored, or is one of two that
were taken of the same thing without moving the camera. Small thumbnails of all images are compared first,
larger ones of the few pairs that are alike then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from detrkit.common.errors import ImageError
from detrkit.common.progress import with_progress
from detrkit.data.coco import DetectionDataset
from detrkit.processing.sources import ImageFile

FEW_IMAGES = 2000
"""Up to so many images are compared by what they show even if they are not decoded anyway."""

_SMALL, _LARGE = 16, 64  # sides of the thumbnails in pixels
_BLOCK = 8  # pixels of a large thumbnail over which it is smoothed, to leave its details
_ALIKE = 0.94  # correlation of small thumbnails
_SAME, _SAME_DETAILS = 0.95, 0.75  # correlations of large ones, and of their details
_TRIED = 3  # pairs of each image that are looked at more closely
_ROWS = 32  # images that are compared with all others at once


class SharedImage(NamedTuple):
    """An image of one split that is in another, too.

    Attributes:
        path: The file.
        other: The file in the other split.
        identical: Whether the files are the same, byte by byte.
    """

    path: Path
    other: Path
    identical: bool


def describe_shared_images(
    first: DetectionDataset, second: DetectionDataset, *, names: tuple[str, str], decode: bool
) -> list[str]:
    """Lines that say which images of the second of two checked splits are in the first one as well.

    Args:
        first: Such as the training images.
        second: Such as the validation images.
        names: What the lines call the two, such as "training" and "validation".
        decode: Compare also large splits by what the images show, which decodes all of them.
    """
    shared = shared_images(first, second, decode=decode)
    lines = []
    for identical, what in (
        (True, f"are also {names[0]} images"),
        (False, f"look like {names[0]} images encoded again, resized, turned or taken twice"),
    ):
        found = [entry for entry in shared if entry.identical == identical]
        if found:
            lines.append(
                f"{len(found)} of the {len(second)} {names[1]} images {what}, such as {found[0].path} "
                f"({found[0].other}); the metrics will be too high. Keep them in one of the two only"
            )
    return lines


def shared_images(
    first: DetectionDataset, second: DetectionDataset, *, decode: bool = False
) -> list[SharedImage]:
    """The images of the second data set that the first one has too; see :func:`describe_shared_images`."""
    ours, others = ([dataset.path(place) for place in range(len(dataset))] for dataset in (second, first))
    sizes: dict[int, list[Path]] = {}
    for path in others:
        sizes.setdefault(path.stat().st_size, []).append(path)
    shared = {}
    for path in ours:
        same_size = sizes.get(path.stat().st_size, [])
        same = next((p for p in same_size if path.samefile(p) or path.read_bytes() == p.read_bytes()), None)
        if same is not None:
            shared[path] = SharedImage(path, same, True)
    if decode or len(ours) + len(others) <= FEW_IMAGES:
        left = [path for path in ours if path not in shared]
        shared |= {entry.path: entry for entry in _same_photos(left, others)}
    return [shared[path] for path in ours if path in shared]


def _same_photos(ours: Sequence[Path], others: Sequence[Path]) -> Iterator[SharedImage]:
    looks, other_looks = _thumbnails(ours), _thumbnails(others)
    if not looks or not other_looks:
        return
    known = _standard(np.stack([look.ravel() for look in other_looks.values()]))
    paths, chosen = list(other_looks), list(looks)
    for start in range(0, len(chosen), _ROWS):
        part = chosen[start : start + _ROWS]
        turned = np.stack([look.ravel() for path in part for look in _turns(looks[path])])
        alike = _standard(turned) @ known.T
        best = alike.reshape(len(part), -1, len(known)).max(1)
        for path, row in zip(part, best):
            for place in np.argsort(-row, kind="stable")[:_TRIED]:
                if row[place] >= _ALIKE and _is_same_photo(path, paths[place]):
                    yield SharedImage(path, paths[place], False)
                    break


def _is_same_photo(path: Path, other: Path) -> bool:
    """Whether two images are the same at a closer look, one of them perhaps turned or mirrored."""
    first, second = (_thumbnail(one, _LARGE) for one in (path, other))
    if first is None or second is None:
        return False
    return any(
        _correlation(look, second) >= _SAME
        and _correlation(_details(look), _details(second)) >= _SAME_DETAILS
        for look in _turns(first)
    )


def _thumbnails(paths: Sequence[Path]) -> dict[Path, np.ndarray]:
    """Small thumbnails of all readable images."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda path: _thumbnail(path, _SMALL), paths)
        looks = list(with_progress(found, len(paths), "Comparing"))
    return {path: look for path, look in zip(paths, looks) if look is not None}


def _thumbnail(path: Path, side: int) -> np.ndarray | None:
    """(side, side) grey levels; None for an image that cannot be read, which the check has named."""
    try:
        with ImageFile(path) as file:
            file.image.draft("L", (2 * side, 2 * side))  # a JPEG is decoded at a fraction of its size
            grey = file.frame(0).convert("L").resize((side, side), Image.Resampling.BOX)
            return np.asarray(grey, np.float32)
    except (ImageError, OSError, ValueError):
        return None


def _turns(look: np.ndarray) -> list[np.ndarray]:
    """The eight ways in which a square can be turned and mirrored."""
    return [side for turns in range(4) for side in (np.rot90(look, turns), np.rot90(look, turns).T)]


def _details(look: np.ndarray) -> np.ndarray:
    """What is left of a large thumbnail without its smooth parts."""
    blocks = look.reshape(_LARGE // _BLOCK, _BLOCK, _LARGE // _BLOCK, _BLOCK).mean((1, 3))
    smooth = Image.fromarray(blocks).resize((_LARGE, _LARGE), Image.Resampling.BICUBIC)
    return look - np.asarray(smooth)


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    one, other = _standard(np.stack([first.ravel(), second.ravel()]))
    return float(one @ other)


def _standard(rows: np.ndarray) -> np.ndarray:
    """Rows with mean 0 and length 1, whose products are correlations."""
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
