"""Multi-scale deformable attention: a weighted sum of bilinear samples of feature maps.

Deformable DETR (https://arxiv.org/abs/2010.04159, equation 3; ``ms_deform_attn`` in the original). Each query
looks at a few points of each level in place of all pixels. Three implementations give the same numbers:

- ``gather`` on a CPU: :mod:`detrkit.kernels.deformable_attention_gather`.
- ``triton`` on CUDA: :mod:`detrkit.kernels.deformable_attention_triton`.
- ``grid_sample``: spelt out in plain PyTorch for other devices and for graphs that leave PyTorch.

The first two are one operator to PyTorch, which ``torch.compile`` takes into its graphs as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from detrkit.kernels import deformable_attention_gather as gather
from detrkit.kernels.recording import is_exporting

Implementation = Literal["gather", "triton", "grid_sample"]
SpatialShapes = Sequence[tuple[int, int]]


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
    what is outside the map counts as zero. So does a sample whose location is NaN or infinite, and its
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
    if not _leaves_pytorch():
        _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
        spatial_shapes, sampling_locations, attention_weights = _without_empty_levels(
            spatial_shapes, sampling_locations, attention_weights
        )
    name = implementation or _implementation_for(value.device)
    if name == "grid_sample":
        return _grid_sample(value, spatial_shapes, sampling_locations, attention_weights)
    if name not in ("gather", "triton"):
        raise ValueError(
            f"deformable attention has no implementation {name!r}: gather, triton or grid_sample"
        )
    sizes = [size for shape in spatial_shapes for size in shape]
    return _operator(value, sizes, sampling_locations, attention_weights, name)


def _leaves_pytorch() -> bool:
    """Whether the call is recorded for a graph that other programs read; its sizes may be symbols."""
    return is_exporting() or torch.jit.is_tracing()


def _implementation_for(device: torch.device) -> Implementation:
    if _leaves_pytorch():
        return "grid_sample"
    if device.type == "cpu":
        return "gather"
    return "triton" if device.type == "cuda" and _has_triton() else "grid_sample"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.library.custom_op("detrkit::deformable_attention", mutates_args=())
def _operator(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, implementation: str
) -> Tensor:
    """The public function for levels that all have pixels; sizes is height, width, height, width, ..."""
    if not weights.numel():
        return _empty_result(value, locations).zero_()
    return _module(implementation).forward(value, _pairs(sizes), locations, weights)


@_operator.register_fake
def _(value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, implementation: str) -> Tensor:
    return _empty_result(value, locations)


@torch.library.custom_op("detrkit::deformable_attention_backward", mutates_args=())
def _operator_backward(
    grad: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    implementation: str,
    of_value: bool,
    of_samples: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights; one that is not wanted is a tensor without elements."""
    if weights.numel():
        module = _module(implementation)
        gradients = module.backward(grad, value, _pairs(sizes), locations, weights, of_value, of_samples)
    else:
        gradients = tuple(x.new_zeros(x.shape) for x in (value, locations, weights))
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_operator_backward.register_fake
def _(
    grad: Tensor, value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, *options: object
) -> tuple[Tensor, ...]:
    _, of_value, of_samples = options
    wanted = (of_value, value), (of_samples, locations), (of_samples, weights)
    return tuple(x.new_empty(x.shape) if want else grad.new_empty(0) for want, x in wanted)


def _remember(
    ctx: FunctionCtx, inputs: tuple[Tensor, list[int], Tensor, Tensor, str], output: Tensor
) -> None:
    value, ctx.sizes, locations, weights, ctx.implementation = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    of_value, _, of_locations, of_weights, _ = ctx.needs_input_grad
    options = (ctx.implementation, of_value, of_locations or of_weights)
    gradients = _operator_backward(grad, value, ctx.sizes, locations, weights, *options)
    return (
        gradients[0] if of_value else None,
        None,
        gradients[1] if of_locations else None,
        gradients[2] if of_weights else None,
        None,
    )


_operator.register_autograd(_differentiate, setup_context=_remember)


def _module(implementation: str) -> ModuleType:
    """Where an implementation's ``forward`` and ``backward`` are."""
    if implementation == "gather":
        return gather
    from detrkit.kernels import deformable_attention_triton

    return deformable_attention_triton


def _pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2]))


def _empty_result(value: Tensor, locations: Tensor) -> Tensor:
    return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])


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
) -> tuple[SpatialShapes, Tensor, Tensor]:
    """Leaves out the levels that have no pixels, so that no implementation meets one."""
    filled = [level for level, (height, width) in enumerate(spatial_shapes) if height and width]
    if len(filled) == len(spatial_shapes):
        return spatial_shapes, locations, weights
    shapes = [spatial_shapes[level] for level in filled]
    return shapes, locations[:, :, :, filled], weights[:, :, :, filled]


def _grid_sample(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """One ``grid_sample`` a level: simple, exportable, differentiable by PyTorch itself."""
    batch, _, heads, head_dim = value.shape
    queries = locations.shape[1]
    dtype = gather.working_dtype(value)
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
