"""From what a caller names as an image to an image that Pillow has opened, frame by frame.

Everything that touches a stranger's bytes is inside :func:`image_errors`: whatever it raises there leaves as
one line.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import struct
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeAlias

import PIL.Image
from PIL.TiffImagePlugin import TiffImageFile

from detrkit.common.errors import DetrkitError, ImageError, ImageTooLargeError
from detrkit.common.limits import ImageLimits
from detrkit.common.log import logger
from detrkit.common.text import first_line, is_data_url, short_name
from detrkit.processing.fetching import WEB_SCHEMES, fetch

FileSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""A path, an address (``data:`` too), the bytes of an image file, or one that is open for reading bytes."""

BYTES = (bytes, bytearray, memoryview)

# What a shell makes of ``<(command)``, and standard input by its own name: the user has connected these.
_CONNECTED = re.compile(r"/dev/(?:stdin|fd/\d+)|/proc/self/fd/\d+")

# What an image file's own reader raises where the file is of another format.
_NOT_MINE = (SyntaxError, IndexError, TypeError, struct.error)

# Not pixels but programs and records, for which Pillow starts Ghostscript or Windows, or asks a plug-in.
_NO_PIXELS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})

# Formats whose further "frames" are layers of the one image.
_LAYERED = ("PSD",)


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Whatever is raised inside, by a damaged file or by Pillow on its behalf, leaves as an ImageError.

    Args:
        name: What the error calls the image.
    """
    try:
        yield
    except DetrkitError:
        raise
    except MemoryError as error:
        raise ImageError(f"{name}: not enough memory to decode it; shrink it") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"{name}: too many pixels to open safely ({first_line(error)}); shrink it"
        ) from error
    except Exception as error:  # a format's reader can raise anything on a damaged file
        if isinstance(error, ValueError) and "closed" in str(error):  # Pillow's and Python's own words
            raise ImageError(f"{name}: was closed before its pixels were read; open it again") from error
        raise ImageError(
            f"{name}: cannot be decoded ({first_line(error)}); the file is damaged, fetch it again"
        ) from error


def source_name(source: object) -> str:
    """What errors and warnings call an image."""
    if isinstance(source, (str, os.PathLike)):
        return short_name(os.fsdecode(source))
    for attribute in ("filename", "name"):  # of a PIL image, of an open file
        found = getattr(source, attribute, None)
        if found and isinstance(found, str):
            return found
    return "the image"


class ImageFile:
    """An image file that is open: how many frames it has, and each of them.

    To be used in a ``with`` block. Opening it raises an ImageError where it cannot be found or read.

    Attributes:
        name: What errors call it.
        image: It, as Pillow has opened it, with its first frame or the one that was read last.
    """

    def __init__(
        self, source: FileSource, limits: ImageLimits | None = None, name: str | None = None
    ) -> None:
        self.name = name or source_name(source)
        self._limits = limits or ImageLimits()
        self._starts: list[float | None] = [0.0]  # seconds from the first frame
        with image_errors(self.name):
            self._stream = open_stream(source, self.name, self._limits)
            try:
                self.image: PIL.Image.Image = self._open()
                self._check_size()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; frames that were read stay."""
        self._stream.close()

    def __len__(self) -> int:
        with image_errors(self.name):
            return frame_count(self.image)

    def frame(self, number: int) -> PIL.Image.Image:
        """A frame in the file's own mode, decoded; the object is the same for all frames.

        Raises:
            ImageError: It cannot be decoded, or has too many pixels.
        """
        with image_errors(self.name if not number else f"{self.name}: frame {number + 1}"):
            if number:
                self._go_to(number)
            self._check_size()
            _make_room(self.image)
            self.image.load()
            return self.image

    def start(self, number: int) -> float | None:
        """Seconds from the first frame to one that :meth:`frame` has given.

        None where the file does not say, such as for the pages of a TIFF.
        """
        if "timestamp" in self.image.info:  # WebP
            return float(self.image.info["timestamp"]) / 1000
        return self._starts[number] if "duration" in self.image.info else None

    def _go_to(self, number: int) -> None:
        """Moves to a frame, and notes how long those before it are shown."""
        for passed in range(len(self._starts) - 1, number):
            if self.image.tell() != passed:
                self.image.seek(passed)
            begin, duration = self._starts[passed], self.image.info.get("duration")
            known = begin is not None and duration is not None
            self._starts.append((begin or 0.0) + float(duration or 0) / 1000 if known else None)
        self.image.seek(number)

    def _open(self) -> PIL.Image.Image:
        """As ``PIL.Image.open`` does, whose limit of pixels is the whole process's and not the caller's."""
        if not (start := self._stream.read(16)):
            raise ImageError(f"{self.name}: the file is empty")
        PIL.Image.preinit()
        hints = []
        tried: set[str] = set()
        for _ in range(2):
            for kind in [kind for kind in PIL.Image.ID if kind not in tried | _NO_PIXELS]:
                tried.add(kind)
                make, accepts = PIL.Image.OPEN[kind]
                try:
                    accepted = not accepts or accepts(start)
                    if isinstance(accepted, str):  # Pillow was built without what this format needs
                        hints.append(accepted)
                    elif accepted:
                        self._stream.seek(0)
                        return make(self._stream, "")
                except _NOT_MINE:
                    continue
            PIL.Image.init()  # the rarer formats
        reason = f" ({hints[0]})" if hints else ""
        raise ImageError(f"{self.name}: not an image that Pillow can read{reason}; convert it to JPEG or PNG")

    def _check_size(self) -> None:
        check_pixels(self.image.size, self._limits, self.name)


