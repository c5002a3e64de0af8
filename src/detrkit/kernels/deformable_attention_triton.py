# mypy: allow-untyped-defs, allow-incomplete-defs
"""Deformable attention in Triton: what a CUDA device runs, forward and backward.

One program handles a block of queries of one head of one image. It walks over levels and points, reads the
four pixels around every sample as rows of ``head_dim`` numbers and sums in fp32 (in fp64 for fp64 values).
The backward pass walks the same way: what belongs to a sample is written by the one program that has it; the
gradient of the value, to which many samples add, is summed by atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from detrkit.kernels.constants import constant

# Queries of a program and warps that share them; a sample is one row of loads. The fastest of 2 to 64 queries
# and 1 to 8 warps on an H100, for the encoder of an 800x1066 image.
_FORWARD = {"block_queries": 8, "num_warps": 1}
_BACKWARD = {"block_queries": 16, "num_warps": 4}


@triton.jit
def _axis(location, size):
    """Pixel coordinate of a normalised location: the neighbour before it, the fraction, if it is inside.

    A NaN compares as false and so is outside. There the coordinate becomes 0, as no integer might hold it.
    """
    position = location * size - 0.5
    inside = (position > -1) & (position < size)
    position = tl.where(inside, position, 0.0)
    before = tl.floor(position)
    return before.to(tl.int32), position - before, inside


@triton.jit
def _forward_kernel(
    value,
    levels,
    locations,
    weights,
    output,
    length,
    queries,
    heads,
    head_dim,
    level_count: tl.constexpr,
    point_count: tl.constexpr,
    block_queries: tl.constexpr,
    block_channels: tl.constexpr,
    sum_dtype: tl.constexpr,
):
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    channel = tl.arange(0, block_channels)
    real_query = query < queries
    real_channel = channel[None, :] < head_dim
    row = (image * queries + query) * heads + head
    pixels = value + (image * length * heads + head) * head_dim + channel[None, :]
    width_of_row = heads * head_dim

    total = tl.zeros((block_queries, block_channels), dtype=sum_dtype)
    for level in range(level_count):
        height = tl.load(levels + level * 3)
        width = tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        for point in tl.static_range(point_count):
            sample = row * (level_count * point_count) + level * point_count + point
            weight = tl.load(weights + sample, mask=real_query, other=0.0).to(sum_dtype)
            at_x = tl.load(locations + sample * 2, mask=real_query, other=-1.0).to(sum_dtype)
            at_y = tl.load(locations + sample * 2 + 1, mask=real_query, other=-1.0).to(sum_dtype)
            x, right, inside_x = _axis(at_x, width)
            y, below, inside_y = _axis(at_y, height)
            inside = inside_x & inside_y
            for corner in tl.static_range(4):
                dx = corner % 2
                dy = corner // 2
                hit = inside & (x + dx >= 0) & (x + dx < width) & (y + dy >= 0) & (y + dy < height)
                share_x = right if dx == 1 else 1 - right
                share_y = below if dy == 1 else 1 - below
                pixel = (start + (y + dy) * width + x + dx).to(tl.int64)
                numbers = tl.load(
                    pixels + pixel[:, None] * width_of_row, mask=hit[:, None] & real_channel, other=0.0
                ).to(sum_dtype)
                total += (weight * share_x * share_y)[:, None] * numbers
    where = output + row[:, None] * head_dim + channel[None, :]
    tl.store(where, total.to(output.dtype.element_ty), mask=real_query[:, None] & real_channel)


@triton.jit
def _backward_kernel(
    value,
    levels,
    locations,
    weights,
    grad_output,
    grad_value,
    grad_locations,
    grad_weights,
    length,
    queries,
    heads,
    head_dim,
    level_count: tl.constexpr,
    point_count: tl.constexpr,
    block_queries: tl.constexpr,
    block_channels: tl.constexpr,
    sum_dtype: tl.constexpr,
    value_wanted: tl.constexpr,
):
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    query = tl.program_id(0) * block_queries + tl.arange(0, block_queries)
    channel = tl.arange(0, block_channels)
    real_query = query < queries
    real_channel = channel[None, :] < head_dim
    row = (image * queries + query) * heads + head
    first = (image * length * heads + head) * head_dim + channel[None, :]
    width_of_row = heads * head_dim
    incoming = tl.load(
        grad_output + row[:, None] * head_dim + channel[None, :],
        mask=real_query[:, None] & real_channel,
        other=0.0,
    ).to(sum_dtype)

    for level in range(level_count):
        height = tl.load(levels + level * 3)
        width = tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        for point in range(point_count):
            sample = row * (level_count * point_count) + level * point_count + point
            weight = tl.load(weights + sample, mask=real_query, other=0.0).to(sum_dtype)
            at_x = tl.load(locations + sample * 2, mask=real_query, other=-1.0).to(sum_dtype)
            at_y = tl.load(locations + sample * 2 + 1, mask=real_query, other=-1.0).to(sum_dtype)
            x, right, inside_x = _axis(at_x, width)
            y, below, inside_y = _axis(at_y, height)
            inside = inside_x & inside_y
            grad_weight = tl.zeros((block_queries,), dtype=sum_dtype)
            grad_x = tl.zeros((block_queries,), dtype=sum_dtype)
            grad_y = tl.zeros((block_queries,), dtype=sum_dtype)
            for corner in tl.static_range(4):
                dx = corner % 2
                dy = corner // 2
                hit = inside & (x + dx >= 0) & (x + dx < width) & (y + dy >= 0) & (y + dy < height)
                share_x = right if dx == 1 else 1 - right
                share_y = below if dy == 1 else 1 - below
                pixel = (start + (y + dy) * width + x + dx).to(tl.int64)
                where = first + pixel[:, None] * width_of_row
                mask = hit[:, None] & real_channel
                numbers = tl.load(value + where, mask=mask, other=0.0).to(sum_dtype)
                product = tl.sum(numbers * incoming, axis=1)
                grad_weight += share_x * share_y * product
                # The share of the pixel after the sample grows with the coordinate, the other one shrinks.
                grad_x += (2 * dx - 1) * share_y * product
                grad_y += (2 * dy - 1) * share_x * product
                if value_wanted:
                    part = (weight * share_x * share_y)[:, None] * incoming
                    tl.atomic_add(grad_value + where, part, mask=mask)
            tl.store(grad_weights + sample, grad_weight, mask=real_query)
            tl.store(grad_locations + sample * 2, weight * grad_x * width, mask=real_query)
            tl.store(grad_locations + sample * 2 + 1, weight * grad_y * height, mask=real_query)


def _level_table(spatial_shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """(levels, 3), int32: height, width and the index of the level's first pixel."""
    rows, start = [], 0
    for height, width in spatial_shapes:
        rows.append((height, width, start))
        start += height * width
    return constant(tuple(rows), torch.int32, device)


