"""A batch of an image processor in the form that a call asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from transformers import BatchFeature

from detrkit.processing.images import CHANNELS_FIRST, CHANNELS_LAST, DataFormat
from detrkit.processing.options import name_of

Pixels: TypeAlias = np.ndarray | torch.Tensor | list[np.ndarray]
"""A batch, or a list of images of different sizes."""


def pack(
    data: Mapping[str, Pixels],
    kind: str | None,
    device: torch.device | str | None,
    data_format: DataFormat = None,
) -> BatchFeature:
    """Arrays and tensors of a batch in the form that was asked for."""
    packed: dict[str, np.ndarray | torch.Tensor | list[np.ndarray]] = {}
    for name, value in data.items():
        if name == "pixel_values":
            value = _with_channels(value, data_format)
        if kind is not None and isinstance(value, list):
            raise ValueError(
                "images of different sizes cannot be one tensor; use do_pad=True, or leave return_tensors out"
            )
        if kind == "pt":
            packed[name] = torch.as_tensor(value, device=device)
        elif kind == "np":
            packed[name] = _to_array(value)
        else:
            packed[name] = [_to_array(single) for single in value]
    return BatchFeature(packed)


def _to_array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def _with_channels(images: Pixels, data_format: DataFormat) -> Pixels:
    """A batch, or list of images, with its channels where ``data_format`` wants them."""
    layout = name_of(data_format)
    if layout in (None, CHANNELS_FIRST):
        return images
    if layout != CHANNELS_LAST:
        raise ValueError(f"data_format must be {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, not {layout!r}")
    if isinstance(images, list):
        return [np.moveaxis(image, 0, -1) for image in images]
    return torch.as_tensor(images).movedim(1, -1)
