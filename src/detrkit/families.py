"""The one table of model families: which classes serve a ``model_type``. A new family adds an entry."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from detrkit.common.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Family:
    """The classes of one model family, by name so that the table can be read without importing torch.

    Attributes:
        package: Package with the modules ``configuration_*``, ``modeling_*`` and ``image_processing_*``.
        config: Name of the configuration class.
        models: Name of a Transformers auto class -> name of the model class that it gives.
        detector: Name of the model class that finds boxes.
        processor: Name of the image processor class.
        segmenter: Name of the model class that finds boxes and masks, where the family has one.
        processor_aliases: Other class names that ``preprocessor_config.json`` files on the Hub carry.
    """

    package: str
    config: str
    models: dict[str, str]
    detector: str
    processor: str
    segmenter: str | None = None
    processor_aliases: tuple[str, ...] = ()

    @property
    def class_prefix(self) -> str:
        """What the names of the family's classes begin with, such as "Detr"."""
        return self.config.removesuffix("Config")

    def load(self, name: str) -> Any:
        """The class called ``name``, from whichever module of the family defines it."""
        suffix = self.package.rpartition(".")[2]
        if name == self.config:
            module = f"configuration_{suffix}"
        elif name == self.processor or name in self.processor_aliases:
            module = f"image_processing_{suffix}"
        else:
            module = f"modeling_{suffix}"
        return getattr(importlib.import_module(f"{self.package}.{module}"), name)


#: ``model_type`` of a config.json -> the classes that serve it.
FAMILIES: dict[str, Family] = {
    "detr": Family(
        package="detrkit.models.detr",
        config="DetrConfig",
        models={
            "AutoModel": "DetrModel",
            "AutoModelForObjectDetection": "DetrForObjectDetection",
            "AutoModelForImageSegmentation": "DetrForSegmentation",
        },
        detector="DetrForObjectDetection",
        segmenter="DetrForSegmentation",
        processor="DetrImageProcessor",
        processor_aliases=("DetrImageProcessorFast", "DetrImageProcessorPil", "DetrFeatureExtractor"),
    ),
    "conditional_detr": Family(
        package="detrkit.models.conditional_detr",
        config="ConditionalDetrConfig",
        models={
            "AutoModel": "ConditionalDetrModel",
            "AutoModelForObjectDetection": "ConditionalDetrForObjectDetection",
            "AutoModelForImageSegmentation": "ConditionalDetrForSegmentation",
        },
        detector="ConditionalDetrForObjectDetection",
        segmenter="ConditionalDetrForSegmentation",
        processor="ConditionalDetrImageProcessor",
        processor_aliases=(
            "ConditionalDetrImageProcessorFast",
            "ConditionalDetrImageProcessorPil",
            "ConditionalDetrFeatureExtractor",
        ),
    ),
    "deformable_detr": Family(
        package="detrkit.models.deformable_detr",
        config="DeformableDetrConfig",
        models={
            "AutoModel": "DeformableDetrModel",
            "AutoModelForObjectDetection": "DeformableDetrForObjectDetection",
        },
        detector="DeformableDetrForObjectDetection",
        processor="DeformableDetrImageProcessor",
        processor_aliases=(
            "DeformableDetrImageProcessorFast",
            "DeformableDetrImageProcessorPil",
            "DeformableDetrFeatureExtractor",
        ),
    ),
}


def family_of(model_type: str | None, where: str) -> Family:
    """The family that serves a ``model_type``.

    Args:
        model_type: What a config.json says.
        where: The model's name, for the message.

    Raises:
        CheckpointError: No family of detrkit does.
    """
    family = FAMILIES.get(model_type or "")
    if family is None:
        said = f"is a {model_type!r} model" if model_type else "has no model_type in its config.json"
        raise CheckpointError(f"{where} {said}; this version of detrkit loads: {', '.join(FAMILIES)}")
    return family
