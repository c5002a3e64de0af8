"""Reading images: whatever a caller has, as RGB bytes.

Here an image with eight bits a channel is a ``PIL.Image.Image`` in mode RGB, as in the original
(``Image.open(...).convert("RGB")``); an image of real numbers is a float32 array (3, height, width).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, TypeGuard, cast

import numpy as np
import PIL.Image

from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits
from detrkit.common.log import logger
from detrkit.common.text import first_line
from detrkit.common.without_torch import is_tensor
from detrkit.processing.frames import VideoFrame
from detrkit.processing.sources import (
    BYTES,
    FileSource,
    ImageFile,
    frame_count,
    image_errors,
    source_name,
    warn_of_frames,
    without_alpha,
)
from detrkit.processing.turning import TURNS, turn

if TYPE_CHECKING:
    import torch
    from transformers.image_utils import ChannelDimension


ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | PIL.Image.Image | "
    "VideoFrame | np.ndarray | torch.Tensor"
)
"""One image: a path, a URL, the bytes of a file, an open file, a PIL image, a frame of a video, an array or a
tensor."""

ImageSources: TypeAlias = "ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]"
"""One image, a list (of lists) of them, or a 4-dimensional array; lists of numbers are taken as arrays."""

DataFormat: TypeAlias = "str | ChannelDimension | None"
"""``"channels_first"``, ``"channels_last"`` or None."""

# An image ready to be resized, see above.
Raster: TypeAlias = PIL.Image.Image | np.ndarray

CHANNELS_FIRST = "channels_first"
CHANNELS_LAST = "channels_last"

_EXIF_ORIENTATION_TAG = 0x0112

# Shares of red, green and blue in a gray image, as Pillow has them.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

# Where an image keeps its EXIF block, by Pillow's names.
_EXIF_BLOCKS = ("exif", "Raw profile type exif")

# 16-bit images without a value as great as this are nearly black: cameras of 12 bits write them.
_DARK = 4096

# Modes with premultiplied transparency, which Pillow converts by this detour only.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def load_image(
    source: ImageSource,
    *,
    exif_orientation: bool = False,
    frame: int | None = None,
    limits: ImageLimits | None = None,
) -> PIL.Image.Image:
    """Reads an image from any source as RGB.

    Args:
        source: A path, a ``file:``, ``http:``, ``https:`` or ``data:`` URL, the bytes of an image file, a
            file that is open for reading bytes (all of it is read, and its position left alone), a PIL image,
            or an array or tensor of one image with the channels first or last (what gives a NumPy array, as
            those of JAX and TensorFlow do, is one). Real numbers count as fractions of full brightness if all
            are in 0..1, else as 0..255; integers as 16 bits where one exceeds 255.
        exif_orientation: Turn the image upright as its EXIF orientation says. Off by default, as in the
            original: COCO's boxes refer to the pixels as they are stored.
        frame: Which frame of an animation, or page of a TIFF, from 0; a PIL image is read where it stands.
            By default the first one, with a warning where there are more (see :func:`load_frames`).
        limits: Maximum size of a file, and the addresses that may be opened; None for the defaults. PIL
            images, arrays and tensors are in memory already, and not limited.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    source = _plain(source)
    name = source_name(source)
    if isinstance(source, PIL.Image.Image):
        with image_errors(name):
            if getattr(source, "tile", None) and getattr(source, "fp", None) is None:
                raise ValueError("the file is closed")
            if frame is None and source.tell() == 0 and not _may_be_edited(source):
                warn_of_frames(source, name)
            return to_rgb(orient(source, exif_orientation, name), name)
    if _is_array(source):
        return _array_to_rgb(source)
    with ImageFile(_checked(source), limits) as file:
        if frame is None:
            warn_of_frames(file.image, name)
        return _finished(file.frame(frame or 0), name, exif_orientation)


def load_frames(
    source: ImageSource, *, exif_orientation: bool = False, limits: ImageLimits | None = None
) -> Iterator[PIL.Image.Image]:
    """Reads all frames of an animation, or pages of a TIFF, one after another, each in mode RGB.

    Args:
        source: As for :func:`load_image`; what has no frames is one.
        exif_orientation: As for :func:`load_image`.
        limits: As for :func:`load_image`.

    Raises:
        ImageError: The image, or one of its frames, cannot be found, read or used.
    """
    name = source_name(source)
    if _is_array(source):
        yield load_image(source)
    elif isinstance(source, PIL.Image.Image):
        position = source.tell()
        with image_errors(name):
            frames = frame_count(source)
        try:
            for number in range(frames):
                with image_errors(f"{name}: frame {number + 1}"):
                    source.seek(number)
                    frame = _finished(source.copy(), name, exif_orientation)
                yield frame
        finally:
            if frames > 1:
                source.seek(position)  # the caller's image stays as it was
    else:
        with ImageFile(_checked(source), limits) as file:
            for number in range(len(file)):
                yield read_frame(file, number, exif_orientation)


