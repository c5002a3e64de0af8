"""Reading images: whatever a caller has, as RGB bytes.

Here an image with eight bits a channel is a ``PIL.Image.Image`` in mode RGB, as in the original
(``Image.open(...).convert("RGB")``); an image of real numbers is a float32 array (3, height, width).
"""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import threading
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits
from detrkit.processing.fetching import WEB_SCHEMES, fetch

if TYPE_CHECKING:
    from transformers.image_utils import ChannelDimension

logger = logging.getLogger("detrkit")

ImageSource: TypeAlias = str | os.PathLike[str] | PIL.Image.Image | np.ndarray | torch.Tensor
"""One image: a path, a URL, a PIL image, an array or a tensor."""

ImageSources: TypeAlias = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]
"""One image, a list (of lists) of them, or a 4-dimensional array; lists of numbers are taken as arrays."""

DataFormat: TypeAlias = "str | ChannelDimension | None"
"""``"channels_first"``, ``"channels_last"`` or None."""

# An image ready to be resized, see above.
Raster: TypeAlias = PIL.Image.Image | np.ndarray

CHANNELS_FIRST = "channels_first"
CHANNELS_LAST = "channels_last"

_EXIF_ORIENTATION_TAG = 0x0112

# What a shell makes of ``<(command)``, and standard input by its own name: the user has connected these.
_CONNECTED = re.compile(r"/dev/(?:stdin|fd/\d+)|/proc/self/fd/\d+")

# Pillow keeps its own limit for the whole process, so only one thread at a time may lift it.
_PILLOW_LIMIT = threading.Lock()


def load_image(
    source: ImageSource, *, exif_orientation: bool = False, limits: ImageLimits | None = None
) -> PIL.Image.Image:
    """Reads an image from anywhere and gives it in mode RGB.

    Args:
        source: A path, a ``file:``, ``http:`` or ``https:`` URL, a PIL image, or an array or tensor of one
            image with the channels first or last. Arrays of real numbers count as fractions of full
            brightness if all values are in 0..1, else as 0..255.
        exif_orientation: Turn the image upright as its EXIF orientation says. Off by default, as in the
            original: COCO's boxes refer to the pixels as they are stored.
        limits: How large a file may be, and which addresses are asked; the usual limits when None. PIL
            images, arrays and tensors are in memory already, and not limited.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    if isinstance(source, PIL.Image.Image):
        return to_rgb(orient(source, exif_orientation))
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _array_to_rgb(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            f"cannot read an image from {type(source).__name__}; "
            "pass a path, a URL, a PIL image, a NumPy array or a torch tensor"
        )
    limits = limits or ImageLimits()
    name = os.fspath(source)
    if isinstance(name, bytes):
        name = os.fsdecode(name)
    with _open_stream(name, limits) as stream:
        return _decode(stream, name, exif_orientation, limits)


def decode_image(content: bytes, name: str, *, exif_orientation: bool = False) -> PIL.Image.Image:
    """An image from the bytes of its file, as :func:`load_image` reads it.

    Args:
        content: What the file holds.
        name: What errors call it.
        exif_orientation: Turn the image upright as its EXIF orientation says.

    Raises:
        ImageError: It cannot be read.
    """
    return _decode(io.BytesIO(content), name, exif_orientation, ImageLimits())


def to_rgb(image: PIL.Image.Image, name: str | None = None) -> PIL.Image.Image:
    """Converts a PIL image of any mode to RGB; an RGB image is returned as it is.

    Eight-bit modes go through ``convert("RGB")``, as in the original: palettes are looked up, transparency is
    dropped, CMYK is converted. Pillow would clip brighter modes at 255, so those are scaled instead: 16-bit
    gray by 1/257; mode I, which holds 16-bit gray in files that Pillow reads so, by 1/257 where a value
    exceeds 255; mode F by 255 if all values are in 0..1.

    Args:
        image: An image of any mode.
        name: What errors call it.

    Raises:
        ImageError: The pixels cannot be decoded, are not finite, or are outside of 16 bits.
    """
    name = name or getattr(image, "filename", "") or "the image"
    try:
        if image.mode == "RGB":
            image.load()
            return image
        if image.mode.startswith("I;16"):
            return _gray(_divide_rounding(np.asarray(image), 257))
        if image.mode == "I":
            return _gray(_integers_to_bytes(np.asarray(image), name))
        if image.mode == "F":
            return _gray(_reals_to_bytes(np.asarray(image), name))
        if isinstance(image.info.get("transparency"), bytes):
            image = image.convert("RGBA")  # the same pixels as without this step, but no warning of Pillow's
        return image.convert("RGB")
    except (OSError, SyntaxError, EOFError) as error:
        raise ImageError(
            f"{name}: cannot be decoded ({error}); the file is damaged, fetch it again"
        ) from error


def orient(image: PIL.Image.Image, exif_orientation: bool, name: str | None = None) -> PIL.Image.Image:
    """Applies the EXIF orientation where that is asked for, and warns where it is not but would matter.

    Args:
        image: An image of any mode.
        exif_orientation: Whether to turn the image upright.
        name: What a warning calls the image.
    """
    orientation = stored_orientation(image)
    if orientation == 1:
        return image
    if exif_orientation:
        return PIL.ImageOps.exif_transpose(image)
    logger.warning(
        "%s: EXIF orientation %d is not applied, boxes refer to the pixels as stored; "
        "pass exif_orientation=True to turn the image upright",
        name or getattr(image, "filename", "") or "image",
        orientation,
    )
    return image


def flatten_images(images: ImageSources) -> list[ImageSource]:
    """Gives a flat list of single images from one image, a list (of lists) of them or a 4-D array.

    Lists of numbers are taken as arrays.

    Raises:
        ImageError: There is no image in ``images``.
    """
    flat = list(_iterate_images(images))
    if not flat:
        raise ImageError("no image given; pass an image or a list of images")
    return flat


def to_raster(
    source: ImageSource, *, input_data_format: DataFormat = None, exif_orientation: bool = False
) -> Raster:
    """Prepares one image for the processor: a PIL image in mode RGB for bytes, an array for real numbers.

    Args:
        source: Anything that :func:`load_image` takes.
        input_data_format: ``"channels_first"`` or ``"channels_last"`` of an array; found from the shape when
            None.
        exif_orientation: See :func:`load_image`.

    Returns:
        An RGB image, or a float32 array (3, height, width) with the values as they are.

    Raises:
        ImageError: The image cannot be read or used.
    """
    if not isinstance(source, (np.ndarray, torch.Tensor)):
        return load_image(source, exif_orientation=exif_orientation)
    array = _to_numpy(source)
    planes = _channels_first(array, input_data_format)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(planes).all():
            raise ImageError("the image array holds NaN or infinite values; replace them before processing")
        real = planes.astype(np.float32, copy=False)
        return np.broadcast_to(real, (3, *real.shape[1:])) if len(real) == 1 else real[:3]
    return _planes_to_rgb(_integers_to_bytes(planes, "the image array"))


def _iterate_images(images: ImageSources) -> Iterator[ImageSource]:
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (list, tuple)):
        if _is_nested_numbers(images):
            yield from _iterate_images(np.asarray(images))
        else:
            for image in images:
                yield from _iterate_images(image)
    else:
        yield images


def _is_nested_numbers(value: object) -> bool:
    """Whether nested lists end in numbers, judged by their first element."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float))


