"""Images on their way into a detector: read, resized and normalised."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, cast

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.text import without_password
from detrkit.engines.placement import is_cuda
from detrkit.processing.array_processor import ArrayImageProcessor
from detrkit.processing.frames import VideoFrame

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from detrkit.engines.placement import Device
    from detrkit.processing.image_processor import DetrImageProcessorBase
    from detrkit.processing.images import ImageSource
    from detrkit.processing.pixels import PixelScaling


_TENSORS = {"return_tensors": "pt"}


@dataclass(frozen=True, kw_only=True)
class ImageFrame:
    """The sizes that relate a model's output to the image it was given, and where the image came from.

    Attributes:
        image_size: Height and width of the image in pixels.
        processed_size: Height and width in pixels as the model saw it, without padding.
        padded_size: The same with padding, which is below and to the right.
        source: File name or address of the image, if it came from one.
        exif_orientation: Whether the image was turned as its EXIF entry says.
        index: Number of the frame, if the image is one of a video or animation.
        timestamp: Seconds from the first frame, if that is known.
    """

    image_size: tuple[int, int]
    processed_size: tuple[int, int]
    padded_size: tuple[int, int]
    source: str | None
    exif_orientation: bool
    index: int | None = None
    timestamp: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedImage:
    """One image ready for the model.

    Attributes:
        pixel_values: (1, 3, height, width), float32, or uint8 where the device is to scale them; an array for
            an exported model, a tensor for any other.
        pixel_mask: (1, height, width), nonzero where pixels are real; None where all are.
        frame: Sizes and source of the image.
    """

    pixel_values: torch.Tensor | np.ndarray
    pixel_mask: torch.Tensor | np.ndarray | None
    frame: ImageFrame


def prepare_image(
    source: ImageSource | PreparedImage,
    processor: DetrImageProcessorBase | ArrayImageProcessor,
    *,
    exif_orientation: bool = False,
    limits: ImageLimits | None = None,
    for_gpu: bool = False,
) -> PreparedImage:
    """Reads one image and makes the model's input from it.

    Args:
        source: The image; one that is prepared already is given back.
        processor: The model's image processor.
        exif_orientation: Turn the image as its EXIF entry says.
        limits: See :func:`detrkit.processing.images.load_image`.
        for_gpu: Leave the pixels as bytes for :func:`to_device`, in memory from which a GPU copies while
            Python goes on; use one thread, as several images are prepared at once.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    if isinstance(source, PreparedImage):
        return source
    image = read_pixels(source, processor, exif_orientation=exif_orientation, limits=limits)
    size = image.shape[1:] if isinstance(image, np.ndarray) else (image.height, image.width)
    if for_gpu:
        from detrkit.processing.batch import image_threads

        with image_threads(1):
            inputs = processor(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False)
    else:
        inputs = processor(images=[image], **({} if isinstance(processor, ArrayImageProcessor) else _TENSORS))
    pixel_values, mask = inputs["pixel_values"], inputs.get("pixel_mask")
    if for_gpu:
        pixel_values = cast("torch.Tensor", pixel_values).pin_memory()
    padded_size = pixel_values.shape[-2], pixel_values.shape[-1]
    processed_size = padded_size
    if mask is not None and bool(mask.all()):
        mask = None
    if mask is not None:
        processed_size = int(mask[0, :, 0].sum()), int(mask[0, 0].sum())
    origin = origin_of(source)
    return PreparedImage(
        pixel_values=pixel_values,
        pixel_mask=mask,
        frame=ImageFrame(
            image_size=size,
            processed_size=processed_size,
            padded_size=padded_size,
            exif_orientation=exif_orientation,
            source=origin.source,
            index=origin.index,
            timestamp=origin.timestamp,
        ),
    )


def read_pixels(
    source: ImageSource,
    processor: DetrImageProcessorBase | ArrayImageProcessor,
    *,
    exif_orientation: bool = False,
    limits: ImageLimits | None = None,
) -> Image | np.ndarray:
    """Reads one image: in mode RGB, or (channels, height, width) for a model of more channels than colours.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    channels = getattr(processor, "channels", 3)
    if channels in (1, 3):
        return read_image(source, exif_orientation=exif_orientation, limits=limits)
    return _many_channels(source, channels, exif_orientation)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where an image came from.

    Attributes:
        source: File name or address, without a password, if it came from one.
        index: Number of the frame, if the image is one of a video or animation.
        timestamp: Seconds from the first frame, if that is known.
    """

    source: str | None = None
    index: int | None = None
    timestamp: float | None = None


