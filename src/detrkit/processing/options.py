"""The options of an image processor: their names, their forms, and what a call makes of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from detrkit.common.errors import ImageError, SettingError
from detrkit.common.text import did_you_mean
from detrkit.processing.pixels import PixelScaling
from detrkit.processing.resize import Resample, Size, SizeOption, normalize_size

COCO_DETECTION = "coco_detection"
COCO_PANOPTIC = "coco_panoptic"

_MOST_PADDING = 4  # times the longest edge of resized images

_Value = TypeVar("_Value")

# Options that a processor keeps, writes to its JSON file, and takes again in each call.
_KEPT = (
    "format",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_annotations",
    "do_pad",
    "pad_size",
    "exif_orientation",
    "is_thing_map",
    "num_channels",
)
OPTIONS = frozenset({*_KEPT, "max_size", "pad_and_return_pixel_mask"})
"""Options of a processor, old names included."""


@dataclass(frozen=True)
class Settings:
    """The options of one call, checked and in one form.

    Attributes:
        size: A dictionary from :func:`normalize_size`; None for images that keep their size.
        pad_size: (height, width) to pad to; None for the largest image of the batch.
    """

    format: str
    size: dict[str, int] | None
    resample: Resample
    scaling: PixelScaling | None
    do_convert_annotations: bool
    do_pad: bool
    pad_size: Size | None
    exif_orientation: bool
    channels: int

    @classmethod
    def of(cls, processor: object, options: Mapping[str, Any]) -> Settings:
        """The options of a call, with a processor's own for those that the call leaves out.

        Raises:
            ValueError: An option is out of range.
        """
        values = {name: default(options.get(name), getattr(processor, name)) for name in _KEPT}
        if options.get("do_pad") is None:
            values["do_pad"] = default(options.get("pad_and_return_pixel_mask"), values["do_pad"])
        normalize = values["do_normalize"]
        size = normalize_size(values["size"], options.get("max_size")) if values["do_resize"] else None
        pad_size = None if values["pad_size"] is None else height_and_width(values["pad_size"])
        _check_padding(size, pad_size)
        channels = _channels(values["num_channels"], values["image_mean"], values["image_std"])
        return cls(
            format=annotation_format(values["format"]),
            size=size,
            resample=values["resample"],
            scaling=PixelScaling.of(
                values["rescale_factor"] if values["do_rescale"] else None,
                values["image_mean"] if normalize else None,
                values["image_std"] if normalize else None,
                channels,
            ),
            channels=channels,
            do_convert_annotations=bool(values["do_convert_annotations"]),
            do_pad=bool(values["do_pad"]),
            pad_size=pad_size,
            exif_orientation=bool(values["exif_orientation"]),
        )


def _channels(given: int | None, *statistics: object) -> int:
    """Channels of the images that a processor makes: as given, or as many as it has means and deviations."""
    if given is not None:
        if not isinstance(given, int) or given < 1:
            raise ValueError(f"num_channels must be a whole number above 0, not {given!r}")
        return given
    counts = [len(values) for values in statistics if isinstance(values, (list, tuple, np.ndarray))]
    return next((count for count in counts if count > 1), 3)


def _check_padding(size: Mapping[str, int] | None, pad_size: Size | None) -> None:
    """Raises an ImageError for padding far beyond any image: it would fill the memory with zeros."""
    edges = [length for name, length in (size or {}).items() if name != "shortest_edge"]
    if pad_size is not None and edges and max(pad_size) > _MOST_PADDING * max(edges):
        raise ImageError(
            f"pad_size (height {pad_size[0]}, width {pad_size[1]}) is more than {_MOST_PADDING} times as "
            f"long as the images after resizing (size={dict(size or {})}); correct one of them"
        )


def default(value: _Value | None, otherwise: _Value) -> _Value:
    """A value, or another one in place of None."""
    return otherwise if value is None else value


def name_of(value: object) -> str | None:
    """The text of an option that may be one of Transformers' enumerations; None for None."""
    return None if value is None else str(getattr(value, "value", value))


def annotation_format(value: object) -> str:
    """The format of annotations; that of COCO detection for None."""
    return name_of(value) or COCO_DETECTION


def pad_size_dict(pad_size: SizeOption) -> dict[str, int]:
    """``height`` and ``width`` of any form of the option ``pad_size``.

    Raises:
        ValueError: It has other keys.
    """
    size = normalize_size((pad_size, pad_size) if isinstance(pad_size, int) else pad_size)
    if set(size) != {"height", "width"}:
        raise ValueError(f"pad_size must have the keys height and width, not {', '.join(size)}")
    return size


def height_and_width(pad_size: SizeOption) -> Size:
    """(height, width) of any form of the option ``pad_size``."""
    size = pad_size_dict(pad_size)
    return size["height"], size["width"]


def tensor_kind(return_tensors: object) -> str | None:
    """The option ``return_tensors``: "pt", "np" or None.

    Raises:
        ValueError: It is something else.
    """
    kind = name_of(return_tensors)
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, not {kind!r}")
    return kind


class UnknownOptionError(SettingError, TypeError):
    """An option that does not exist; a TypeError too, which Python raises for unknown arguments."""


def refuse_unknown(options: Iterable[str], known: Collection[str]) -> None:
    """Raises for an option that no image processor of these families has."""
    for name in sorted(set(options) - set(known)):
        suggestion = did_you_mean(name, known) or f"; options are: {', '.join(sorted(known))}"
        raise UnknownOptionError(f"unknown option {name!r} of the image processor{suggestion}")
