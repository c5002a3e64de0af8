"""Files that the commands write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_file
from detrkit.common.outputs import COMMENT, SOFTWARE, unique_names
from detrkit.inference.inputs import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAWING_SUFFIXES = (".jpg", ".jpeg", ".png")
_VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv")


def check_save_dir(save_dir: Path | None) -> None:
    """Raises a DetrkitError if ``--save-dir`` is a file."""
    if save_dir is not None and save_dir.exists() and not save_dir.is_dir():
        raise DetrkitError(f"--save-dir must be a folder, but {save_dir} is a file")


def drawing_names(inputs: Sequence[ImageInput], suffix: str | None = None) -> list[str]:
    """A file name for the drawing of each image: the image's own, numbered if two would be the same.

    JPEG and PNG keep their format, others become PNG. Of videos MP4, MOV and MKV do, others become MKV, which
    takes sound in every format.

    Args:
        inputs: The images.
        suffix: The suffix of all names instead.
    """
    names = []
    for item in inputs:
        path = Path(item.base_name)
        known, other = (_VIDEO_SUFFIXES, ".mkv") if item.video else (_DRAWING_SUFFIXES, ".png")
        kept = path.suffix if path.suffix.lower() in known else other
        # A URL may contain characters that a file name may not.
        stem = re.sub(r"[^\w.-]", "_", path.stem) if "://" in item.source else path.stem
        names.append(f"{stem}{suffix or kept}")
    return unique_names(names)


def save_image(image: Image, path: Path) -> None:
    """Writes an image with detrkit's mark, complete or not at all.

    Raises:
        DetrkitError: It cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    with atomic_file(path) as temporary:
        if path.suffix.lower() == ".png":
            info = PngInfo()
            info.add_text("Software", SOFTWARE)
            image.save(temporary, pnginfo=info)
        else:
            image.save(temporary, quality=92, comment=COMMENT)
