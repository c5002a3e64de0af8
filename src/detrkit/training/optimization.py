"""Parameter groups, learning rate and the average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

SAMPLING_FACTOR = 0.1
"""Learning rate of sampling offsets and reference points, relative to the others (``lr_linear_proj_mult`` of
``main.py`` in fundamentalvision/Deformable-DETR)."""

_BACKBONE = "conv_encoder."
_SAMPLING = ("sampling_offsets.", "reference_points.")
# 40 of 50 epochs in Deformable DETR, 200 of 300 in DETR's short schedule, about.
_STEP_AT, _STEP_FACTOR = 0.8, 0.1


class ParameterGroup(TypedDict):
    """Parameters that share a learning rate, for an optimizer."""

    name: str
    params: list[nn.Parameter]
    lr: float


def parameter_groups(
    model: nn.Module, learning_rate: float, backbone_learning_rate: float
) -> list[ParameterGroup]:
    """The trained parameters in groups with a learning rate each.

    Returns:
        Groups for an optimizer, each with ``name``, ``params`` and ``lr``: "backbone", "sampling" (sampling
        offsets and reference points, a tenth of the rate) and "transformer", which includes the heads. Empty
        groups are left out.
    """
    rates = {
        "transformer": learning_rate,
        "backbone": backbone_learning_rate,
        "sampling": learning_rate * SAMPLING_FACTOR,
    }
    groups: dict[str, ParameterGroup] = {
        name: {"name": name, "params": [], "lr": rate} for name, rate in rates.items()
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _BACKBONE in name:
            kind = "backbone"
        elif any(part in name for part in _SAMPLING):
            kind = "sampling"
        else:
            kind = "transformer"
        groups[kind]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def learning_rate_factor(schedule: str, steps: int, warmup_steps: int) -> Callable[[int], float]:
    """The factor of the learning rates at each step, counted from 0.

    Args:
        schedule: "cosine", "step" or "constant".
        steps: Number of steps in the run.
        warmup_steps: Number of steps during which the factor rises linearly.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        if schedule == "step":
            return 1.0 if step < _STEP_AT * steps else _STEP_FACTOR
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


class AveragedWeights(AveragedModel):
    """A copy of a model whose weights and batch norm statistics are a moving average of the model's.

    The decay starts lower, so that the random initial weights lose their influence quickly: after ``n``
    updates it is (1 + n) / (10 + n), as long as that is below ``decay``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        def blend(averages: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            if not averages[0].is_floating_point():  # counters
                for average, value in zip(averages, current):
                    average.copy_(value)
                return
            torch._foreach_lerp_(averages, current, 1 - decay_after(int(updates), decay))

        super().__init__(model, multi_avg_fn=torch.no_grad()(blend), use_buffers=True)
        self.module.eval().requires_grad_(False)


def decay_after(updates: int, decay: float) -> float:
    """The decay of the average after a number of updates."""
    return min(decay, (1 + updates) / (10 + updates))
