"""Multi-scale deformable attention: a weighted sum of bilinear samples of feature maps.

Deformable DETR (https://arxiv.org/abs/2010.04159, equation 3; ``ms_deform_attn`` in the original). Each query
looks at a few points of each level in place of all pixels. Three implementations give the same numbers:

- ``gather``: on a CPU. A bilinear sample is the weighted sum of four rows of the value, so the whole operator
  is one gather-and-sum of rows, which ``embedding_bag`` does without storing the rows.
- ``triton``: on CUDA (:mod:`detrkit.models.layers.deformable_attention_triton`).
- ``grid_sample``: spelt out in plain PyTorch for anything else, for tracing and for export.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Implementation = Literal["gather", "triton", "grid_sample"]
SpatialShapes = Sequence[tuple[int, int]]

# Samples (queries x heads x levels x points) in work at a time. Their coordinates, indices and weights take
# about 80 bytes a sample, so 5 MB: enough to be worth the calls, and it stays in the caches.
SAMPLES_AT_A_TIME = 1 << 16

# Samples of a head that are sorted at a time for the gradient of the value: the more, the fewer passes over
# all pixels. They take about 60 bytes each, so 32 MB.
SAMPLES_TO_SORT = 1 << 19


def deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    implementation: Implementation | None = None,
) -> Tensor:
    """Samples each level's feature map at each query's points and sums them by weight.

    A location is relative to its level: 0 is the left (upper) edge of the first pixel, 1 the right (lower)
    edge of the last, so location x size - 0.5 counts pixels from centre to centre. Samples are bilinear;
    what lies outside the map counts as zero. So does a sample whose location is NaN or infinite, and its
    location gets no gradient. Numbers of ``value`` must be finite.

    Indices and sums are computed in fp32 (fp64 where ``value`` is fp64), whatever the inputs' dtypes.

    Args:
        value: (batch, pixels of all levels, heads, head_dim), level after level, row after row.
        spatial_shapes: (height, width) in pixels of each level. A level without pixels contributes nothing.
        sampling_locations: (batch, queries, heads, levels, points, 2), x then y, relative to the level.
        attention_weights: (batch, queries, heads, levels, points).
        implementation: ``gather``, ``triton`` or ``grid_sample``; by default what fits the device.

    Returns:
        (batch, queries, heads x head_dim) in the dtype of ``value``. Can be differentiated once.

    Raises:
        ValueError: The shapes do not fit each other, or there is no such implementation.
    """
    if not _is_traced():
        _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
        spatial_shapes, sampling_locations, attention_weights = _without_empty_levels(
            spatial_shapes, sampling_locations, attention_weights
        )
    name = implementation or _implementation_for(value.device)
    if name == "grid_sample":
        return _grid_sample(value, spatial_shapes, sampling_locations, attention_weights)
    if name == "gather":
        return _Gather.apply(value, spatial_shapes, sampling_locations, attention_weights)
    if name == "triton":
        from detrkit.models.layers.deformable_attention_triton import TritonDeformableAttention

        return TritonDeformableAttention.apply(value, spatial_shapes, sampling_locations, attention_weights)
    raise ValueError(f"deformable attention has no implementation {name!r}: gather, triton or grid_sample")


def _is_traced() -> bool:
    """Whether the call is recorded for a graph, in which sizes may be symbols and branches are fixed."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _implementation_for(device: torch.device) -> Implementation:
    if _is_traced():
        return "grid_sample"
    if device.type == "cpu":
        return "gather"
    return "triton" if device.type == "cuda" and _has_triton() else "grid_sample"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_shapes(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> None:
    """Raises a ValueError that names the shapes where they do not fit."""
    if value.ndim != 4:
        raise ValueError(f"value must be (batch, pixels, heads, head_dim), not {tuple(value.shape)}")
    if locations.ndim != 6 or locations.shape[-1] != 2:
        raise ValueError(
            "sampling_locations must be (batch, queries, heads, levels, points, 2), "
            f"not {tuple(locations.shape)}"
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            "attention_weights must be (batch, queries, heads, levels, points) = "
            f"{tuple(locations.shape[:-1])} as sampling_locations has them, not {tuple(weights.shape)}"
        )
    batch, pixels, heads, _ = value.shape
    if (locations.shape[0], locations.shape[2]) != (batch, heads):
        raise ValueError(
            f"value {tuple(value.shape)} has {batch} images and {heads} heads, sampling_locations "
            f"{tuple(locations.shape)} has {locations.shape[0]} and {locations.shape[2]}"
        )
    if locations.shape[3] != len(spatial_shapes):
        raise ValueError(
            f"spatial_shapes {list(spatial_shapes)} has {len(spatial_shapes)} levels, "
            f"sampling_locations {tuple(locations.shape)} has {locations.shape[3]}"
        )
    expected = sum(height * width for height, width in spatial_shapes)
    if expected != pixels or any(height < 0 or width < 0 for height, width in spatial_shapes):
        raise ValueError(
            f"spatial_shapes {list(spatial_shapes)} needs {expected} pixels, value {tuple(value.shape)} "
            f"has {pixels}"
        )


def _without_empty_levels(
    spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
) -> tuple[tuple[tuple[int, int], ...], Tensor, Tensor]:
    """Leaves out the levels that have no pixels, so that no implementation meets one."""
    shapes = tuple((int(height), int(width)) for height, width in spatial_shapes)
    filled = [level for level, (height, width) in enumerate(shapes) if height * width]
    if len(filled) == len(shapes):
        return shapes, locations, weights
    return tuple(shapes[level] for level in filled), locations[:, :, :, filled], weights[:, :, :, filled]


def _working_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _grid_sample(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """One ``grid_sample`` a level: simple, exportable, differentiable by PyTorch itself."""
    batch, _, heads, head_dim = value.shape
    queries = locations.shape[1]
    dtype = _working_dtype(value)
    # grid_sample counts from -1 to 1. At -2 and 2 a sample is outside of any level.
    grid = (2 * locations.to(dtype) - 1).nan_to_num(nan=-2.0).clamp(-2, 2)
    grid = grid.transpose(1, 2).flatten(0, 1)
    weights = weights.to(dtype).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    total = value.new_zeros(batch * heads, head_dim, queries, dtype=dtype)
    sizes = [height * width for height, width in spatial_shapes]
    for level, (pixels, (height, width)) in enumerate(zip(value.split(sizes, dim=1), spatial_shapes)):
        image = pixels.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        samples = F.grid_sample(image, grid[:, :, level], padding_mode="zeros", align_corners=False)
        total = total + (samples * weights[:, :, :, level]).sum(-1)
    return total.reshape(batch, heads * head_dim, queries).transpose(1, 2).to(value.dtype)


class _Levels:
    """What the gathered form has to know of the levels, one number for each sample of a query.

    The samples of a query are in the order of the inputs: heads x levels x points.

    Args:
        spatial_shapes: (height, width) of each level, none of them zero.
        heads: Number of heads.
        points: Points a level.
        dtype: Of the arithmetic on coordinates.
    """

    def __init__(self, spatial_shapes: SpatialShapes, heads: int, points: int, dtype: torch.dtype) -> None:
        self.heads = heads
        self.samples = len(spatial_shapes) * points  # of a head
        height, width = torch.tensor(spatial_shapes, dtype=torch.int32).repeat_interleave(points, 0).unbind(1)
        size = torch.stack((width, height)).repeat(1, heads).unsqueeze(1)  # (x and y, 1, heads x samples)
        self.size = size.to(dtype)
        # A sample's two neighbours on an axis are `near` and `near + 1`, both of them pixels of the level.
        self.last_near = (size - 2).clamp(min=0).to(dtype)
        # A level of one pixel has no second neighbour: it is the same pixel, put too far off to weigh.
        self.step = torch.where(size > 1, 1, 3).to(dtype)
        # In the value, seen as (pixels x heads, head_dim), a pixel is `heads` rows and has its head's row.
        starts = [0, *itertools.accumulate(height * width for height, width in spatial_shapes)][:-1]
        start = torch.tensor(starts, dtype=torch.int32).repeat_interleave(points).repeat(heads)
        head = torch.arange(heads, dtype=torch.int32).repeat_interleave(self.samples)
        self.first_row = start * heads + head
        self.rows_down = width.repeat(heads) * heads
        right = torch.where(width > 1, heads, 0)
        below = torch.where(height > 1, width * heads, 0)
        self.corners = torch.stack((right * 0, right, below, below + right)).int()  # (4, samples)

    def place(self, locations: Tensor) -> tuple[Tensor, Tensor]:
        """The near neighbours of samples and how far behind them the samples lie, in pixels.

        Args:
            locations: (queries, heads, levels, points, 2).

        Returns:
            Two tensors (2, queries, heads x samples), x before y. The distance is in [0, 1) between two
            pixels, less or more at the edges of the level, and far enough to weigh nothing outside.
        """
        coordinates = locations.reshape(len(locations), -1, 2).permute(2, 0, 1)
        offset = torch.mul(coordinates, self.size, out=self.size.new_empty(coordinates.shape))
        offset.sub_(0.5).nan_to_num_(nan=-2.0).clamp_(min=-2.0)
        torch.minimum(offset, self.size, out=offset)
        near = offset.floor().clamp_(min=0)
        torch.minimum(near, self.last_near, out=near)
        return near, offset.sub_(near)

    def first_rows(self, near: Tensor) -> Tensor:
        """Rows of the value of the upper left neighbours, (queries, heads, samples), int32."""
        x, y = near.int()
        rows = torch.addcmul(self.first_row, y, self.rows_down).add_(x, alpha=self.heads)
        return rows.view(-1, self.heads, self.samples)

    def rows(self, near: Tensor) -> Tensor:
        """Rows of all neighbours, above left, right, below left, right: (queries, heads, 4, samples)."""
        return self.first_rows(near).unsqueeze(2) + self.corners

    def shares(self, offset: Tensor) -> Tensor:
        """Linear weights on each axis, (x and y, near and far, queries, heads, samples)."""
        shares = offset.new_empty(2, 2, *offset.shape[1:])
        _hat(offset, out=shares[:, 0])
        _hat(offset - self.step, out=shares[:, 1])
        return shares.view(2, 2, -1, self.heads, self.samples)

    def slopes(self, offset: Tensor) -> Tensor:
        """How the shares change with the location, for one level's width or height; shape as shares."""
        before = offset.floor()
        slopes = self.shares(before + 1).sub_(self.shares(before))
        return slopes.mul_(self.size.view(2, 1, 1, self.heads, self.samples))


def _hat(offset: Tensor, out: Tensor) -> Tensor:
    """Linear interpolation's weight of a pixel at this offset: 1 at 0, falling to 0 at -1 and 1."""
    return torch.abs(offset, out=out).neg_().add_(1).clamp_(min=0)


def _corner_weights(x: Tensor, y: Tensor) -> Tensor:
    """Products of the axes' shares, each (2, queries, heads, samples), as (queries, heads, 4, samples)."""
    x, y = (axis.permute(1, 2, 0, 3) for axis in (x, y))
    return (y.unsqueeze(3) * x.unsqueeze(2)).flatten(2, 3)


def _blocks(locations: Tensor, samples: int) -> Iterator[slice]:
    """Queries in blocks of about so many samples; locations (queries, ..., 2)."""
    queries, *rest, _ = locations.shape
    size = max(1, samples // max(1, math.prod(rest)))
    return (slice(start, start + size) for start in range(0, queries, size))


def _rows_product(rows: Tensor, table: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of each bag's vector with the table's rows of the bag.

    Args:
        rows: (bags, rows of a bag), int32.
        table: (all rows, width).
        vectors: (bags, width).

    Returns:
        (bags, rows of a bag).
    """
    _silence_sparse_warning()
    bags, count = rows.shape
    # The products are the entries of the matrix vectors x table^T that a sparse pattern names, one row a bag.
    # A bag may name an entry twice, which is computed twice; but PyTorch takes no pattern with more entries
    # than the matrix, hence the rows of zeros below a small table.
    table = F.pad(table, (0, 0, 0, max(0, count - len(table))))
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, bags * count + 1, count, dtype=torch.int32),
        rows.flatten(),
        table.new_zeros(bags * count),
        size=(bags, len(table)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(pattern, vectors, table.t()).values().view(bags, count)


@cache
def _silence_sparse_warning() -> None:
    """Has PyTorch say once, unheard, that its compressed sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


class _Gather(torch.autograd.Function):
    """The operator as a gather-and-sum of rows of the value."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor
    ) -> Tensor:
        """Shapes as in :func:`deformable_attention`."""
        ctx.save_for_backward(value, locations, weights)
        ctx.spatial_shapes = spatial_shapes
        dtype = _working_dtype(value)
        batch, queries, heads, _, points, _ = locations.shape
        geometry = _Levels(spatial_shapes, heads, points, dtype)
        output = value.new_empty(batch, queries, heads, value.shape[-1])
        for image in range(batch):
            table = value[image].to(dtype).flatten(0, 1)
            for block in _blocks(locations[image], SAMPLES_AT_A_TIME):
                near, offset = geometry.place(locations[image, block])
                x, y = geometry.shares(offset)
                y *= weights[image, block].flatten(2)
                sums = F.embedding_bag(
                    geometry.rows(near).flatten(2).flatten(0, 1),
                    table,
                    per_sample_weights=_corner_weights(x, y).flatten(2).flatten(0, 1),
                    mode="sum",
                )
                output[image, block] = sums.view(-1, heads, table.shape[-1])
        return output.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        """Gradients of value, sampling locations and attention weights, as far as they are asked for."""
        value, locations, weights = ctx.saved_tensors
        of_value, _, *of_samples = ctx.needs_input_grad
        grad = grad.to(_working_dtype(value)).unflatten(-1, (value.shape[2], -1))
        grad_value = grad_locations = grad_weights = None
        if of_value:
            grad_value = _value_gradient(value, ctx.spatial_shapes, locations, weights, grad)
        if any(of_samples):
            grad_locations, grad_weights = _sample_gradients(
                value, ctx.spatial_shapes, locations, weights, grad
            )
        return grad_value, None, grad_locations, grad_weights


def _sample_gradients(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of sampling locations and attention weights; grad is (batch, queries, heads, head_dim)."""
    batch, _, heads, _, points, _ = locations.shape
    geometry = _Levels(spatial_shapes, heads, points, grad.dtype)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    for image in range(batch):
        table = value[image].to(grad.dtype).flatten(0, 1)
        for block in _blocks(locations[image], SAMPLES_AT_A_TIME):
            near, offset = geometry.place(locations[image, block])
            products = _rows_product(
                geometry.rows(near).flatten(2).flatten(0, 1), table, grad[image, block].flatten(0, 1)
            )
            # (below or not, right or not, queries, heads, samples)
            products = products.view(-1, heads, 2, 2, geometry.samples).permute(2, 3, 0, 1, 4)
            x, y = geometry.shares(offset)
            slope_x, slope_y = geometry.slopes(offset)
            along_x = (products * x).sum(1)
            of_weights = grad_weights[image, block]
            of_weights.copy_((along_x * y).sum(0).view_as(of_weights))
            weight = weights[image, block].flatten(2)
            of_locations = grad_locations[image, block]
            grad_x = ((products * slope_x).sum(1) * y).sum(0).mul_(weight)
            grad_y = (along_x * slope_y).sum(0).mul_(weight)
            of_locations[..., 0].copy_(grad_x.view_as(of_weights))
            of_locations[..., 1].copy_(grad_y.view_as(of_weights))
    return grad_locations, grad_weights


def _value_gradient(
    value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of the value; grad is (batch, queries, heads, head_dim).

    The transpose of a gather adds to scattered rows. Sorted by the pixel they add to, the samples of a head
    are again bags of weighted rows, of the incoming gradient, and one sort does for all four neighbours.
    """
    batch, _, heads, _, points, _ = locations.shape
    geometry = _Levels(spatial_shapes, 1, points, grad.dtype)
    pixels = torch.arange(value.shape[1], dtype=torch.int32)
    grad_value = torch.empty_like(value)
    for image, head in itertools.product(range(batch), range(heads)):
        total = grad.new_zeros(value.shape[1], value.shape[3])
        for block in _blocks(locations[image, :, head], SAMPLES_TO_SORT):
            near, offset = geometry.place(locations[image, block, head])
            x, y = geometry.shares(offset)
            y *= weights[image, block, head].flatten(1).unsqueeze(1)
            pixel, order = geometry.first_rows(near).flatten().sort()
            bags = torch.searchsorted(pixel, pixels, out_int32=True)
            queries = order.div(geometry.samples, rounding_mode="floor").int()
            rows = grad[image, block, head].contiguous()
            for below, right in itertools.product(range(2), range(2)):
                corner = (y[below] * x[right]).flatten()[order]
                sums = F.embedding_bag(queries, rows, bags, per_sample_weights=corner, mode="sum")
                _add_shifted(total, sums, spatial_shapes, below, right)
        grad_value[image, :, head] = total
    return grad_value


def _add_shifted(total: Tensor, part: Tensor, spatial_shapes: SpatialShapes, below: int, right: int) -> None:
    """Adds each pixel's row to the pixel so many below and to the right of it; both (pixels, width)."""
    sizes = [height * width for height, width in spatial_shapes]
    for level, part_of_level, (_, width) in zip(total.split(sizes), part.split(sizes), spatial_shapes):
        shift = below * width + right
        level[shift:] += part_of_level[: max(0, len(level) - shift)]
