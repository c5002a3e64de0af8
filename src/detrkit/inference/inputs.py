"""From the images that a user names to a list of files and addresses."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from detrkit.common.errors import ImageError
from detrkit.common.files import content_hash
from detrkit.common.limits import ImageLimits
from detrkit.common.log import logger
from detrkit.common.text import is_data_url, is_url, short_name
from detrkit.inference.video_names import SUFFIXES, is_camera, is_live, is_video
from detrkit.results.positions import named

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.processing.frames import VideoFrame
    from detrkit.processing.sources import ImageFile

_SUFFIXES = frozenset({".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageInput:
    """One image that the user named, itself or through a folder or pattern.

    Attributes:
        source: The path or address.
        frame: The number of a frame of an animation, or page of a TIFF, from 0; None for the first one,
            with a warning where there are more.
        video: Whether it is a video, camera or stream, each frame of which is an image.
    """

    source: str
    frame: int | None = None
    video: bool = False

    @property
    def base_name(self) -> str:
        """The last part of the path or address, never empty, and the frame if it is one of several."""
        return f"{self._name}{self.fragment}"

    @property
    def fragment(self) -> str:
        """What tells the frames of a file apart; empty for an image that is read as a whole."""
        return "" if self.frame is None else f"#frame={self.frame + 1}"

    @property
    def _name(self) -> str:
        if self.video and is_camera(self.source):
            return f"camera-{self.source}"
        if not is_url(self.source) and not is_live(self.source):
            return Path(self.source).name
        try:
            path = "" if is_data_url(self.source) else urlsplit(self.source).path
        except ValueError:  # a malformed address, of which reading it says what is wrong
            path = ""
        return PurePosixPath(path).name or "image"

    @property
    def path(self) -> Path | None:
        """The file; None for an address on the web, a camera, a ``data:`` URL or a malformed address."""
        if is_url(self.source) or is_data_url(self.source) or (self.video and is_live(self.source)):
            return None
        if not self.source.lower().startswith("file:"):
            return Path(self.source)
        try:
            return Path(url2pathname(urlsplit(self.source).path))
        except ValueError:
            return None


class Fingerprints:
    """What tells a later run whether an image is the one that an earlier run has seen.

    For a file it is a hash of its content, taken once: where possible before the image is read. For an
    address it is a hash of that. A pipe or camera has none, nor a file that is larger than an image may be.
    All frames of a video have that of the video.

    Args:
        inputs: The images.
        limits: Maximum size of files.
    """

    def __init__(self, inputs: Sequence[ImageInput], limits: ImageLimits) -> None:
        self._inputs = inputs
        self._max_bytes = limits.max_file_bytes
        self._known: dict[int, str | None] = {}

    def __call__(self, position: int) -> str | None:
        """The fingerprint of the image at a position; None if it has none or cannot be read."""
        position = named(position)
        if position not in self._known:
            self._known[position] = _fingerprint(self._inputs[position], self._max_bytes)
        return self._known[position]


def _fingerprint(item: ImageInput, max_bytes: int | None) -> str | None:
    if item.video:
        max_bytes = None
        if is_live(item.source):
            return None
    if item.path is None:
        return f"address:{hashlib.sha256(item.source.encode(errors='backslashreplace')).hexdigest()}"
    try:
        if not item.path.is_file() or (max_bytes is not None and item.path.stat().st_size > max_bytes):
            return None
        return content_hash(item.path)
    except (OSError, ValueError):
        return None


def standard_input(argument: str) -> str:
    """The path of standard input for "-", any other argument as it is."""
    return "/dev/stdin" if argument == "-" else argument


def find_images(
    arguments: Sequence[str], *, videos: bool = False, recursive: bool = False
) -> tuple[list[ImageInput], list[str]]:
    """The images meant by the arguments of a command, each once, in the order they were named.

    Args:
        arguments: Files, folders (their image files), patterns, addresses, and "-" for standard input.
        videos: Whether the command takes videos, numbers of cameras and RTSP addresses too.
        recursive: Whether the folders inside a folder count too, except hidden ones and links to folders.

    Returns:
        The images, and one line for each argument that means no image.
    """
    sources: list[str] = []
    mistakes: list[str] = []
    for argument in map(standard_input, arguments):
        if videos and is_camera(argument):
            sources.append(argument)
            continue
        found, wrong = _expand(argument, videos, recursive)
        sources += found
        mistakes += wrong
    unique: dict[str, str] = {}
    for source in sources:
        same_file = source if is_url(source) else os.path.abspath(source)  # noqa: PTH100 - links stay apart
        unique.setdefault(same_file, source)
    return [ImageInput(source, video=videos and is_video(source)) for source in unique.values()], mistakes


def every_frame(images: Sequence[ImageInput], limits: ImageLimits | None = None) -> list[ImageInput]:
    """The images with each frame of an animation, or page of a TIFF, as an image of its own.

    Addresses are fetched for it. What cannot be read stays one image, of which reading it says why.
    """
    from detrkit.processing.sources import ImageFile

    found = []
    for image in images:
        count = 1
        if not image.video and not _is_pipe(image.source):
            with contextlib.suppress(ImageError), ImageFile(image.source, limits) as file:
                count = len(file)
        found += [image] if count == 1 else [replace(image, frame=number) for number in range(count)]
    return found


class FrameReader:
    """Reads one image after another; a file of several frames stays open from one to the next.

    Args:
        exif_orientation: Turn images as their EXIF entry says.
        limits: See :func:`detrkit.processing.images.load_image`.
    """

    def __init__(self, *, exif_orientation: bool, limits: ImageLimits) -> None:
        self._exif_orientation, self._limits = exif_orientation, limits
        self._file: ImageFile | None = None
        self._source: str | None = None

    def read(self, item: ImageInput) -> Image | VideoFrame:
        """The RGB image; a frame of an animation, or page of a TIFF, with its number and time.

        Raises:
            ImageError: It cannot be found, read or used.
        """
        from detrkit.inference.prepared import read_image
        from detrkit.processing.frames import VideoFrame
        from detrkit.processing.images import read_frame
        from detrkit.processing.sources import ImageFile

        if item.frame is None:
            return read_image(item.source, exif_orientation=self._exif_orientation, limits=self._limits)
        if self._file is None or self._source != item.source:
            self.close()
            self._file, self._source = ImageFile(item.source, self._limits), item.source
        image = read_frame(self._file, item.frame, self._exif_orientation)
        image.info = {}
        return VideoFrame(image, item.frame, self._file.start(item.frame), item.source)

    def close(self) -> None:
        """Closes the file that is open."""
        if self._file is not None:
            self._file.close()
        self._file = None


def _is_pipe(source: str) -> bool:
    """Whether a source can be read only once."""
    try:
        return not is_url(source) and Path(source).is_fifo()
    except (OSError, ValueError):
        return False


def _expand(argument: str, videos: bool, recursive: bool) -> tuple[list[str], list[str]]:
    """What an argument names, and one line for each thing that is wrong with it."""
    if is_url(argument) or "://" in argument:  # file: is read, others are refused by their name
        return [argument], []
    path = Path(argument)
    try:
        if path.is_dir():
            return _images_of(path, argument, videos, recursive)
        if path.exists():
            return [argument], []
    except (OSError, ValueError) as error:  # no permission, or a name that no file system takes
        return [], [f"{argument}: cannot be read: {getattr(error, 'strerror', None) or error}"]
    if glob.has_magic(argument):
        files = sorted(f for f in glob.glob(argument, recursive=True) if not Path(f).is_dir())  # noqa: PTH207
        return files, [] if files else [f"{argument}: no file matches"]
    return [], [f"{argument}: no such file or folder"]


def _images_of(folder: Path, argument: str, videos: bool, recursive: bool) -> tuple[list[str], list[str]]:
    """The image files of a folder in the order of their names, and one line for each unreadable folder.

    What is left out is reported.

    Raises:
        OSError: The folder itself cannot be read.
    """
    unreadable: list[OSError] = []
    tree = _tree(folder, unreadable)
    found = next(tree, [])
    if unreadable:
        raise unreadable[0]
    if recursive:
        found += [file for files in tree for file in files]
    elif inner := next((file for files in tree for file in files if _is_image(file)), None):
        logger.warning(
            "%s: images in subfolders, such as %s, are left out; add --recursive to read them",
            argument,
            inner.relative_to(folder),
        )
    films = [file for file in found if videos and file.suffix.lower() in SUFFIXES and file.is_file()]
    if films:
        logger.warning(
            "%s: videos in a folder, such as %s, are left out; name them, or use a pattern such as '%s/*%s'",
            argument,
            films[0].relative_to(folder),
            argument.rstrip("/"),
            films[0].suffix,
        )
    images = [str(file) for file in found if _is_image(file)]
    if not images:
        return [], [f"{argument}: no images in this folder"]
    named = unreadable if recursive else []
    return images, [f"{error.filename}: cannot be read: {error.strerror}" for error in named]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and file.is_file()


def _tree(folder: Path, unreadable: list[OSError]) -> Iterator[list[Path]]:
    """The files of a folder, then of each folder inside, without hidden folders and links to folders."""
    for root, folders, names in os.walk(folder, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield [Path(root, name) for name in sorted(names)]


def video_numbers(images: Sequence[ImageInput]) -> dict[int, int]:
    """Position -> number of the video or animation, from 1, of the videos and frames among the images."""
    numbers: dict[str, int] = {}
    return {
        position: numbers.setdefault(image.source, len(numbers) + 1)
        for position, image in enumerate(images)
        if image.video or image.frame is not None
    }


def image_ids(images: Sequence[ImageInput]) -> list[int]:
    """Ids for a COCO document: the numbers that the files are named by, else 1, 2, 3, ...

    COCO's files are called by their image's id (``000000000139.jpg``); keeping it lets the results be
    compared with COCO's annotations.
    """
    stems = [Path(image.base_name).stem for image in images]
    if all(re.fullmatch("[0-9]{1,18}", stem) for stem in stems):
        ids = [int(stem) for stem in stems]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(images) + 1))


def file_names(images: Sequence[ImageInput]) -> list[str]:
    """Names for a COCO document: without folders, except where two images would share a name."""
    counts = Counter(image.base_name for image in images)
    return [
        image.base_name if counts[image.base_name] == 1 else f"{short_name(image.source)}{image.fragment}"
        for image in images
    ]
