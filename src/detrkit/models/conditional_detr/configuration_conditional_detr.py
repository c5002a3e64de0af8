"""Configuration of Conditional DETR."""

from __future__ import annotations

from detrkit.models.configuration import DetrFamilyConfig


class ConditionalDetrConfig(DetrFamilyConfig):
    """Configuration of Conditional DETR; the shared fields are those of ``DetrFamilyConfig``.

    Args:
        num_queries: Object queries; three times as many as in DETR.
        class_cost: Weight of the focal classification cost in the matching.
        cls_loss_coefficient: Weight of the focal classification loss.
        focal_alpha: Share of the focal loss that falls to the right class, between 0 and 1.

    Example:
        >>> from detrkit import ConditionalDetrConfig
        >>> ConditionalDetrConfig(num_labels=91).num_queries
        300
    """

    model_type = "conditional_detr"

    num_queries: int = 300
    class_cost: float | int = 2
    cls_loss_coefficient: float | int = 2
    focal_alpha: float | int = 0.25