def origin_of(source: object) -> Origin:
    """Where an image came from, by what the caller gave."""
    if isinstance(source, VideoFrame):
        name = without_password(source.source)
        return Origin(source=name, index=source.index, timestamp=source.timestamp)
    return Origin(source=os.fspath(source) if isinstance(source, (str, os.PathLike)) else None)


def reading_threads(device: Device) -> int:
    """How many threads prepare images for a model on a device."""
    # A GPU takes a few hundred images a second, of which a thread prepares fifty to a hundred. A model on a
    # CPU needs the cores itself.
    return min(8, os.cpu_count() or 1) if is_cuda(device) else 1


def to_arrays(batch: Sequence[PreparedImage]) -> dict[str, np.ndarray]:
    """An exported model's inputs for images of one padded size."""
    inputs = {"pixel_values": np.concatenate([item.pixel_values for item in batch])}
    if any(item.pixel_mask is not None for item in batch):
        whole = np.ones((1, *batch[0].frame.padded_size), np.int64)
        masks = [whole if item.pixel_mask is None else item.pixel_mask for item in batch]
        inputs["pixel_mask"] = np.concatenate(masks)
    return inputs


def to_device(
    batch: Sequence[PreparedImage], device: torch.device, dtype: torch.dtype, scaling: PixelScaling | None
) -> dict[str, torch.Tensor]:
    """The model's inputs for images of one padded size.

    Args:
        batch: The images.
        device: Where the model runs.
        dtype: Type of the pixels that the model takes.
        scaling: What remains to be done to pixels that are bytes.
    """
    import torch

    from detrkit.kernels.constants import constant

    images = [cast("torch.Tensor", item.pixel_values) for item in batch]
    pixels = torch.cat([image.to(device, non_blocking=True) for image in images])
    mask = None
    if any(item.pixel_mask is not None for item in batch):
        whole = torch.ones(1, *batch[0].frame.padded_size, dtype=torch.long)
        masks = [whole if item.pixel_mask is None else item.pixel_mask for item in batch]
        mask = torch.cat(masks).to(device)
    if scaling is not None and pixels.dtype == torch.uint8:
        # The same two roundings as on the CPU, so the numbers are equal.
        scale, bias = (
            constant(tuple((value,) for value in values), torch.float32, device).unsqueeze(-1)
            for values in (scaling.scale, scaling.bias)
        )
        pixels = pixels.to(torch.float32).mul_(scale).add_(bias)
        if mask is not None:
            pixels.masked_fill_(mask[:, None] == 0, 0)
    inputs = {"pixel_values": pixels.to(dtype)}
    return inputs if mask is None else {**inputs, "pixel_mask": mask}


def _many_channels(source: ImageSource, channels: int, exif_orientation: bool) -> np.ndarray:
    """An image of more channels than colours: (channels, height, width)."""
    from detrkit.processing.images import to_raster

    raster = to_raster(source, exif_orientation=exif_orientation, channels=channels)
    return raster if isinstance(raster, np.ndarray) else np.moveaxis(np.asarray(raster), -1, 0)


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
        # Another image of the same pixels: a copy of a large one would take as much memory again.
        image = image._new(image.im)
        image.info = {}
    return image


def is_one_image(images: object) -> bool:
    """Whether the argument of a call is one image rather than many."""
    if isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping)) or hasattr(images, "read"):
        return True  # an open file can be read; of a dictionary load_image says what is wrong
    dimensions = getattr(images, "ndim", None)  # arrays and tensors
    if dimensions is not None:
        return dimensions <= 3
    return not isinstance(images, Iterable)  # a PIL image is not iterable; load_image reports anything else


def check_numbers(threshold: float, batch_size: int) -> None:
    """Raises a SettingError for numbers that no detector takes."""
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise SettingError(f"threshold must be between 0 and 1, not {threshold!r}")
    if not isinstance(batch_size, Integral):
        raise SettingError(f"batch_size must be a whole number, not {batch_size!r}")
    if batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, not {batch_size}")