def read_frame(file: ImageFile, number: int, exif_orientation: bool) -> PIL.Image.Image:
    """A frame of an open file, as :func:`load_image` gives it."""
    frame = file.frame(number)
    with image_errors(file.name):  # a copy: the next frame takes the place of this one
        return _finished(frame.copy(), file.name, exif_orientation)


def _finished(image: PIL.Image.Image, name: str, exif_orientation: bool) -> PIL.Image.Image:
    """A decoded frame in mode RGB, turned if that is asked for."""
    with image_errors(name):
        rgb = to_rgb(orient(without_alpha(image), exif_orientation, name, own=True), name)
        # The orientation is dealt with; left in place it would be applied, or warned of, a second time.
        for block in _EXIF_BLOCKS:
            rgb.info.pop(block, None)
        return rgb


def _may_be_edited(image: PIL.Image.Image) -> bool:
    """Whether counting the frames, which moves within these files, could lose what was drawn on this one."""
    return image.format in ("GIF", "TIFF") and not getattr(image, "tile", None)


def _plain(source: ImageSource) -> ImageSource:
    """A frame's image, and the array of what another library holds as one; anything else as it is."""
    if isinstance(source, VideoFrame):
        return source.image
    is_known = isinstance(source, (str, os.PathLike, *BYTES, PIL.Image.Image)) or _is_array(source)
    if is_known or not (hasattr(source, "__array__") or hasattr(source, "__array_interface__")):
        return source
    with image_errors("the image array"):
        return np.asarray(source)


def _checked(source: ImageSource) -> FileSource:
    """What an image file is read from; an ImageError for anything else."""
    if isinstance(source, (str, os.PathLike, *BYTES)) or callable(getattr(source, "read", None)):
        return cast("FileSource", source)
    if isinstance(source, Mapping):
        keys = ", ".join(map(repr, list(source)[:5]))
        raise ImageError(f"a dictionary with {keys} is no image; pass the entry that is one")
    raise ImageError(
        f"cannot read an image from {type(source).__name__}; pass a path, a URL, the bytes of a file, an "
        "open file, a PIL image, a NumPy array or a torch tensor"
    )


def to_rgb(image: PIL.Image.Image, name: str | None = None) -> PIL.Image.Image:
    """Converts a PIL image of any mode to RGB; an RGB image is returned as it is.

    Eight-bit modes go through ``convert("RGB")``, as in the original: palettes are looked up, transparency is
    dropped, CMYK is converted. Pillow would clip brighter modes at 255, so those are scaled instead: 16-bit
    gray, also in mode I, by 1/257 where a value exceeds 255; mode F by 255 if all values are in 0..1.

    Args:
        image: An image of any mode.
        name: What errors call it.

    Raises:
        ImageError: The pixels cannot be decoded, are not finite, or are outside of 16 bits.
    """
    name = name or source_name(image)
    if image.mode == "RGB":
        with image_errors(name):
            image.load()
        return image
    with image_errors(name):
        image.load()
        if image.mode.startswith("I"):
            return _gray(_integers_to_bytes(np.asarray(image), name))
        if image.mode == "F":
            return _gray(_reals_to_bytes(np.asarray(image), name))
        mode = image.mode
        try:
            if mode in _PREMULTIPLIED:
                image = image.convert(_PREMULTIPLIED[mode])
            if isinstance(image.info.get("transparency"), bytes):
                image = image.convert("RGBA")  # the same pixels, but no warning of Pillow's
            return image.convert("RGB")
        except (ValueError, KeyError) as error:
            raise ImageError(
                f"{name}: mode {mode} cannot be converted to RGB ({first_line(error)}); convert it yourself"
            ) from error


def orient(
    image: PIL.Image.Image, exif_orientation: bool, name: str | None = None, *, own: bool = False
) -> PIL.Image.Image:
    """Applies the EXIF orientation where that is asked for, and warns where it is not but would matter.

    Args:
        image: An image of any mode.
        exif_orientation: Whether to turn the image upright.
        name: What a warning calls the image.
        own: Whether nobody else needs the image, see :func:`detrkit.processing.turning.turn`.
    """
    orientation = stored_orientation(image)
    if orientation == 1:
        return image
    if exif_orientation:
        # Not Pillow's exif_transpose, which writes the block anew, and cannot where it is damaged.
        with image_errors(name or source_name(image)):
            turned = turn(image, orientation, own=own)
        for block in _EXIF_BLOCKS:
            turned.info.pop(block, None)
        return turned
    logger.warning(
        "%s: EXIF orientation %d is not applied, boxes refer to the pixels as stored; "
        "pass exif_orientation=True to turn the image upright",
        name or source_name(image),
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
    source: ImageSource,
    *,
    input_data_format: DataFormat = None,
    exif_orientation: bool = False,
    channels: int = 3,
) -> Raster:
    """Prepares one image for the processor: a PIL image with a band a channel, an array for real numbers.

    Args:
        source: Anything that :func:`load_image` takes.
        input_data_format: ``"channels_first"`` or ``"channels_last"`` of an array; found from the shape when
            None.
        exif_orientation: See :func:`load_image`.
        channels: How many to give: 1 for gray, 3 for RGB; any other number must be that of the image.

    Returns:
        An image in mode RGB, L, or CMYK for any four channels, or a float32 array (channels, height, width)
        with the values as they are.

    Raises:
        ImageError: The image cannot be read or used, or has another number of channels.
    """
    if isinstance(source, PIL.Image.Image) and channels == 4 and source.mode == "RGBA":
        source = np.asarray(orient(source, exif_orientation))
    source = _plain(source)
    if not _is_array(source):
        if channels not in (1, 3):
            raise ImageError(
                f"the model takes images of {channels} channels; pass an array with as many"
                f"{', or a PIL image of mode RGBA' if channels == 4 else ''}"
            )
        image = load_image(source, exif_orientation=exif_orientation)
        return image if channels == 3 else image.convert("L")
    with image_errors("the image array"):
        return _array_to_raster(_to_numpy(source), input_data_format, channels)


