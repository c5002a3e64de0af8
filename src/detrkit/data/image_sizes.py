"""Sizes of image files, from their headers alone."""

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
    """Sizes of many image files, read by threads, with a progress bar once it takes more than a few seconds.

    Args:
        paths: The files.
        exif_orientation: Whether to give the size after turning the image as its EXIF orientation says.
        decode: Whether to decode the pixels too, which takes longer and finds files that end early.

    Returns:
        For each file its (height, width) in pixels, or the reason why there is none: FileNotFoundError or
        ImageError.
    """
    # More threads than cores: on a network drive most of the time goes into waiting.
    threads = min(32, 4 * (os.cpu_count() or 1))
    read = partial(_read_size, exif_orientation=exif_orientation, decode=decode)
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on large or odd files
        return list(with_progress(pool.map(read, paths), len(paths), "Checking"))


def _read_size(path: Path, *, exif_orientation: bool, decode: bool) -> tuple[int, int] | Exception:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe waits for whoever writes to it
            return ImageError(f"{path}: is no regular file")
        with PIL.Image.open(path) as image:
            turned = exif_orientation and stored_orientation(image) in _QUARTER_TURNS
            if decode:
                image.load()
            return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError as error:
        return error
    except Exception as error:  # damaged files raise anything from SyntaxError to struct.error
        return ImageError(f"{path}: {error}")
