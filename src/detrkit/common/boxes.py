"""Box arithmetic. Boxes are (..., 4): cxcywh (centre and size) or xyxy (corners)."""

from __future__ import annotations

import torch
from torch import Tensor


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners; any unit, any leading shape."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size; any unit, any leading shape."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al., 2019) of boxes that broadcast together.

    Args:
        a: (..., 4) xyxy.
        b: (..., 4) xyxy, broadcast against ``a``: ``a[:, None], b[None]`` gives all pairs.

    Returns:
        (...), in (-1, 1]. Two boxes without area give NaN, as their union is empty.
    """
    overlap, union, hull = _areas(a, b)
    return overlap / union - (hull - union) / hull


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes that broadcast together, as for :func:`generalized_iou`.

    Returns:
        (...), in [0, 1]; 0 for two boxes without area.
    """
    overlap, union, _ = _areas(a, b)
    return overlap / union.clamp(min=torch.finfo(union.dtype).tiny)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Areas of the intersection, the union and the box around both."""
    left_a, top_a, right_a, bottom_a = a.unbind(-1)
    left_b, top_b, right_b, bottom_b = b.unbind(-1)
    width = torch.minimum(right_a, right_b) - torch.maximum(left_a, left_b)
    height = torch.minimum(bottom_a, bottom_b) - torch.maximum(top_a, top_b)
    overlap = width.clamp(min=0) * height.clamp(min=0)
    union = (right_a - left_a) * (bottom_a - top_a) + (right_b - left_b) * (bottom_b - top_b) - overlap
    hull_width = torch.maximum(right_a, right_b) - torch.minimum(left_a, left_b)
    hull = hull_width * (torch.maximum(bottom_a, bottom_b) - torch.minimum(top_a, top_b))
    return overlap, union, hull
