"""Files that the commands write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_file, check_writable
from detrkit.common.text import is_url
from detrkit.inference.inputs import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

_DRAWING_SUFFIXES = (".jpg", ".jpeg", ".png")


def check_output_file(option: str, file: Path | None) -> None:
    """Refuses, before any work, a file that is a folder or cannot be written.

    Args:
        option: The option that names the file.
        file: The file; ``-`` for stdout, None if the option is not given.

    Raises:
        DetrkitError: The file is a folder or cannot be written.
    """
    if file is None or str(file) == "-":
        return
    if file.is_dir():
        raise DetrkitError(f"{option} must be a file, but {file} is a folder")
    if file.is_file() or not file.exists():  # a pipe or device is written to directly
        check_writable(file)


def check_save_dir(save_dir: Path | None, inputs: Sequence[ImageInput]) -> None:
    """Refuses, before any work, a folder that cannot be written to or where drawings would replace inputs.

    Raises:
        DetrkitError: ``save_dir`` is a file, cannot be written to, or contains one of the inputs.
    """
    if save_dir is None:
        return
    if save_dir.exists() and not save_dir.is_dir():
        raise DetrkitError(f"--save-dir must be a folder, but {save_dir} is a file")
    check_writable(save_dir)
    originals = {Path(item.source).resolve() for item in inputs if not is_url(item.source)}
    for name in drawing_names(inputs):
        if (save_dir / name).resolve() in originals:
            raise DetrkitError(
                f"--save-dir {save_dir} would overwrite the input {name}; choose another folder"
            )


def drawing_names(inputs: Sequence[ImageInput]) -> list[str]:
    """A file name for the drawing of each image: the image's own, numbered if two would be the same.

    JPEG and PNG keep their format, others become PNG.
    """
    taken: set[str] = set()
    names = []
    for item in inputs:
        path = Path(item.base_name)
        suffix = path.suffix if path.suffix.lower() in _DRAWING_SUFFIXES else ".png"
        # A URL may contain characters that a file name may not.
        stem = re.sub(r"[^\w.-]", "_", path.stem) if is_url(item.source) else path.stem
        name, number = f"{stem}{suffix}", 2
        while name.lower() in taken:
            name, number = f"{stem}-{number}{suffix}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def save_image(image: Image, path: Path) -> None:
    """Writes an image, complete or not at all.

    Raises:
        DetrkitError: It cannot be written.
    """
    with atomic_file(path) as temporary:
        image.save(temporary, quality=92)
