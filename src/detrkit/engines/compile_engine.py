"""Models through ``torch.compile``: the eager engine's numbers from code generated for this machine.

A detector is one graph without breaks. Sizes are free in it, so it is compiled once for images without
padding and once for padded batches, each at its first call: half a minute to a minute on two cores. Of a
model with masks only backbone, encoder and decoder are compiled, as the number of masks depends on the image;
of Deformable DETR only the backbone, as PyTorch's compiler does not take the whole with free sizes.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from detrkit.engines import fused
from detrkit.engines.torch_engine import prepare
from detrkit.models.deformable_detr.modeling_deformable_detr import DeformableDetrPreTrainedModel
from detrkit.models.layers.backbone import ConvEncoder
from detrkit.models.segmentation import SegmentationModel


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
    parts = [model]
    if isinstance(model, DeformableDetrPreTrainedModel):
        parts = [module for module in model.modules() if isinstance(module, ConvEncoder)]
        if model.device.type == "cpu" and model.dtype == torch.float32 and fused.available():
            fused.fuse_transformer(model)
    elif isinstance(model, SegmentationModel):
        base = model.detector.model
        parts = [base.backbone.conv_encoder, base.encoder, base.decoder]
    for part in parts:
        # Frozen weights are reordered for oneDNN; elsewhere there is nothing to gain by it.
        part.compile(dynamic=True, fullgraph=True, options={"freezing": device.type == "cpu"})
    return model
