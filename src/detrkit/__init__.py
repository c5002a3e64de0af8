"""DETR, Conditional DETR and Deformable DETR with the original implementations' numbers.

Names are imported on first use, so that ``import detrkit`` stays light and does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Public name -> module that defines it.
_EXPORTS = {
    "DetrConfig": "detrkit.models.detr.configuration_detr",
    "DetrModel": "detrkit.models.detr.modeling_detr",
    "DetrForObjectDetection": "detrkit.models.detr.modeling_detr",
    "DetrForSegmentation": "detrkit.models.detr.modeling_detr",
    "DetrImageProcessor": "detrkit.models.detr.image_processing_detr",
    "DetrFeatureExtractor": "detrkit.models.detr.image_processing_detr",
    "ConditionalDetrConfig": "detrkit.models.conditional_detr.configuration_conditional_detr",
    "ConditionalDetrModel": "detrkit.models.conditional_detr.modeling_conditional_detr",
    "ConditionalDetrForObjectDetection": "detrkit.models.conditional_detr.modeling_conditional_detr",
    "ConditionalDetrForSegmentation": "detrkit.models.conditional_detr.modeling_conditional_detr",
    "ConditionalDetrImageProcessor": "detrkit.models.conditional_detr.image_processing_conditional_detr",
    "ConditionalDetrFeatureExtractor": "detrkit.models.conditional_detr.image_processing_conditional_detr",
    "DeformableDetrConfig": "detrkit.models.deformable_detr.configuration_deformable_detr",
    "DeformableDetrModel": "detrkit.models.deformable_detr.modeling_deformable_detr",
    "DeformableDetrForObjectDetection": "detrkit.models.deformable_detr.modeling_deformable_detr",
    "DeformableDetrImageProcessor": "detrkit.models.deformable_detr.image_processing_deformable_detr",
    "DeformableDetrFeatureExtractor": "detrkit.models.deformable_detr.image_processing_deformable_detr",
    "Detections": "detrkit.detections",
    "Detector": "detrkit.detector",
    "PanopticSegmentation": "detrkit.panoptic",
    "id_to_rgb": "detrkit.processing.panoptic_png",
    "pipeline": "detrkit.integration",
    "push_to_hub": "detrkit.hub",
    "register": "detrkit.integration",
    "rgb_to_id": "detrkit.processing.panoptic_png",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from detrkit.detections import Detections as Detections
    from detrkit.detector import Detector as Detector
    from detrkit.hub import push_to_hub as push_to_hub
    from detrkit.integration import pipeline as pipeline
    from detrkit.integration import register as register
    from detrkit.models.conditional_detr.configuration_conditional_detr import (
        ConditionalDetrConfig as ConditionalDetrConfig,
    )
    from detrkit.models.conditional_detr.image_processing_conditional_detr import (
        ConditionalDetrFeatureExtractor as ConditionalDetrFeatureExtractor,
    )
    from detrkit.models.conditional_detr.image_processing_conditional_detr import (
        ConditionalDetrImageProcessor as ConditionalDetrImageProcessor,
    )
    from detrkit.models.conditional_detr.modeling_conditional_detr import (
        ConditionalDetrForObjectDetection as ConditionalDetrForObjectDetection,
    )
    from detrkit.models.conditional_detr.modeling_conditional_detr import (
        ConditionalDetrForSegmentation as ConditionalDetrForSegmentation,
    )
    from detrkit.models.conditional_detr.modeling_conditional_detr import (
        ConditionalDetrModel as ConditionalDetrModel,
    )
    from detrkit.models.deformable_detr.configuration_deformable_detr import (
        DeformableDetrConfig as DeformableDetrConfig,
    )
    from detrkit.models.deformable_detr.image_processing_deformable_detr import (
        DeformableDetrFeatureExtractor as DeformableDetrFeatureExtractor,
    )
    from detrkit.models.deformable_detr.image_processing_deformable_detr import (
        DeformableDetrImageProcessor as DeformableDetrImageProcessor,
    )
    from detrkit.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrForObjectDetection as DeformableDetrForObjectDetection,
    )
    from detrkit.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrModel as DeformableDetrModel,
    )
    from detrkit.models.detr.configuration_detr import DetrConfig as DetrConfig
    from detrkit.models.detr.image_processing_detr import DetrFeatureExtractor as DetrFeatureExtractor
    from detrkit.models.detr.image_processing_detr import DetrImageProcessor as DetrImageProcessor
    from detrkit.models.detr.modeling_detr import DetrForObjectDetection as DetrForObjectDetection
    from detrkit.models.detr.modeling_detr import DetrForSegmentation as DetrForSegmentation
    from detrkit.models.detr.modeling_detr import DetrModel as DetrModel
    from detrkit.panoptic import PanopticSegmentation as PanopticSegmentation
    from detrkit.processing.panoptic_png import id_to_rgb as id_to_rgb
    from detrkit.processing.panoptic_png import rgb_to_id as rgb_to_id


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'detrkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
