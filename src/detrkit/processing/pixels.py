"""From bytes to the network's input: rescaling, normalisation and padding in one pass over a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from detrkit.processing.images import Raster
from detrkit.processing.resize import Box, Resample, resize_part, resize_real

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TINY = 1e-6  # the least that pixels are divided by, or multiplied with


@dataclass(frozen=True)
class PixelScaling:
    """What happens to a pixel: ``value * scale + bias``, for each channel.

    Rescaling and normalising, ``(value * rescale_factor - mean) / std``, are one multiplication and one
    addition. Against the original's three steps in float32 the result differs by rounding only (below 1e-6
    for ImageNet's mean and standard deviation).
    """

    scale: tuple[float, ...]
    bias: tuple[float, ...]

    @classmethod
    def of(
        cls,
        rescale_factor: float | None = 1 / 255,
        mean: float | Sequence[float] | None = IMAGENET_MEAN,
        std: float | Sequence[float] | None = IMAGENET_STD,
        channels: int = 3,
    ) -> PixelScaling | None:
        """Builds the scaling from the steps to take.

        Args:
            rescale_factor: Factor of the rescaling; None to leave it out.
            mean: Means to subtract, one or one a channel; None to leave normalisation out.
            std: Standard deviations to divide by, as many; None to leave normalisation out.
            channels: Channels of the images.

        Returns:
            The scaling, or None where there is nothing to do and bytes stay bytes.

        Raises:
            ValueError: A wrong number of means or deviations, or a number that is not finite, negative, or 0
                where nothing can be divided by it.
        """
        normalize = mean is not None and std is not None
        if rescale_factor is None and not normalize:
            return None
        (factor,) = [1.0] if rescale_factor is None else _numbers(rescale_factor, "rescale_factor", _TINY)
        means = _numbers(mean, "image_mean", 0.0) if normalize else [0.0]
        stds = _numbers(std, "image_std", _TINY) if normalize else [1.0]
        means = _per_channel(means, "image_mean", channels)
        stds = _per_channel(stds, "image_std", channels)
        return cls(
            tuple(factor / deviation for deviation in stds),
            tuple(-value / deviation for value, deviation in zip(means, stds)),
        )

    def apply(self, planes: Iterable[np.ndarray], out: np.ndarray) -> None:
        """Writes planes (height, width) of any type, scaled, to float32 (channels, height, width)."""
        for plane, target, scale, bias in zip(planes, out, self.scale, self.bias):
            np.multiply(plane, np.float32(scale), out=target)
            target += np.float32(bias)


def write_pixels(
    image: Raster,
    size: tuple[int, int],
    out: np.ndarray,
    part: Box | None = None,
    resample: Resample = None,
    scaling: PixelScaling | None = None,
) -> None:
    """Resizes an image and writes its scaled pixels, or a part of them.

    Args:
        image: A PIL image with a band for each channel, or a float32 array (channels, height, width).
        size: (height, width) in pixels after resizing.
        out: Where to write: (channels, height, width), float32, or uint8 for a PIL image without scaling; may
            be a view.
        part: One of :func:`independent_parts` to write; all when None. PIL images only.
        resample: Filter of the resizing.
        scaling: What to do to the pixels.
    """
    planes: Iterable[np.ndarray]
    if isinstance(image, np.ndarray):
        planes = resize_real(image, *size, resample)
    else:
        part = part or (0, 0, *size)
        out = out[:, part[0] : part[2], part[1] : part[3]]
        resized = resize_part(image, *size, part, resample)
        planes = [np.asarray(band) for band in resized.split()]
    if scaling is not None:
        scaling.apply(planes, out)
    else:
        for plane, target in zip(planes, out):
            np.copyto(target, plane)


def _numbers(value: float | Sequence[float] | None, name: str, least: float) -> list[float]:
    """One or more numbers of an option, checked."""
    try:
        numbers = [float(v) for v in np.atleast_1d(np.asarray(value, dtype=np.float64))]
    except (TypeError, ValueError):
        numbers = [math.nan]
    if not all(math.isfinite(number) and number >= least for number in numbers):
        kind = "at least 0" if least == 0 else "above 0"
        raise ValueError(f"{name} must be finite and {kind}, not {value!r}; correct it")
    return numbers


def _per_channel(values: list[float], name: str, channels: int) -> list[float]:
    if len(values) not in (1, channels):
        raise ValueError(
            f"{name} must be one number or {channels}, one for each channel of the images; got {values!r}"
        )
    return values * channels if len(values) == 1 else values
