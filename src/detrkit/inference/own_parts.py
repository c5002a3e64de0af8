"""The model and image processor that a user brings, checked and made to fit each other."""

from __future__ import annotations

from typing import Any

from detrkit.common.errors import SettingError
from detrkit.families import family_of
from detrkit.processing.array_processor import ArrayImageProcessor

# What Transformers calls its image processors for these families: Fast and Pil may follow.
_FOREIGN = ("DetrImageProcessor", "ConditionalDetrImageProcessor", "DeformableDetrImageProcessor")


def own_model(model: Any) -> Any:
    """A copy of a model without what is wrapped around it, see :func:`detrkit.engines.own_copy.own_copy`.

    Raises:
        SettingError: It is no model with heads for classes and boxes, or cannot be copied.
    """
    from torch import nn

    from detrkit.engines.own_copy import own_copy, without_wrappers
    from detrkit.models.detection import ModelWithHeads

    model = without_wrappers(model)
    if isinstance(model, nn.Module) and not isinstance(model, ModelWithHeads):
        kind = type(model)
        remedy = "load it with detrkit, for example by Detector.from_pretrained"
        if kind.__module__.startswith("detrkit."):
            remedy = "it has no heads for classes and boxes; take the class that ends in ForObjectDetection"
        raise SettingError(f"a Detector runs detection models of detrkit, not {kind.__qualname__}: {remedy}")
    return own_copy(model)


def own_processor(processor: Any, model_type: str) -> Any:
    """The image processor that reads a model's outputs by its family's rule.

    One of another family, or one of Transformers, gives its options to one of this family: how classes are
    scored is a property of the model. A class of the user's own is taken as it is.

    Raises:
        SettingError: It is no image processor of these families.
    """
    if isinstance(processor, ArrayImageProcessor):
        return processor
    from detrkit.processing.image_processor import DetrImageProcessorBase

    family = family_of(model_type, "the model")
    fitting = family.load(family.processor)
    kind = type(processor)
    is_ours = isinstance(processor, DetrImageProcessorBase)
    if isinstance(processor, fitting) or (is_ours and not kind.__module__.startswith("detrkit.")):
        return processor
    if is_ours or (kind.__module__.startswith("transformers.") and kind.__name__.startswith(_FOREIGN)):
        return fitting.from_dict(processor.to_dict())
    raise SettingError(
        f"a Detector takes an image processor of detrkit, not {kind.__qualname__}; for this model "
        f"{fitting.__name__}"
    )
