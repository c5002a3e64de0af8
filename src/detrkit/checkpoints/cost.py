"""What a model costs: parameters, multiply-adds of one image, bytes of its file. Nothing is computed for it.

A model is built on PyTorch's "meta" device, which knows shapes but holds no numbers, so counting the largest
of these models takes a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from detrkit.models.base import DetrFamilyPreTrainedModel

CARD_SIZE = (800, 1066)
"""Height and width in pixels at which cards state a cost: a photo of 3:4 as these models are used to it."""

# A bilinear sample mixes four numbers and is then weighted by the attention.
_OPERATIONS_OF_A_SAMPLE = 5
_SAMPLING = torch.ops.aten.grid_sampler_2d


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The size of a model and the work it does for one image of a height and width in pixels.

    Attributes:
        parameters: Number of parameters, shared ones counted once; statistics of batch norm are none.
        macs: Multiply-adds of one image in convolutions, linear layers and attention.
        sampling_macs: Multiply-adds of deformable attention's samples, which are not among ``macs``: four for
            a bilinear sample, one for its weight, for each channel of a head.
        bytes: Size of the tensors in a float32 file, which repeats some under second names.
    """

    parameters: int
    macs: int
    sampling_macs: int
    bytes: int
    height: int
    width: int


def count_cost(
    model_class: type[DetrFamilyPreTrainedModel], config: Any, size: tuple[int, int] = CARD_SIZE
) -> Cost:
    """Counts the cost of a model, with its heads, as it is trained: nothing fused, no work left out.

    A model with masks computes one for every query. ``size`` is height and width of the image in pixels.
    """
    height, width = size
    # Modules that are built on this device without numbers run where the numbers would have been.
    with torch.device("meta"):
        model = model_class(config).eval().requires_grad_(False)
        image = torch.empty(1, config.num_channels, height, width)
    counter = FlopCounterMode(display=False, custom_mapping={_SAMPLING: _flops_of_sampling})
    with counter:
        model(image)
    by_operation = counter.get_flop_counts()["Global"]
    sampling = by_operation.get(_SAMPLING, 0)
    own = (*model.parameters(), *model.buffers())  # a shared tensor is named once here
    state = model.state_dict()
    repeated = [state[first] for first in model.second_names(state).values()]
    return Cost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=(counter.get_total_flops() - sampling) // 2,
        sampling_macs=sampling // 2,
        bytes=sum(tensor.numel() * 4 for tensor in (*own, *repeated)),
        height=height,
        width=width,
    )


def _flops_of_sampling(image: Any, grid: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Two a multiply-add, as PyTorch counts; of (batch x heads, channels, ...) and (..., points, 2)."""
    return 2 * _OPERATIONS_OF_A_SAMPLE * math.prod(grid[:3]) * image[1]
