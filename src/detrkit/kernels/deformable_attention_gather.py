"""Deformable attention on a CPU: a gather-and-sum of rows.

A bilinear sample is the weighted sum of four pixels, so a query's result in one head is a weighted sum of
4 x levels x points rows of the value: what ``embedding_bag`` computes without storing the rows. Everything
here goes image by image, and in blocks of queries that bound the memory whatever the number of queries.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from detrkit.common.quiet import no_warnings

# Samples (queries x heads x levels x points) in work at a time: enough to be worth the calls, few enough to
# stay in the caches. Coordinates, four indices and four weights take about 80 bytes a sample forward and 200
# backward: 10 and 26 MB in all. Backward, sums over all pixels of a head come to it.
SAMPLES_FORWARD = 1 << 17
SAMPLES_BACKWARD = 1 << 17
# Corners of samples for each pixel and head, below which they are sorted one by one; see _scatter.
_FEW_BESIDE_PIXELS = 2


def forward(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """The public function, for levels that all have pixels."""
    dtype = working_dtype(value)
    batch, queries, heads, _, points, _ = locations.shape
    geometry = _Levels(spatial_shapes, heads, points, dtype)
    output = value.new_empty(batch, queries, heads, value.shape[-1])
    for image in range(batch):
        table = value[image].to(dtype).flatten(0, 1)
        for block in _blocks(locations[image], SAMPLES_FORWARD):
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


def backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, sampling locations and attention weights, as far as they are asked for.

    ``grad`` is that of the result, (batch, queries, heads x head_dim); the next four are the forward pass's.

    Goes head by head: writing to pixels costs a pass over all of them, so a head's samples should come at
    once, and one head's pixels stay in the caches.
    """
    dtype = working_dtype(value)
    batch, queries, heads, levels, points, _ = locations.shape
    # The gradient of a sum comes expanded, and each block would spread it out again.
    grad = grad.to(dtype).contiguous().unflatten(-1, (heads, -1))
    grad_value = value.new_empty(value.shape) if of_value else None
    of_both = tuple(x.new_empty(x.shape) for x in (locations, weights)) if of_samples else None
    # Few samples come with several heads at once, as long as the four sums over all pixels stay small too.
    a_head = max(queries * levels * points, 4 * value.shape[1])
    together = min(heads, max(1, SAMPLES_BACKWARD // a_head))
    for image, first in itertools.product(range(batch), range(0, heads, together)):
        some = slice(first, min(first + together, heads))
        geometry = _Levels(spatial_shapes, some.stop - some.start, points, dtype)
        table = value[image, :, some].to(dtype).flatten(0, 1)
        total: Tensor | None = None
        for block in _blocks(locations[image, :, some], SAMPLES_BACKWARD):
            here = image, block, some
            near, offset = geometry.place(locations[here])
            x, y = geometry.shares(offset)
            incoming = grad[here].flatten(0, 1)
            if of_both:
                products = _rows_product(geometry.rows(near).flatten(2).flatten(0, 1), table, incoming)
                _sample_gradients(
                    products,
                    x,
                    y,
                    geometry.slopes(offset),
                    weights[here].flatten(2),
                    out=tuple(of_one[here] for of_one in of_both),
                )
            if of_value:
                y *= weights[here].flatten(2)
                part = _scatter(geometry, near, _corner_weights(x, y), incoming)
                total = part if total is None else total.add_(part)
        if grad_value is not None:
            grad_value[image, :, some] = 0 if total is None else total.unflatten(0, (-1, geometry.heads))
    return grad_value, *(of_both or (None, None))


def working_dtype(value: Tensor) -> torch.dtype:
    """That of coordinates, weights and sums: fp32 also for half precision, which has too few digits."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


class _Levels:
    """What the gathered form has to know of the levels, one number for each sample of a query.

    The samples of a query are in the order of the inputs: heads x levels x points. No level is empty, and
    coordinates have the type ``dtype``.
    """

    def __init__(
        self, spatial_shapes: Sequence[tuple[int, int]], heads: int, points: int, dtype: torch.dtype
    ) -> None:
        self.spatial_shapes = spatial_shapes
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
        self.value_rows = heads * sum(height * width for height, width in spatial_shapes)
        self.corners = torch.stack((right * 0, right, below, below + right)).int()  # (4, samples)

    def place(self, locations: Tensor) -> tuple[Tensor, Tensor]:
        """The near neighbours of samples and how far behind them the samples lie, in pixels.

        Both are (2, queries, heads x samples), x before y. The distance is in [0, 1) between two pixels, less
        or more at the edges of the level, and far enough to weigh nothing outside.
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

    def neighbours(self, corner: int) -> Iterator[tuple[slice, slice]]:
        """For each level the rows of its pixels, and the rows of these pixels' neighbours at a corner."""
        start = 0
        for height, width in self.spatial_shapes:
            stop = start + height * width * self.heads
            shift = min((corner // 2 * width + corner % 2) * self.heads, stop - start)
            yield slice(start, stop - shift), slice(start + shift, stop)
            start = stop


def _hat(offset: Tensor, out: Tensor) -> Tensor:
    """Linear interpolation's weight of a pixel at this offset: 1 at 0, falling to 0 at -1 and 1."""
    return torch.abs(offset, out=out).neg_().add_(1).clamp_(min=0)


def _corner_weights(x: Tensor, y: Tensor) -> Tensor:
    """Products of the axes' shares, each (2, queries, heads, samples), as (queries, heads, 4, samples)."""
    x, y = (axis.permute(1, 2, 0, 3) for axis in (x, y))
    queries, heads, _, samples = x.shape
    weights = x.new_empty(queries, heads, 2, 2, samples)
    return torch.mul(y.unsqueeze(3), x.unsqueeze(2), out=weights).flatten(2, 3)


def _blocks(locations: Tensor, samples: int) -> Iterator[slice]:
    """Queries in blocks of about so many samples; locations (queries, ..., 2)."""
    queries, *rest, _ = locations.shape
    size = max(1, samples // max(1, math.prod(rest)))
    return (slice(start, start + size) for start in range(0, queries, size))


def _rows_product(rows: Tensor, table: Tensor, vectors: Tensor) -> Tensor:
    """Inner products of each bag's vector (bags, width) with the bag's rows of the table, (bags, rows)."""
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
    torch.sparse.sampled_addmm(pattern, vectors, table.t(), out=pattern)
    return pattern.values().view(bags, count)


@cache
def _silence_sparse_warning() -> None:
    """Has PyTorch say once, unheard, that its compressed sparse tensors are in beta."""
    with no_warnings():
        torch.eye(1).to_sparse_csr()


def _sample_gradients(
    products: Tensor, x: Tensor, y: Tensor, slopes: Tensor, weights: Tensor, out: tuple[Tensor, ...]
) -> None:
    """Writes the gradients of sampling locations and attention weights.

    ``products`` are those of the incoming gradient with the samples' four neighbours, (queries x heads,
    4 x samples); ``x`` and ``y`` the shares of the near and the far ones on these axes, and ``slopes`` how
    the shares change with the location.
    """
    of_locations, of_weights = out
    slope_x, slope_y = slopes
    upper_left, upper_right, lower_left, lower_right = products.view(*weights.shape[:2], 4, -1).unbind(2)
    rows = _sum_of_two(upper_left, upper_right, x), _sum_of_two(lower_left, lower_right, x)
    along_x = _sum_of_two(upper_left, upper_right, slope_x), _sum_of_two(lower_left, lower_right, slope_x)
    of_weights.copy_(_sum_of_two(*rows, y).view_as(of_weights))
    of_locations[..., 0] = _sum_of_two(*along_x, y).mul_(weights).view_as(of_weights)
    of_locations[..., 1] = _sum_of_two(*rows, slope_y).mul_(weights).view_as(of_weights)


def _sum_of_two(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """The two weighted by ``weights[0]`` and ``weights[1]``."""
    return torch.mul(first, weights[0]).addcmul_(second, weights[1])


def _scatter(geometry: _Levels, near: Tensor, corner_weights: Tensor, grad: Tensor) -> Tensor:
    """Sums the gradient of a block of queries over the rows that their samples came from.

    The transpose of a gather adds to scattered rows. Sorted by the row they add to, the samples are again
    bags of weighted rows, of the incoming gradient. One sort can do for all four neighbours, whose sums are
    then shifted into place; where samples are few beside pixels, sorting four times as many is cheaper than
    four passes over all pixels. Corner weights are (queries, heads, 4, samples), ``grad`` is (queries x
    heads, head_dim) and the result (pixels x heads, head_dim).
    """
    if corner_weights.numel() < _FEW_BESIDE_PIXELS * geometry.value_rows:
        rows = geometry.rows(near)
        return _sum_rows(rows.flatten(), 4 * geometry.samples, [corner_weights], grad, geometry.value_rows)[0]
    first = geometry.first_rows(near).flatten()
    parts = _sum_rows(first, geometry.samples, corner_weights.unbind(2), grad, geometry.value_rows)
    total = parts[0]
    for corner, part in enumerate(parts[1:], start=1):
        for pixels, neighbours in geometry.neighbours(corner):
            total[neighbours] += part[pixels]
    return total


def _sum_rows(row: Tensor, together: int, weights: Sequence[Tensor], grad: Tensor, rows: int) -> list[Tensor]:
    """Weighted sums of gradients over the row that each entry adds to, (rows, head_dim) a set of weights.

    ``together`` consecutive entries share a row of ``grad``.
    """
    row, order = row.sort()
    counts = torch.bincount(row, minlength=rows)
    starts = (counts.cumsum(0) - counts).int()
    sources = order.div(together, rounding_mode="floor").int()
    return [
        F.embedding_bag(sources, grad, starts, per_sample_weights=some.flatten()[order], mode="sum")
        for some in weights
    ]
