"""detrkit's classes behind the Transformers names: auto classes and pipelines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from detrkit.families import FAMILIES


def register() -> None:
    """Makes the Transformers auto classes and pipelines give detrkit's classes.

    After this call ``AutoConfig``, every ``AutoModel...``, ``AutoImageProcessor``, ``AutoFeatureExtractor``
    and ``transformers.pipeline`` use detrkit for every family in ``FAMILIES``. It lasts until the process
    ends; calling it again changes nothing.
    """
    import transformers

    for model_type, family in FAMILIES.items():
        config = family.load(family.config)
        transformers.AutoConfig.register(model_type, config, exist_ok=True)
        for name in family.models:
            for mapping in _mappings_of(name.removeprefix(family.class_prefix)):
                mapping.register(config, family.load(name), exist_ok=True)
        processor = family.load(family.processor)
        # A backend that is left out would be filled with the class of Transformers. The aliases are found by
        # their class names, which old preprocessor configs carry; the keys just have to be distinct.
        backends = {"pil": processor, "torchvision": processor}
        aliases = {name: family.load(name) for name in family.processor_aliases}
        transformers.AutoImageProcessor.register(
            config, image_processor_classes=backends | aliases, exist_ok=True
        )
        extractor = next(cls for name, cls in aliases.items() if name.endswith("FeatureExtractor"))
        transformers.AutoFeatureExtractor.register(config, extractor, exist_ok=True)


def _mappings_of(role: str) -> list[Any]:
    """Transformers' mappings from configurations to models in which a family has its class of this role.

    A role is what a model class is called after its family's prefix, such as "ForObjectDetection". A mapping
    that has it for one family gets it for all: a class left out there would silently be Transformers' own.
    """
    from transformers.models.auto import modeling_auto

    wanted = {model_type: family.class_prefix + role for model_type, family in FAMILIES.items()}

    def has_role(classes: Mapping[str, str | tuple[str, ...]]) -> bool:
        names = ((name, classes.get(model_type, ())) for model_type, name in wanted.items())
        return any(name == found or (not isinstance(found, str) and name in found) for name, found in names)

    return [
        getattr(modeling_auto, table.removesuffix("_NAMES"))
        for table, classes in vars(modeling_auto).items()
        if table.startswith("MODEL_") and table.endswith("MAPPING_NAMES") and has_role(classes)
    ]


def pipeline(task: str | None = None, model: Any = None, **kwargs: Any) -> Any:
    """``transformers.pipeline`` with detrkit's models and image processors.

    Args:
        task: Such as "object-detection".
        model: A Hub id, a folder, a short name of the registry ("detr-resnet-50"), or a model.
        **kwargs: Passed on to ``transformers.pipeline``.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: ``model`` is a name that is neither a folder, a Hub id nor in the registry.

    Example:
        ```python
        import detrkit

        detect = detrkit.pipeline("object-detection", model="facebook/detr-resnet-101")
        detect("photo.jpg")  # [{"score": 0.998, "label": "cat", "box": {"xmin": 344, ...}}, ...]
        ```
    """
    import transformers

    from detrkit.checkpoints.registry import resolve_model

    if isinstance(model, (str, os.PathLike)):
        model = resolve_model(os.fspath(model))
    register()
    return transformers.pipeline(task, model=model, **kwargs)