def _array_to_raster(array: np.ndarray, input_data_format: DataFormat, channels: int) -> Raster:
    if channels not in (1, 3):
        return _many_channels(array, input_data_format, channels)
    raster = _rgb_raster(array, input_data_format)
    if channels == 3:
        return raster
    if isinstance(raster, PIL.Image.Image):
        return raster.convert("L")
    return np.tensordot(_LUMA, raster, axes=1)[None]


def _many_channels(array: np.ndarray, input_data_format: DataFormat, channels: int) -> Raster:
    """An image whose channels are more than colours: as they are, each on its own."""
    layout = getattr(input_data_format, "value", input_data_format)
    last = layout == CHANNELS_LAST or (layout is None and array.ndim == 3 and array.shape[0] != channels)
    planes = np.moveaxis(array, -1, 0) if last and array.ndim == 3 else array
    if planes.ndim != 3 or len(planes) != channels:
        raise ImageError(
            f"the model takes images of {channels} channels, and this array has the shape {array.shape}"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(planes).all():
            raise ImageError("the image array holds NaN or infinite values; replace them before processing")
        return planes.astype(np.float32, copy=False)
    planes = _integers_to_bytes(planes, "the image array")
    if channels != 4:
        return planes.astype(np.float32)
    # Pillow resizes the bands of this mode on their own, and those of RGBA by their transparency.
    return PIL.Image.merge("CMYK", [PIL.Image.fromarray(np.ascontiguousarray(plane)) for plane in planes])


def _rgb_raster(array: np.ndarray, input_data_format: DataFormat) -> Raster:
    planes = _channels_first(array, input_data_format)
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(planes).all():
            raise ImageError("the image array holds NaN or infinite values; replace them before processing")
        real = planes.astype(np.float32, copy=False)
        return np.broadcast_to(real, (3, *real.shape[1:])) if len(real) == 1 else real[:3]
    return _planes_to_rgb(_integers_to_bytes(planes, "the image array"))


def _iterate_images(images: ImageSources) -> Iterator[ImageSource]:
    if not isinstance(images, (list, tuple)):
        images = _plain(images)
    if _is_array(images) and images.ndim == 4:
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


def stored_orientation(image: PIL.Image.Image) -> int:
    """EXIF orientation not applied yet, from 1 to 8; 1 (upright) if it is missing or unreadable."""
    # Building the Exif object costs more than this look, and most images carry no such block. (A TIFF's
    # orientation is not here: Pillow itself applies it while loading.)
    if not any(block in image.info for block in _EXIF_BLOCKS):
        return 1
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION_TAG, 1)
    except Exception as error:  # a broken block raises anything, and must not lose the image
        logger.debug("the EXIF block cannot be read: %s", error)
        return 1
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1


def _is_array(value: object) -> TypeGuard[np.ndarray | torch.Tensor]:
    return isinstance(value, np.ndarray) or is_tensor(value)


def _to_numpy(source: np.ndarray | torch.Tensor) -> np.ndarray:
    """The array itself, checked for a usable dtype; bfloat16, which NumPy lacks, becomes float32."""
    if is_tensor(source):
        source = source.detach().cpu()
        is_bfloat16 = str(source.dtype) == "torch.bfloat16"
        array: np.ndarray = (source.float() if is_bfloat16 else source).numpy()
    else:
        array = source  # type: ignore[assignment,unused-ignore] # torch's types are not checked
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
    with image_errors("the image array"):
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
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name} holds values from {low} to {high}; integers must be in 0..255 or 0..65535")
    if high <= 255:
        return values.astype(np.uint8)
    if high < _DARK:
        advice = "it is nearly black; if its camera has fewer bits, scale the values"
        logger.warning("%s: its 16-bit values end at %d of 65535, so %s", name, high, advice)
    return _divide_rounding(values, 257)


def _reals_to_bytes(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ImageError(f"{name} holds NaN or infinite values; replace them before use")
    fractions = values.min() >= 0 and values.max() <= 1
    return (np.clip(values * 255.0 if fractions else values, 0, 255) + 0.5).astype(np.uint8)


def _divide_rounding(values: np.ndarray, divisor: int) -> np.ndarray:
    return ((values.astype(np.uint32) + divisor // 2) // divisor).astype(np.uint8)
