"""Sizes of image files, read from their headers."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import PIL.Image

from detrkit.common.errors import ImageError
from detrkit.common.progress import with_progress
from detrkit.processing.images import stored_orientation

_QUARTER_TURNS = range(5, 9)


def read_image_sizes(
    paths: Sequence[Path], *, exif_orientation: bool = False, decode: bool = False
) -> list[tuple[int, int] | Exception]:
    """Sizes of many image files, read in threads, with a progress bar after a few seconds.

    Args:
        paths: The files.
        exif_orientation: Whether to return the size after rotating the image as its EXIF orientation says.
        decode: Whether to decode the pixels as well, which takes longer and finds truncated files.

    Returns:
        For each file its (height, width) in pixels, or the error: FileNotFoundError or ImageError.
    """
    # More threads than cores, because most of the time on a network drive is spent waiting.
    threads = min(32, 4 * (os.cpu_count() or 1))
    read = partial(_read_size, exif_orientation=exif_orientation, decode=decode)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's warnings about large or odd files
        return list(with_progress(pool.map(read, paths), len(paths), "Checking"))


def _read_size(path: Path, *, exif_orientation: bool, decode: bool) -> tuple[int, int] | Exception:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            return ImageError(f"{path}: is not a regular file")
        with PIL.Image.open(path) as image:
            turned = exif_orientation and stored_orientation(image) in _QUARTER_TURNS
            if decode:
                image.load()
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError as error:
        return error
    except Exception as error:  # damaged files raise anything from SyntaxError to struct.error
        return ImageError(f"{path}: {error}")
