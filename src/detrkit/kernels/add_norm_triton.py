# mypy: allow-untyped-defs, allow-incomplete-defs
"""Residual sum and layer norm in one pass over memory on a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES_PER_PROGRAM = 1024


@triton.jit
def _kernel(
    x,
    update,
    weight,
    bias,
    output,
    rows,
    width,
    eps,
    block_rows: tl.constexpr,
    block_width: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)[:, None]
    column = tl.arange(0, block_width)[None, :]
    inside = (row < rows) & (column < width)
    at = row * width + column
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, total - (tl.sum(total, axis=1) / width)[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
    scale = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(output + at, (centred * spread * scale + shift).to(output.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, update: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The layer norm of a sum, both computed in float32.

    Args:
        x: (..., width).
        update: Shape and type of ``x``.
        weight: (width,).
        bias: (width,).
        eps: Added to the variance before the square root.

    Returns:
        Shape and type of ``x``.
    """
    update = update.expand_as(x).contiguous()
    x = x.contiguous()
    output = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, _VALUES_PER_PROGRAM // block_width)
    if rows:
        with torch.cuda.device(x.device):
            _kernel[(triton.cdiv(rows, block_rows),)](
                x,
                update,
                weight,
                bias,
                output,
                rows,
                width,
                eps,
                block_rows=block_rows,
                block_width=block_width,
            )
    return output
