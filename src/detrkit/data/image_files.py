"""The files that an annotation file names, found where exporters and people leave them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from detrkit.common.text import is_url

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)

# What tools call the folder beside their annotation file; it says nothing about which image is meant.
_PLAIN_FOLDERS = frozenset({"images", "image", "img", "imgs", "data", "jpegimages"})


def image_files_in(folder: Path) -> list[Path]:
    """The image files in a folder and the folders inside, in the order of their names."""
    return sorted(
        Path(root, name)
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in IMAGE_SUFFIXES
    )


class ImageFiles:
    """Finds files of a folder by the names in a document.

    A name may have backslashes, ``%20`` and the like, another case or
    form of its accented letters, the folder's own name in front of it
    (``images/a.jpg`` with the folder ``images``), or the path or address of another machine. A file is taken
    only if no other one and no other name could be meant.

    Args:
        folder: The folder of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, names: Iterable[str]) -> dict[str, str]:
        """The file of each name that can be found, as a path relative to the folder."""
        found = {name: self._find(name) for name in names}
        claims = Counter(os.path.normpath(file) for file in found.values() if file is not None)
        return {
            name: file
            for name, file in found.items()
            if file is not None and (file == name or claims[os.path.normpath(file)] == 1)
        }

    def _find(self, name: str) -> str | None:
        if self._exists(name):
            return name
        spellings = list(dict.fromkeys(self._spellings(name)))
        for spelling in spellings:
            if self._exists(spelling):
                return spelling
        for spelling in spellings:
            same = self._by_folded_name.get(_folded(spelling), [])
            if len(same) == 1:
                return same[0]
        return None

    def _exists(self, name: str) -> bool:
        try:
            return bool(name) and (self.folder / name).exists()
        except (OSError, ValueError):  # too long, or with a null
            return False

    def _spellings(self, name: str) -> Iterator[str]:
        """What the name may mean, the nearest first."""
        foreign = is_url(name)
        if foreign:
            name = urlsplit(name).path
        for text in (name, unquote(name)):
            path = text.replace("\\", "/")
            foreign = foreign or path.startswith(("/", "..")) or path[1:3] == ":/"
            parts = [part for part in PurePosixPath(path).parts if part not in ("/", ".", "..")]
            if not parts:
                continue
            yield "/".join(parts)
            for start in range(1, len(parts)):
                left_out = [part.lower() for part in parts[:start]]
                ends = [part.lower() for part in self.folder.absolute().parts[-start:]]
                if foreign or left_out == ends or all(part in _PLAIN_FOLDERS for part in left_out):
                    yield "/".join(parts[start:])
            yield from (f"{folder}/{'/'.join(parts)}" for folder in ("images", "data"))

    @cached_property
    def _by_folded_name(self) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for root, _, names in os.walk(self.folder):
            for name in names:
                path = os.path.relpath(Path(root, name), self.folder)
                files.setdefault(_folded(path), []).append(path)
        return files


def _folded(path: str) -> str:
    """A path without case, and with each accented letter as one character, which macOS writes as two."""
    return unicodedata.normalize("NFC", os.path.normpath(path)).lower()