def _settings(value: Tensor, locations: Tensor) -> dict[str, Any]:
    """The kernels' compile-time constants."""
    return {
        "level_count": locations.shape[3],
        "point_count": locations.shape[4],
        "block_channels": triton.next_power_of_2(value.shape[3]),
        "sum_dtype": tl.float64 if value.dtype == torch.float64 else tl.float32,
    }


def _grid(value: Tensor, locations: Tensor, block_queries: int) -> tuple[int, int]:
    """Programs: blocks of queries, heads of all images."""
    return triton.cdiv(locations.shape[1], block_queries), value.shape[0] * value.shape[2]


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def forward(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The public function, for levels that all have pixels."""
    value, locations, weights = (x.contiguous() for x in (value, locations, weights))
    batch, length, heads, head_dim = value.shape
    queries = locations.shape[1]
    output = value.new_empty(batch, queries, heads * head_dim)
    with _on_device_of(value):
        _forward_kernel[_grid(value, locations, _FORWARD["block_queries"])](
            value,
            _level_table(spatial_shapes, value.device),
            locations,
            weights,
            output,
            length,
            queries,
            heads,
            head_dim,
            **_settings(value, locations),
            **_FORWARD,
        )
    return output


def backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of value (if wanted), sampling locations and attention weights (always).

    Args:
        grad: Of the result, (batch, queries, heads x head_dim).
        value: The forward pass's, as the three that follow it.
        spatial_shapes: As in the forward pass.
        locations: As in the forward pass.
        weights: As in the forward pass.
        of_value: Whether the value's gradient is wanted.
        of_samples: Whether those of locations and weights are; they cost little beside it.
    """
    grad, value, locations, weights = (x.contiguous() for x in (grad, value, locations, weights))
    _, length, heads, head_dim = value.shape
    queries = locations.shape[1]
    # Half precision would lose what is added to an already large sum.
    sums = torch.float64 if value.dtype == torch.float64 else torch.float32
    grad_value = torch.zeros_like(value, dtype=sums) if of_value else None
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    with _on_device_of(value):
        _backward_kernel[_grid(value, locations, _BACKWARD["block_queries"])](
            value,
            _level_table(spatial_shapes, value.device),
            locations,
            weights,
            grad,
            value if grad_value is None else grad_value,
            grad_locations,
            grad_weights,
            length,
            queries,
            heads,
            head_dim,
            **_settings(value, locations),
            **_BACKWARD,
            value_wanted=of_value,
        )
    return None if grad_value is None else grad_value.to(value.dtype), grad_locations, grad_weights