def _open_stream(name: str, limits: ImageLimits) -> BinaryIO:
    if name.startswith("data:"):
        raise ImageError(f"{name[:30]}...: data: URLs are not supported; decode it and pass the image")
    # A Windows path such as C:\photo.jpg looks like a URL with a one-letter scheme.
    scheme = urllib.parse.urlsplit(name).scheme.lower() if "://" in name or name.startswith("file:") else ""
    if scheme in WEB_SCHEMES:
        return io.BytesIO(fetch(name, limits))
    path = name
    if scheme == "file":
        parts = urllib.parse.urlsplit(name)
        if parts.netloc not in ("", "localhost"):
            raise ImageError(f"{name}: names a file of another computer; write file:///path")
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
        raise ImageError(f"{name}: no such file; check the path") from None
    except PermissionError:
        raise ImageError(f"{name}: may not be read; change its permissions") from None
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
        raise ImageError(
            f"{name}: {found.st_size} bytes are more than an image of {limits.max_pixels} pixels needs; "
            "raise max_pixels (--max-pixels) if you trust it"
        )
    return Path(path).open("rb")


def _read_pipe(path: str, name: str, limit: int | None) -> io.BytesIO:
    with Path(path).open("rb") as pipe:
        content = pipe.read() if limit is None else pipe.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ImageError(
            f"{name}: more than {limit} bytes came in; raise max_bytes (--max-bytes) if you trust it"
        )
    return io.BytesIO(content)


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "named pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"


@contextmanager
def _pillow_allows(max_pixels: int | None) -> Iterator[None]:
    """Lets Pillow open what ``max_pixels`` allows where its own limit is lower."""
    own = PIL.Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        # Sizes between Pillow's warning and its refusal are governed by max_pixels.
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        if own is None or (max_pixels is not None and max_pixels <= 2 * own):
            yield
            return
        with _PILLOW_LIMIT:
            own = PIL.Image.MAX_IMAGE_PIXELS
            PIL.Image.MAX_IMAGE_PIXELS = max_pixels
            try:
                yield
            finally:
                PIL.Image.MAX_IMAGE_PIXELS = own


def _decode(stream: BinaryIO, name: str, exif_orientation: bool, limits: ImageLimits) -> PIL.Image.Image:
    if not stream.read(1):
        raise ImageError(f"{name}: the file is empty")
    stream.seek(0)
    with _pillow_allows(limits.max_pixels):
        return _decode_pixels(stream, name, exif_orientation, limits.max_pixels)


