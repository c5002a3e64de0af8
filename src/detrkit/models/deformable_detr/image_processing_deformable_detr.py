"""Deformable DETR's image processor under every name that files and model cards call it by."""

from __future__ import annotations

from detrkit.processing.sigmoid_processor import SigmoidImageProcessorBase


class DeformableDetrImageProcessor(SigmoidImageProcessorBase):
    """Image processor of Deformable DETR; options are those of ``DetrImageProcessorBase``."""

    _json_class_name = "DeformableDetrImageProcessor"


class DeformableDetrFeatureExtractor(DeformableDetrImageProcessor):
    """The name that Transformers used before version 4.26; model cards still call it."""


class DeformableDetrImageProcessorFast(DeformableDetrImageProcessor):
    """The name that preprocessor_config.json files of later versions carry."""


class DeformableDetrImageProcessorPil(DeformableDetrImageProcessor):
    """The name that preprocessor_config.json files of version 5 may carry."""
