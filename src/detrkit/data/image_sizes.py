"""Sizes of image files, read from their headers."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from detrkit.common.errors import ImageError
from detrkit.common.progress import with_progress
from detrkit.processing.images import stored_orientation
from detrkit.processing.sources import ImageFile

_QUARTER_TURNS = range(5, 9)


class ImageSize(NamedTuple):
    """The size of an image file.

    Attributes:
        height: Height in pixels, as the image is stored.
        width: Width in pixels, as the image is stored.
        rotated: Whether its EXIF orientation exchanges height and width.
    """

    height: int
    width: int
    rotated: bool

    def frame(self, exif_orientation: bool) -> tuple[int, int]:
        """(height, width) of the image as it is read with or without its EXIF orientation."""
        if exif_orientation and self.rotated:
            return self.width, self.height
        return self.height, self.width


def read_image_sizes(paths: Sequence[Path], *, decode: bool = False) -> list[ImageSize | Exception]:
    """Sizes of many image files, read in threads, with a progress bar after a few seconds.

    Args:
        paths: The files.
        decode: Whether to decode the pixels as well, which takes longer and finds truncated files.

    Returns:
        For each file its size, or the error: FileNotFoundError or ImageError.
    """
    # More threads than cores, because most of the time on a network drive is spent waiting.
    threads = min(32, 4 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(threads) as pool:
        read = pool.map(partial(_read_size, decode=decode), paths)
        return list(with_progress(read, len(paths), "Checking"))


def _read_size(path: Path, *, decode: bool) -> ImageSize | Exception:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            return ImageError(f"{path}: is not a regular file")
        with ImageFile(path) as file:
            image = file.frame(0) if decode else file.image
            return ImageSize(image.height, image.width, stored_orientation(image) in _QUARTER_TURNS)
    except (FileNotFoundError, ImageError) as error:
        return error
    except ValueError:  # a name with a null or half a surrogate, which no file can have
        return FileNotFoundError(str(path))
    except OSError as error:
        return ImageError(f"{path}: cannot be opened ({error.strerror or error})")
