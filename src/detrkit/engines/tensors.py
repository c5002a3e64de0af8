"""An exported model's arrays as the outputs of a model of detrkit, for callers that have tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from detrkit.models.outputs import ObjectDetectionOutput, SegmentationOutput


def as_output(found: Mapping[str, np.ndarray]) -> ObjectDetectionOutput | SegmentationOutput:
    """Outputs by name as the object that a model returns."""
    tensors = {name: torch.from_numpy(value) for name, value in found.items()}
    output_class = SegmentationOutput if "pred_masks" in tensors else ObjectDetectionOutput
    return output_class(**tensors)
