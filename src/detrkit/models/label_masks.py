"""The pixel mask of a batch whose labels tell how large its images are.

Collate functions of Transformers' examples pad images to a square and drop the mask. A model without it takes
the padding for a part of the image, whereas boxes of labels refer to the image alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detrkit.common.log import logger
from detrkit.common.schema import Target

_warned: set[str] = set()


def mask_from_labels(pixel_values: Tensor, labels: Sequence[Target]) -> Tensor | None:
    """The mask of images that were padded after they were resized, or None where nothing is padded.

    An image processor writes the size of each resized image into its label, ``size`` (height, width) in
    pixels. Transformers' own then scales boxes to the padded batch and writes the size of that: no mask is
    needed. Where labels do not tell, a warning says so, once.

    Args:
        pixel_values: (batch, channels, height, width), padded at the bottom and right.
        labels: One for each image.

    Returns:
        (batch, height, width), True where pixels are real.
    """
    height, width = pixel_values.shape[-2:]
    found = [label["size"] for label in labels if label.get("size") is not None]
    if len(found) != len(labels) or len(labels) != len(pixel_values):
        if labels and _ends_in_zeros(pixel_values):
            _warn(
                "some images of a batch seem to be padded, but there is no pixel_mask and labels have no size"
            )
        return None
    if not found:
        return None
    sizes = torch.stack([torch.as_tensor(size, device=pixel_values.device) for size in found])
    if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        listed = sizes.tolist()
        if all(size == [height, width] for size in listed):
            return None
        if any(not (0 < h <= height and 0 < w <= width) for h, w in listed):
            _warn(f"labels have sizes beyond the batch's {height}x{width} pixels, and there is no pixel_mask")
            return None
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None]


def _ends_in_zeros(pixel_values: Tensor) -> bool:
    """Whether the last row or column of an image of several is zero, as padding is."""
    if pixel_values.ndim != 4 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    last = (pixel_values[..., -1, :].abs().amax((1, 2)), pixel_values[..., -1].abs().amax((1, 2)))
    return bool((torch.stack(last) == 0).any())


def _warn(problem: str) -> None:
    if problem not in _warned:
        _warned.add(problem)
        logger.warning(
            "%s: padding counts as a part of the image, to which boxes are relative; pass the pixel_mask "
            "that the image processor gives",
            problem,
        )
