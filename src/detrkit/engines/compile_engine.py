"""Models through ``torch.compile``: the eager engine's numbers from code generated for this machine.

A detector is one graph without breaks. Sizes are free in it, so it is compiled once for images without
padding and once for padded batches, each at its first call: half a minute to a minute on two cores. Of a
model with masks only backbone, encoder and decoder are compiled, as the number of masks depends on the image.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from detrkit.engines.cuda_graphs import replay_recurring
from detrkit.engines.torch_engine import parts_of_fixed_shapes, prepare


def compile_model(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Prepares a model for inference and has it compiled at its first call, in place; returns it."""
    prepare(model, device, dtype, fuse=False)
    compile_parts(model)
    return model


def compile_parts(model: PreTrainedModel) -> None:
    """Has what can be compiled of a prepared model compiled at its first call, in place."""
    for part in parts_of_fixed_shapes(model):
        if model.device.type == "cuda":
            replay_recurring(part, torch.compile(part.forward, dynamic=True, fullgraph=True))
        else:
            # Frozen weights are reordered for oneDNN; elsewhere there is nothing to gain by it. PyTorch 2.14
            # fails to reorder them around a pooling that rounds free sizes up.
            rounds_up = any(getattr(module, "ceil_mode", False) for module in part.modules())
            freezing = model.device.type == "cpu" and not rounds_up
            part.compile(dynamic=True, fullgraph=True, options={"freezing": freezing})
