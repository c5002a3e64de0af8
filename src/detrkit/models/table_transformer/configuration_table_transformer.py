"""Configuration of Table Transformer."""

from __future__ import annotations

from typing import ClassVar

from detrkit.models.detr.configuration_detr import DetrConfig


class TableTransformerConfig(DetrConfig):
    """Configuration of Table Transformer: that of DETR, always with pre-norm layers.

    Example:
        >>> from detrkit import TableTransformerConfig
        >>> TableTransformerConfig(backbone="resnet18", num_labels=2, num_queries=15).normalize_before
        True
    """

    model_type = "table-transformer"
    norm_placements: ClassVar[tuple[bool, ...]] = (True,)

    normalize_before: bool = True
