"""Models through ``torch.compile``: the eager engine's numbers from code generated for this machine.

Sizes are dynamic, so a model is compiled once for images without padding and once for padded batches, each
at its first call.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from detrkit.engines.torch_engine import prepare


def compile_model(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Prepares a model for inference and has it compiled at its first call, in place.

    Args:
        model: A detrkit model.
        device: Where to run.
        dtype: Type of the weights.

    Returns:
        ``model`` itself.
    """
    prepare(model, device, dtype, fuse=False)
    model.compile(dynamic=True, fullgraph=True, options={"freezing": device.type == "cpu"})
    return model
