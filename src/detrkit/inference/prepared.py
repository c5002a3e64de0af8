"""Images on their way into a detector: read, resized and normalised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from detrkit.common.limits import ImageLimits

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from transformers import BatchFeature

ImageSource: TypeAlias = "str | os.PathLike[str] | Image | np.ndarray | torch.Tensor"
"""One image: a path, an http(s) address, a PIL image, an (H, W, 3) array or a tensor."""


@dataclass(frozen=True, kw_only=True)
class ImageFrame:
    """The sizes that relate a model's output to the image it was given, and where the image came from.

    Attributes:
        image_size: Height and width of the image in pixels.
        processed_size: Height and width in pixels as the model saw it, without padding.
        padded_size: The same with padding, which is below and to the right.
        source: File name or address of the image, if it came from one.
        exif_orientation: Whether the image was turned as its EXIF entry says.
    """

    image_size: tuple[int, int]
    processed_size: tuple[int, int]
    padded_size: tuple[int, int]
    source: str | None
    exif_orientation: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """One image ready for the model.

    Attributes:
        pixel_values: (1, 3, height, width).
        pixel_mask: (1, height, width), nonzero where pixels are real; None where all are.
        frame: Sizes and source of the image.
    """

    pixel_values: torch.Tensor
    pixel_mask: torch.Tensor | None
    frame: ImageFrame


def prepare_image(
    source: ImageSource,
    processor: Callable[..., BatchFeature],
    *,
    exif_orientation: bool = False,
    limits: ImageLimits | None = None,
) -> PreparedImage:
    """Reads one image and makes the model's input from it.

    Args:
        source: The image.
        processor: The model's image processor.
        exif_orientation: Turn the image as its EXIF entry says.
        limits: See :func:`detrkit.processing.images.load_image`.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    image = read_image(source, exif_orientation=exif_orientation, limits=limits)
    inputs = processor(images=[image], return_tensors="pt")
    pixel_values, mask = inputs["pixel_values"], inputs.get("pixel_mask")
    padded_size = pixel_values.shape[-2], pixel_values.shape[-1]
    processed_size = padded_size
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is not None:
        processed_size = int(mask[0, :, 0].sum()), int(mask[0, 0].sum())
    return PreparedImage(
        pixel_values=pixel_values,
        pixel_mask=mask,
        frame=ImageFrame(
            image_size=(image.height, image.width),
            processed_size=processed_size,
            padded_size=padded_size,
            source=os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
            exif_orientation=exif_orientation,
        ),
    )


def read_image(
    source: ImageSource, *, exif_orientation: bool = False, limits: ImageLimits | None = None
) -> Image:
    """Reads one image and drops its EXIF block: whether to turn the image is settled here, once.

    Args:
        source: The image.
        exif_orientation: Turn the image as its EXIF entry says.
        limits: See :func:`detrkit.processing.images.load_image`.

    Returns:
        The RGB image.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    from detrkit.processing.images import load_image

    image = load_image(source, exif_orientation=exif_orientation, limits=limits)
    if image.info or image.format is not None:
        image = image.copy()
        image.info = {}
    return image


def is_one_image(images: Any) -> bool:
    """Whether the argument of a call is one image rather than many."""
    if isinstance(images, (str, bytes, bytearray, os.PathLike)):
        return True
    dimensions = getattr(images, "ndim", None)  # arrays and tensors
    if dimensions is not None:
        return dimensions <= 3
    return not isinstance(images, Iterable)  # a PIL image is not iterable; load_image reports anything else