def check_pixels(size: tuple[int, int], limits: ImageLimits, name: str) -> None:
    """Raises an ImageTooLargeError if an image has too many pixels.

    Args:
        size: Width and height of the image.
        limits: How many it may have.
        name: What the error calls it.
    """
    limit, (width, height) = limits.max_pixels, size
    if limit is not None and width * height > limit:
        raise ImageTooLargeError(
            f"{name}: {width}x{height} exceeds {limit} pixels; shrink it, or raise max_pixels "
            "(--max-pixels) if you trust it"
        )


def _make_room(image: PIL.Image.Image) -> None:
    """Gives a TIFF its memory; Pillow itself would first look at a limit of its own for the whole process."""
    if isinstance(image, TiffImageFile) and image._im is None:
        image.im = PIL.Image.core.new(image.mode, image._tile_size)


def frame_count(image: PIL.Image.Image) -> int:
    """How many frames, pages or images a file has that Pillow has opened."""
    if image.format in _LAYERED or not getattr(image, "is_animated", False):
        return 1
    return int(getattr(image, "n_frames", 1))


def warn_of_frames(image: PIL.Image.Image, name: str) -> None:
    """Says by name that a file has more frames than the one that is used."""
    try:
        frames = frame_count(image)
    except Exception as error:  # the frame that is used may be sound nevertheless
        logger.debug("%s: cannot count its frames (%s)", name, error)
        return
    if frames > 1:
        logger.warning(
            "%s has %d frames (or pages), of which only the first is used; read all with load_frames "
            "(--frames all)",
            name,
            frames,
        )


def open_stream(source: FileSource, name: str, limits: ImageLimits) -> BinaryIO:
    """The bytes of an image file, to be closed by the caller; a caller's own file stays open.

    Raises:
        ImageError: There is no such file, or it may not be read.
    """
    if isinstance(source, BYTES):
        return io.BytesIO(bytes(source))
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        if is_data_url(text):
            return io.BytesIO(_data_url_content(text, name))
        return _open_address(text, limits)
    return io.BytesIO(_content(source, name, limits))


