"""The options of an image processor and what they make of images, with NumPy and Pillow alone.

The processors of Transformers' interface and the one of exported models share this, so that an image becomes
the same pixels in both.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from detrkit.common.errors import SettingError
from detrkit.processing.batch import make_pixel_mask, make_pixels, padded_size
from detrkit.processing.images import DataFormat, ImageSource, Raster, to_raster
from detrkit.processing.options import Settings, annotation_format, default, pad_size_dict
from detrkit.processing.panoptic_rule import normalize_is_thing_map
from detrkit.processing.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelScaling
from detrkit.processing.resize import Resample, Size, SizeOption, normalize_size, pillow_filter, size_for

if TYPE_CHECKING:
    from typing_extensions import Self

# What files hold beside options: which class they are of.
_CLASS_NAMES = frozenset({"image_processor_type", "feature_extractor_type", "processor_class"})


@dataclass(frozen=True, eq=False)
class Plan:
    """The images of a call and the sizes, (height, width) in pixels, that they will have.

    Attributes:
        rasters: The images as they were read.
        old_sizes: Their sizes.
        sizes: Their sizes after resizing.
        padded: The size of the batch; None where nothing is padded.
    """

    rasters: Sequence[Raster]
    old_sizes: Sequence[Size]
    sizes: Sequence[Size]
    padded: Size | None

    def make(self, settings: Settings) -> dict[str, np.ndarray | list[np.ndarray]]:
        """``pixel_values`` of the batch and, where it is padded, ``pixel_mask``."""
        made = {"pixel_values": make_pixels(self.rasters, self.sizes, self.padded, settings)}
        if self.padded is not None:
            made["pixel_mask"] = make_pixel_mask(self.sizes, self.padded)
        return made


class ImagePreparation:
    """The options of an image processor, whose meaning ``DetrImageProcessorBase`` explains."""

    format: str
    do_resize: bool
    size: dict[str, int]
    resample: Resample
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: float | Sequence[float]
    image_std: float | Sequence[float]
    do_convert_annotations: bool
    do_pad: bool
    pad_size: dict[str, int] | None
    exif_orientation: bool
    num_channels: int | None
    is_thing_map: dict[int, bool] | None

    def take_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Sets the options from those that are given, of any age, and returns what is none.

        Raises:
            ValueError: A size or map that is not understood.
        """
        rest = {name: value for name, value in given.items() if name not in _CLASS_NAMES}

        def take(name: str, otherwise: Any = None) -> Any:
            return default(rest.pop(name, None), otherwise)

        pad_size: SizeOption = take("pad_size")
        things = take("is_thing_map")
        self.format = annotation_format(take("format"))
        self.do_resize = take("do_resize", True)
        self.size = normalize_size(take("size"), take("max_size"))
        self.resample = take("resample", PIL.Image.Resampling.BILINEAR)
        self.do_rescale = take("do_rescale", True)
        self.rescale_factor = take("rescale_factor", 1 / 255)
        self.do_normalize = take("do_normalize", True)
        self.image_mean = take("image_mean", list(IMAGENET_MEAN))
        self.image_std = take("image_std", list(IMAGENET_STD))
        self.do_convert_annotations = take("do_convert_annotations", self.do_normalize)
        old_do_pad = take("pad_and_return_pixel_mask", True)
        self.do_pad = take("do_pad", old_do_pad)
        self.pad_size = None if pad_size is None else pad_size_dict(pad_size)
        self.exif_orientation = bool(take("exif_orientation", False))
        self.num_channels = take("num_channels")
        self.is_thing_map = None if things is None else normalize_is_thing_map(things)
        return rest

    def plan(
        self, sources: Sequence[ImageSource], settings: Settings, input_data_format: DataFormat = None
    ) -> Plan:
        """Reads images and settles their sizes.

        Raises:
            ImageError: An image cannot be read or used.
            ValueError: An image is larger than the size to pad to.
        """
        rasters = [
            to_raster(
                source,
                input_data_format=input_data_format,
                exif_orientation=settings.exif_orientation,
                channels=settings.channels,
            )
            for source in sources
        ]
        old_sizes = [_size_of(raster) for raster in rasters]
        fixed = settings.pad_size if settings.do_pad else None
        sizes = [s if settings.size is None else size_for(*s, settings.size, fixed) for s in old_sizes]
        return Plan(rasters, old_sizes, sizes, padded_size(sizes, fixed) if settings.do_pad else None)

    def check(self) -> None:
        """Looks at the options, which are otherwise looked at with the first image.

        Raises:
            ValueError: One is out of range.
            TypeError: One is of a type that it cannot be.
        """
        pillow_filter(Settings.of(self, {}).resample)

    @property
    def channels(self) -> int:
        """Channels of the images that are made."""
        return Settings.of(self, {}).channels

    def fitted_to(self, channels: int) -> Self:
        """This processor, or a copy, that makes images of as many channels as a model takes.

        Raises:
            SettingError: Its means and deviations are those of another number of channels.
        """
        if self.channels == channels:
            return self
        counts = {np.asarray(statistics).size for statistics in (self.image_mean, self.image_std)}
        if self.num_channels is not None or not counts <= {1, channels}:
            raise SettingError(
                f"the model takes images of {channels} channels, and its image processor makes "
                f"{self.channels}; give it image_mean and image_std of {channels} numbers, or of one"
            )
        fitting = copy.copy(self)
        fitting.num_channels = channels
        return fitting

    @property
    def pixel_scaling(self) -> PixelScaling | None:
        """What turns bytes into the network's input; None where bytes stay bytes."""
        return Settings.of(self, {}).scaling


def with_options(contents: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a processor's JSON file with other options in the place of some."""
    values = {**contents, **given}
    if "size" in given and "max_size" not in given:
        values.pop("max_size", None)  # it belongs to the size that is replaced
    if "pad_and_return_pixel_mask" in given and "do_pad" not in given:
        values["do_pad"] = given["pad_and_return_pixel_mask"]
    return values


def _size_of(raster: Raster) -> Size:
    """(height, width) of an image."""
    if isinstance(raster, PIL.Image.Image):
        return raster.height, raster.width
    return raster.shape[-2], raster.shape[-1]
