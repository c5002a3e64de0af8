"""Small tables of numbers on a device, copied there once."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = tuple[tuple[float, ...], ...]

_KEPT: dict[tuple[Rows, torch.dtype, torch.device], Tensor] = {}


def constant(rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table as a tensor that must not be written to.

    Copying a few numbers to a GPU makes Python wait for all work queued there, so each table is copied once
    and kept. It is never freed: a captured CUDA graph keeps reading its address. Tables hold the sizes of
    feature maps, of which even a varied data set has only a few thousand.

    Args:
        rows: The numbers; all rows have the same length.
        dtype: Type of the tensor.
        device: Where the tensor is needed.

    Returns:
        (rows, columns).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _filled(rows, dtype, device)
    if device.type != "cuda":
        return torch.tensor(rows, dtype=dtype, device=device)
    key = (rows, dtype, device)
    if key not in _KEPT:
        if torch.cuda.is_current_stream_capturing():
            return _filled(rows, dtype, device)
        # A tensor made in inference mode could not take part in a training step later.
        with torch.inference_mode(False):
            _KEPT[key] = torch.tensor(rows, dtype=dtype, device=device)
    return _KEPT[key]


def _filled(rows: Rows, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The table without a copy from the host; in a compiled graph, its numbers may be symbols."""
    # torch.jit.trace gives sizes as tensors, which it follows as long as they stay tensors.
    numbers = [
        number.to(device, dtype)
        if isinstance(number, Tensor)
        else torch.full((), number, dtype=dtype, device=device)
        for row in rows
        for number in row
    ]
    return torch.stack(numbers).unflatten(0, (len(rows), -1))
