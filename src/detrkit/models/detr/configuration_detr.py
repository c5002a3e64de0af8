"""Configuration of DETR."""

from __future__ import annotations

from typing import ClassVar

from detrkit.models.configuration import DetrFamilyConfig


class DetrConfig(DetrFamilyConfig):
    """Configuration of DETR; the shared fields are those of ``DetrFamilyConfig``.

    Args:
        class_cost: Weight of the class probability in the matching.
        eos_coefficient: Relative weight of the no-object class in the classification loss.

    Example:
        >>> from detrkit import DetrConfig
        >>> DetrConfig(num_labels=91, dilation=True).backbone
        'resnet50'
    """

    model_type = "detr"
    norm_placements: ClassVar[tuple[bool, ...]] = (False, True)

    class_cost: float | int = 1
    eos_coefficient: float | int = 0.1
