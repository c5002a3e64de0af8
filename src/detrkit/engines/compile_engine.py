"""Models through ``torch.compile``: the eager engine's numbers from code generated for this machine.

A detector is one graph without breaks. Sizes are free in it, so it is compiled once for images without
padding and once for padded batches, each at its first call: half a minute to a minute on two cores. Of a
model with masks only backbone, encoder and decoder are compiled, as the number of masks depends on the image.

Thin images, whose coarsest features are one pixel wide or high, would each need another compilation. They run
eagerly instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from transformers import PreTrainedModel

from detrkit.engines.cuda_graphs import replay_recurring
from detrkit.engines.torch_engine import parts_of_fixed_shapes, prepare

# The stride of a backbone's coarsest features, and how many levels of features it gives.
_STRIDE, _LEVELS = 32, 3


def compile_model(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Prepares a model for inference and has it compiled at its first call, in place; returns it."""
    prepare(model, device, dtype, fuse=False)
    compile_parts(model)
    return model


def compile_parts(model: PreTrainedModel) -> None:
    """Has what can be compiled of a prepared model compiled at its first call, in place."""
    stride = _STRIDE << max(0, getattr(model.config, "num_feature_levels", 1) - _LEVELS)
    for part in parts_of_fixed_shapes(model):
        if model.device.type == "cuda":
            replay_recurring(part, torch.compile(part.forward, dynamic=True, fullgraph=True))
        else:
            # Frozen weights are reordered for oneDNN; elsewhere there is nothing to gain by it. PyTorch 2.14
            # fails to reorder them around a pooling that rounds free sizes up.
            rounds_up = any(getattr(module, "ceil_mode", False) for module in part.modules())
            freezing = model.device.type == "cpu" and not rounds_up
            part.compile(dynamic=True, fullgraph=True, options={"freezing": freezing})
            _run_thin_images_eagerly(part, stride)


def _run_thin_images_eagerly(part: nn.Module, stride: int) -> None:
    """Makes a compiled module run eagerly for images no longer than ``stride`` pixels on one side."""
    compiled = part._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        images = kwargs.get("pixel_values", args[0] if args else None)
        if isinstance(images, torch.Tensor) and images.ndim == 4 and min(images.shape[-2:]) <= stride:
            return part._call_impl(*args, **kwargs)
        try:
            return compiled(*args, **kwargs)
        except FailOnRecompileLimitHit:  # a backbone with another stride
            return part._call_impl(*args, **kwargs)

    part._compiled_call_impl = call
