"""DETR's image processor under every name that files and model cards call it by."""

from __future__ import annotations

from detrkit.processing.image_processor import DetrImageProcessorBase


class DetrImageProcessor(DetrImageProcessorBase):
    """Image processor of DETR; see :class:`~detrkit.processing.image_processor.DetrImageProcessorBase`."""


class DetrFeatureExtractor(DetrImageProcessor):
    """The name that Transformers used before version 4.26; model cards still call it."""


class DetrImageProcessorFast(DetrImageProcessor):
    """The name that preprocessor_config.json files of later versions carry."""


class DetrImageProcessorPil(DetrImageProcessor):
    """The name that preprocessor_config.json files of version 5 may carry."""