def _decode_pixels(
    stream: BinaryIO, name: str, exif_orientation: bool, max_pixels: int | None
) -> PIL.Image.Image:
    try:
        image: PIL.Image.Image = PIL.Image.open(stream)
    except PIL.UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image that Pillow can read; convert it to JPEG or PNG") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: too many pixels to open safely ({error}); raise max_pixels (--max-pixels) if you "
            "trust it"
        ) from error
    except Exception as error:  # a format's reader can raise anything on a damaged file
        raise ImageError(
            f"{name}: cannot be decoded ({error}); the file is damaged, fetch it again"
        ) from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        raise ImageError(
            f"{name}: {image.width}x{image.height} exceeds {max_pixels} pixels; shrink it, or raise "
            "max_pixels (--max-pixels) if you trust it"
        )
    try:
        image.load()
    except Exception as error:  # a decoder's reader can raise anything on a damaged file
        raise ImageError(
            f"{name}: cannot be decoded ({error}); the file is damaged, fetch it again"
        ) from error
    image = to_rgb(orient(image, exif_orientation, name), name)
    # The orientation is dealt with; left in place it would be applied, or warned of, a second time.
    image.info.pop("exif", None)
    return image


def stored_orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation not applied yet, from 1 to 8; 1 (upright) if it is missing or unreadable."""
    # Building the Exif object costs more than this look, and most images carry no such block. (A TIFF's
    # orientation is not here: Pillow itself applies it while loading.)
    if "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION_TAG, 1)
    except (
        Exception
    ):  # a broken block raises anything from struct.error to KeyError, and must not lose the image
        return 1
    return orientation if orientation in range(2, 9) else 1


def _to_numpy(source: np.ndarray | torch.Tensor) -> np.ndarray:
    """The array itself, checked for a usable dtype; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        array: np.ndarray = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    else:
        array = source
    if array.dtype.kind not in "buif":
        raise ImageError(f"an image array cannot be of dtype {array.dtype}; pass uint8, or floats")
    return array


def _channels_first(array: np.ndarray, input_data_format: str | None) -> np.ndarray:
    """A view of shape (channels, height, width) with 1, 3 or 4 channels of an array in any layout."""
    if array.ndim == 2:
        array, input_data_format = array[None], CHANNELS_FIRST
    if array.ndim != 3:
        raise ImageError(
            f"an image array has 2 or 3 dimensions, not {array.ndim} (shape {array.shape}); "
            "pass (height, width), (height, width, channels) or (channels, height, width)"
        )
    if 0 in array.shape:
        raise ImageError(f"the image array is empty (shape {array.shape})")
    layout = getattr(input_data_format, "value", input_data_format) or _find_layout(array.shape)
    if layout == CHANNELS_LAST:
        array = np.moveaxis(array, -1, 0)
    elif layout != CHANNELS_FIRST:
        raise ImageError(f"input_data_format must be {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, not {layout!r}")
    if len(array) not in (1, 3, 4):
        raise ImageError(f"an image has 1, 3 or 4 channels, not {len(array)}; pass gray, RGB or RGBA")
    return array


def _find_layout(shape: tuple[int, ...]) -> str:
    """Where the channels are; an axis of 3 wins over one of 1 or 4, and the first over the last."""
    first, last = shape[0], shape[-1]
    if first == 3 or (first in (1, 4) and last != 3):
        if first == 3 and last == 3:
            logger.warning(
                "an image of shape %s could have its channels first or last; taking them as first, "
                "pass input_data_format to say which",
                shape,
            )
        return CHANNELS_FIRST
    if last in (1, 3, 4):
        return CHANNELS_LAST
    raise ImageError(f"no axis of shape {shape} can be the channels (1, 3 or 4); pass gray, RGB or RGBA")


def _array_to_rgb(source: np.ndarray | torch.Tensor) -> PIL.Image.Image:
    array = _to_numpy(source)
    planes = _channels_first(array, None)
    convert = _reals_to_bytes if array.dtype.kind == "f" else _integers_to_bytes
    return _planes_to_rgb(convert(planes, "the image array"))


def _planes_to_rgb(planes: np.ndarray) -> PIL.Image.Image:
    """RGB image of a uint8 array (channels, height, width); a fourth channel is dropped."""
    if len(planes) == 1:
        return _gray(planes[0])
    pixels = np.moveaxis(planes[:3], 0, -1)
    if pixels.flags.c_contiguous:
        return PIL.Image.fromarray(pixels)
    # Merging planes is several times faster than interleaving them in NumPy.
    return PIL.Image.merge("RGB", [PIL.Image.fromarray(np.ascontiguousarray(plane)) for plane in planes[:3]])


def _gray(pixels: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")


def _integers_to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * 255
    if values.dtype == np.uint16:
        return _divide_rounding(values, 257)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}; integers must be in 0..255 or 0..65535")
    return values.astype(np.uint8) if high <= 255 else _divide_rounding(values, 257)


def _reals_to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ImageError(f"{name} holds NaN or infinite values; replace them before use")
    fractions = values.min() >= 0 and values.max() <= 1
    return (np.clip(values * 255.0 if fractions else values, 0, 255) + 0.5).astype(np.uint8)


def _divide_rounding(values: np.ndarray, divisor: int) -> np.ndarray:
    return ((values.astype(np.uint32) + divisor // 2) // divisor).astype(np.uint8)
