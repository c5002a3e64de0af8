"""The original's resize rule and Pillow's bilinear pixels.

Source: ``datasets/transforms.py`` of facebookresearch/detr, where torchvision resizes PIL images with Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import PIL.Image

from detrkit.common.errors import ImageError

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode
    from transformers.image_utils import SizeDict

BILINEAR = PIL.Image.Resampling.BILINEAR

MAX_RESIZED_PIXELS = 100_000_000
"""Largest image to resize to: without a longest edge, a long thin image would fill the memory."""

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

SizeOption: TypeAlias = "int | tuple[int, int] | list[int] | Mapping[str, int] | SizeDict | None"
"""A processor's ``size``, see :func:`normalize_size`."""

Resample: TypeAlias = "int | str | PIL.Image.Resampling | InterpolationMode | None"
"""A filter, see :func:`pillow_filter`."""

# (top, left, bottom, right) in pixels.
Box: TypeAlias = tuple[int, int, int, int]

_SIZE_KEYS = (
    {"shortest_edge"},
    {"shortest_edge", "longest_edge"},
    {"longest_edge"},
    {"height", "width"},
    {"max_height", "max_width"},
)


def resized_size(
    height: int, width: int, shortest_edge: int, longest_edge: int | None = None
) -> tuple[int, int]:
    """Size of an image after resizing it by its edges, as the original computes it.

    The shorter edge becomes ``shortest_edge`` unless the longer one would then exceed ``longest_edge``; in
    that case the shorter edge is rounded so that the longer one just fits. The longer edge is truncated,
    computed from the shorter one, so it can be a pixel short of ``longest_edge``: 640x283 becomes 1332x589.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        shortest_edge: Wanted length of the shorter edge in pixels.
        longest_edge: Upper limit for the longer edge in pixels; None for no limit.

    Returns:
        (height, width) in pixels, each at least 1. The original gives 0 for the shorter edge of very long
        images; here it is 1 and the longer edge ``longest_edge``.
    """
    short, long = min(height, width), max(height, width)
    # The products and quotients stand in the original's order: other orders round differently.
    if longest_edge is not None and float(long) / float(short) * shortest_edge > longest_edge:
        new_short = round(longest_edge * float(short) / float(long))
    else:
        new_short = shortest_edge
    if new_short < 1:
        new_short, new_long = 1, longest_edge or long
    elif new_short == short:
        new_long = long
    else:
        new_long = int(new_short * long / short)
    return (new_short, new_long) if height <= width else (new_long, new_short)


def size_for(
    height: int, width: int, size: Mapping[str, int], pad_size: Size | None = None
) -> tuple[int, int]:
    """Size of an image after resizing it to a processor's ``size``.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        size: A dictionary from :func:`normalize_size`.
        pad_size: (height, width) that the image is padded to, if that is fixed. Rounding carries the longer
            edge of a thin image past ``longest_edge`` (335x22 becomes 1340x88); where the padding has room
            for ``longest_edge`` but not for that, it becomes ``longest_edge``.

    Returns:
        (height, width) in pixels, each at least 1.

    Raises:
        ImageError: The image would have more than ``MAX_RESIZED_PIXELS``.
    """
    new_height, new_width = _size_for(height, width, size)
    longest = size.get("longest_edge")
    if pad_size is not None and longest is not None:
        new_height, new_width = (
            longest if new > room >= longest else new for new, room in zip((new_height, new_width), pad_size)
        )
    if new_height * new_width > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"an image of {width}x{height} pixels (width x height) would be resized to "
            f"{new_width}x{new_height}, more than {MAX_RESIZED_PIXELS} pixels; give the processor's size a "
            "longest_edge, or crop the image"
        )
    return new_height, new_width


