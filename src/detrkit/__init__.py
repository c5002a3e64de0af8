"""DETR, Conditional DETR, Deformable DETR and Table Transformer with the original implementations' numbers.

Names are imported on first use, so that ``import detrkit`` stays light and does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

__version__ = "0.2.0"

if TYPE_CHECKING:
    from detrkit.common.limits import ImageLimits as ImageLimits
    from detrkit.hub.upload import push_to_hub as push_to_hub
    from detrkit.inference.detector import Detector as Detector
    from detrkit.integration import pipeline as pipeline
    from detrkit.integration import prepare as prepare
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
    from detrkit.models.table_transformer.configuration_table_transformer import (
        TableTransformerConfig as TableTransformerConfig,
    )
    from detrkit.models.table_transformer.modeling_table_transformer import (
        TableTransformerForObjectDetection as TableTransformerForObjectDetection,
    )
    from detrkit.models.table_transformer.modeling_table_transformer import (
        TableTransformerModel as TableTransformerModel,
    )
    from detrkit.processing.panoptic_png import id_to_rgb as id_to_rgb
    from detrkit.processing.panoptic_png import rgb_to_id as rgb_to_id
    from detrkit.results.detection_config import DetectionConfig as DetectionConfig
    from detrkit.results.detections import Detections as Detections
    from detrkit.results.panoptic import PanopticSegmentation as PanopticSegmentation
else:
    _names, __getattr__, __dir__ = lazy_names(__name__)
    __all__ = ["__version__", *_names]
