"""COCO's panoptic PNG: the colour of a pixel is the id of its segment, R + 256 G + 65536 B."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image


def rgb_to_id(color: Any) -> Any:
    """Segment ids of colours.

    Args:
        color: Channels R, G, B, each 0 to 255, in the last dimension: an array or tensor (..., 3), or three
            numbers.

    Returns:
        int32 (...) of the same kind as ``color``; an int for a single colour.

    Raises:
        ValueError: The last dimension is not 3.
    """
    # A tensor stays one, on its device; PyTorch need not be imported to find out.
    channels = color.int() if hasattr(color, "detach") else np.asarray(color).astype(np.int32)
    if channels.ndim == 0 or channels.shape[-1] != 3:
        raise ValueError(f"colours need three channels in the last dimension, not shape {channels.shape}")
    ids = channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]
    return int(ids) if ids.ndim == 0 else ids


def id_to_rgb(id_map: Any) -> Any:
    """Colours of segment ids, the inverse of :func:`rgb_to_id`.

    Args:
        id_map: Ids, 0 to 16777215: an integer array (height, width), a tensor on the CPU, or one int.

    Returns:
        uint8 (height, width, 3); three ints in a list for a single id.

    Raises:
        ValueError: An id that no colour stands for.
    """
    ids = np.asarray(id_map)
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f"segment ids must be 0 to {(1 << 24) - 1}, not {ids.min()} to {ids.max()}")
    # A little-endian word is R, G, B and a byte that is zero.
    colors = ids.astype("<u4", order="C")[..., None].view(np.uint8)[..., :3]
    return colors.tolist() if ids.ndim == 0 else np.ascontiguousarray(colors)


def encode_panoptic_png(id_map: np.ndarray) -> bytes:
    """The PNG file of a map of segment ids (height, width)."""
    with io.BytesIO() as file:
        PIL.Image.fromarray(id_to_rgb(id_map)).save(file, format="PNG")
        return file.getvalue()