def _size_for(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        factor = min(size["max_height"] / height, size["max_width"] / width)
        return max(1, int(height * factor)), max(1, int(width * factor))
    if "shortest_edge" in size:
        return resized_size(height, width, size["shortest_edge"], size.get("longest_edge"))
    # Rounded as ``MaxResize`` in inference.py of microsoft/table-transformer does.
    factor = size["longest_edge"] / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def normalize_size(
    size: SizeOption, max_size: int | None = None, default: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Brings every form of the ``size`` option to a dictionary.

    Args:
        size: An int (the shorter edge), a pair (height, width), None, or a mapping with the keys
            ``shortest_edge`` and/or ``longest_edge``, ``height`` and ``width``, or ``max_height`` and
            ``max_width``.
        max_size: The old option for ``longest_edge``. 1333 beside an int when None.
        default: What None stands for; 800 and 1333 when None.

    Returns:
        The dictionary, all values ints of at least 1.

    Raises:
        ValueError: Another form, other keys, or a value below 1.
    """
    if size is None:
        sizes = dict(default or {"shortest_edge": 800, "longest_edge": 1333})
    elif isinstance(size, (int, np.integer)):
        sizes = {"shortest_edge": int(size), "longest_edge": 1333}
    elif isinstance(size, (tuple, list)):
        sizes = {"height": size[0], "width": size[1]} if len(size) == 2 else {}
    else:
        try:
            sizes = {key: value for key, value in dict(size).items() if value is not None}
        except (TypeError, ValueError):
            sizes = {}
    if max_size is not None and (size is None or "shortest_edge" in sizes):
        sizes["longest_edge"] = max_size
    if set(sizes) not in _SIZE_KEYS:
        raise ValueError(
            f"size={size!r} is not understood; give the shorter edge as a number, or a dictionary with "
            "shortest_edge and longest_edge, height and width, or max_height and max_width"
        )
    if any(value < 1 for value in sizes.values()):
        raise ValueError(f"size={size!r} holds a length below 1 pixel")
    return {key: int(value) for key, value in sizes.items()}


def pillow_filter(resample: Resample) -> PIL.Image.Resampling:
    """Pillow's filter for an int, a Pillow filter or a torchvision interpolation mode; bilinear for None.

    Raises:
        ValueError: There is no such filter.
    """
    if resample is None:
        return PIL.Image.Resampling.BILINEAR
    name = getattr(resample, "value", resample)
    try:
        if isinstance(
            name, str
        ):  # torchvision's modes are called "bilinear", "nearest", "nearest-exact", ...
            return PIL.Image.Resampling[name.upper().split("-")[0]]
        return PIL.Image.Resampling(name)
    except (KeyError, ValueError):
        raise ValueError(f"resample={resample!r} is not a Pillow filter") from None


def resize_image(
    image: PIL.Image.Image, height: int, width: int, resample: Resample = None
) -> PIL.Image.Image:
    """Resizes an 8-bit image with Pillow, which is what the original does through torchvision.

    Args:
        image: An image of mode RGB or L.
        height: New height in pixels.
        width: New width in pixels.
        resample: Filter, see :func:`pillow_filter`.
    """
    if image.size == (width, height):
        return image
    return image.resize((width, height), pillow_filter(resample))


def independent_parts(
    image: PIL.Image.Image, height: int, width: int, count: int, resample: Resample = None
) -> list[Box]:
    """Parts of a resized image, bands of rows or else of columns, that can be made each on its own.

    A band's place in the old image must be a number that Pillow's float32 holds exactly, which it is where
    the new image divides into a power of two. And Pillow must resize along the rows first, then along the
    columns: it may do it the other way round, and round to other bytes, when the height shrinks.

    Args:
        image: The image before resizing.
        height: New height in pixels.
        width: New width in pixels.
        count: Number of parts that are wanted; there may be fewer.
        resample: Filter, see :func:`pillow_filter`.

    Returns:
        The parts, for :func:`resize_part`; together they are the new image.
    """
    if height < image.height or image.size == (width, height) or pillow_filter(resample) != BILINEAR:
        count = 1
    bands = 1
    while 2 * bands <= count and (height % (2 * bands) == 0 or width % (2 * bands) == 0):
        bands *= 2
    if height % bands == 0:
        return [(height * i // bands, 0, height * (i + 1) // bands, width) for i in range(bands)]
    return [(0, width * i // bands, height, width * (i + 1) // bands) for i in range(bands)]


def resize_part(
    image: PIL.Image.Image, height: int, width: int, part: Box, resample: Resample = None
) -> PIL.Image.Image:
    """One of :func:`independent_parts`, bit for bit as :func:`resize_image` gives it in the whole."""
    top, left, bottom, right = part
    if part == (0, 0, height, width):
        return resize_image(image, height, width, resample)
    kernel = pillow_filter(resample)
    if (top, bottom) == (0, height):
        box = (image.width * left / width, 0, image.width * right / width, image.height)
        band = image.resize((right - left, image.height), kernel, box=box)
        return band.resize((right - left, height), kernel)
    # The bilinear filter reaches one old row, or one new row's worth of them, beyond the band.
    reach = math.ceil(max(1, image.height / height)) + 1
    first, last = image.height * top / height, image.height * bottom / height
    low, high = max(0, int(first) - reach), min(image.height, int(last) + 1 + reach)
    band = image.crop((0, low, image.width, high)).resize((width, high - low), kernel)
    return band.resize((width, bottom - top), kernel, box=(0, first - low, width, last - low))


def resize_real(image: np.ndarray, height: int, width: int, resample: Resample = None) -> np.ndarray:
    """Resizes an image of real numbers.

    The same filters as for bytes, in Pillow's mode F. There is no rounding to bytes after each of the two
    passes, so a result differs from that of the bytes by about a level.

    Args:
        image: float32 (channels, height, width).
        height: New height in pixels.
        width: New width in pixels.
        resample: Filter, see :func:`pillow_filter`.

    Returns:
        float32 (channels, height, width) of the new size.
    """
    if image.shape[-2:] == (height, width):
        return image
    kernel = pillow_filter(resample)
    planes = [PIL.Image.fromarray(np.ascontiguousarray(p)).resize((width, height), kernel) for p in image]
    return np.stack([np.asarray(plane) for plane in planes])