def decode_base64(text: str, name: str) -> bytes:
    """What base64 text holds; spaces and line breaks do not count.

    Raises:
        ImageError: It is no base64.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"{name} is not valid base64: {error}") from error


def decode_text(text: str, name: str) -> bytes:
    """The bytes of an image file that a text holds: in base64, or as a ``data:`` URL.

    Args:
        text: The text.
        name: What errors call it.

    Raises:
        ImageError: It is neither.
    """
    return _data_url_content(text, name) if is_data_url(text) else decode_base64(text, name)


def _data_url_content(url: str, name: str) -> bytes:
    """What a ``data:`` URL holds (RFC 2397)."""
    header, comma, content = url.partition(",")
    if not comma:
        raise ImageError(f"{name}: the data: URL has no comma before its content; check it")
    if header.lower().rstrip().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(content), name)
    return urllib.parse.unquote_to_bytes(content)


def _content(file: BinaryIO, name: str, limits: ImageLimits) -> bytes:
    """All of a caller's open file, whose position is left where it was."""
    limit = limits.max_file_bytes
    size = -1 if limit is None else limit + 1
    before = file.tell() if file.seekable() else None
    if before is not None:
        file.seek(0)
    try:
        content: object = file.read(size)
    finally:
        if before is not None:
            file.seek(before)
    if not isinstance(content, BYTES):
        raise ImageError(f"{name}: is open in text mode; open it with mode 'rb'")
    if limit is not None and len(content) > limit:
        raise _too_large(name, f"more than {limit}", limits)
    return bytes(content)


def _open_address(name: str, limits: ImageLimits) -> BinaryIO:
    # A Windows path such as C:\photo.jpg looks like a URL with a one-letter scheme.
    try:
        parts = urllib.parse.urlsplit(name if "://" in name or name.startswith("file:") else "")
    except ValueError as error:
        raise ImageError(f"{name}: is not an address ({error}); check it") from error
    scheme = parts.scheme.lower()
    if scheme in WEB_SCHEMES:
        return io.BytesIO(fetch(name, limits))
    path = name
    if scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ImageError(f"{name}: refers to a file on another computer; write file:///path")
        path = urllib.request.url2pathname(parts.path)
    elif scheme:
        raise ImageError(
            f"{name}: URLs of scheme {scheme!r} are not supported; use http, https, file or a path"
        )
    try:
        return _open_file(path, name, limits)
    except ImageError:  # is a ValueError
        raise
    except FileNotFoundError:
        raise ImageError(f"{name[:300]}: no such file; check the path") from None
    except PermissionError:
        raise ImageError(f"{name}: cannot be read (no permission); change its permissions") from None
    except (OSError, ValueError) as error:
        # A path that is no path may be very long.
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"{name[:300]}: cannot be opened ({reason})") from error


def _open_file(path: str, name: str, limits: ImageLimits) -> BinaryIO:
    found = Path(path).stat()
    if stat.S_ISDIR(found.st_mode):
        raise ImageError(f"{name}: is a folder, not an image; name the files in it")
    if stat.S_ISFIFO(found.st_mode) and _CONNECTED.fullmatch(path):
        return _read_pipe(path, name, limits.max_bytes)
    if not stat.S_ISREG(found.st_mode):
        # Opening a named pipe waits for whoever writes to it, and a device may never end.
        raise ImageError(
            f"{name}: is a {_kind(found.st_mode)}, not a file; save the image to a file, or pipe it in and "
            "name /dev/stdin"
        )
    limit = limits.max_file_bytes
    if limit is not None and found.st_size > limit:
        raise _too_large(name, str(found.st_size), limits)
    return Path(path).open("rb")


def _too_large(name: str, size: str, limits: ImageLimits) -> ImageTooLargeError:
    return ImageTooLargeError(
        f"{name}: {size} bytes are more than an image of {limits.max_pixels} pixels needs; "
        "raise max_pixels (--max-pixels) if you trust it"
    )


def _read_pipe(path: str, name: str, limit: int | None) -> io.BytesIO:
    with Path(path).open("rb") as pipe:
        content = pipe.read() if limit is None else pipe.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ImageTooLargeError(
            f"{name}: more than {limit} bytes came in; raise max_bytes (--max-bytes) if you trust it"
        )
    return io.BytesIO(content)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "named pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


def without_alpha(image: PIL.Image.Image) -> PIL.Image.Image:
    """An RGBA image as RGB in its own memory, which it loses; any other image as it is.

    A large one would not fit into memory twice. Pillow keeps four bytes for a pixel of either mode, and does
    not look at the fourth one of RGB.
    """
    if image.mode != "RGBA":
        return image
    image.load()
    image.im.setmode("RGB")
    return image._new(image.im)
