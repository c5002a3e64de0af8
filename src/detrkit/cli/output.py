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

_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")


def check_json_file(json_file: Path | None) -> None:
    """Refuses, before any work, a folder where ``--json`` needs a file, or a place that takes none.

    Raises:
        DetrkitError: It is one.
    """
    if json_file is None or str(json_file) == "-":
        return
    if json_file.is_dir():
        raise DetrkitError(f"--json needs a file, but {json_file} is a folder")
    if json_file.is_file() or not json_file.exists():  # into a pipe or device it is written directly
        check_writable(json_file)


def check_save_dir(save_dir: Path | None, inputs: Sequence[ImageInput]) -> None:
    """Refuses, before any work, a place for pictures that takes none or where they would destroy an input.

    Raises:
        DetrkitError: It is one.
    """
    if save_dir is None:
        return
    if save_dir.exists() and not save_dir.is_dir():
        raise DetrkitError(f"--save-dir needs a folder, but {save_dir} is a file")
    check_writable(save_dir)
    originals = {Path(item.source).resolve() for item in inputs if not is_url(item.source)}
    for name in picture_names(inputs):
        if (save_dir / name).resolve() in originals:
            raise DetrkitError(
                f"--save-dir {save_dir} would overwrite the input {name}; choose another folder"
            )


def picture_names(inputs: Sequence[ImageInput]) -> list[str]:
    """A file name for the drawn picture of each image: the image's own, numbered where two would be the same.

    JPEG and PNG keep their format, others become PNG.
    """
    taken: set[str] = set()
    names = []
    for item in inputs:
        path = Path(item.base_name)
        suffix = path.suffix if path.suffix.lower() in _PICTURE_SUFFIXES else ".png"
        # An address may hold characters that a file name may not.
        stem = re.sub(r"[^\w.-]", "_", path.stem) if is_url(item.source) else path.stem
        name, number = f"{stem}{suffix}", 2
        while name.lower() in taken:
            name, number = f"{stem}-{number}{suffix}", number + 1
        taken.add(name.lower())
        names.append(name)
    return names


def save_picture(picture: Image, path: Path) -> None:
    """Writes a picture, whole or not at all.

    Raises:
        DetrkitError: It cannot be written.
    """
    with atomic_file(path) as temporary:
        picture.save(temporary, quality=92)
