"""Table Transformer: DETR with pre-norm layers, for tables in pages and for their rows and columns.

The network is DETR's; the configuration says where the norms stand.
"""

from __future__ import annotations

from detrkit.models.detr.modeling_detr import DetrForObjectDetection, DetrModel
from detrkit.models.table_transformer.configuration_table_transformer import TableTransformerConfig


class TableTransformerModel(DetrModel):
    """Table Transformer's backbone, encoder and decoder without heads."""

    config_class = TableTransformerConfig


class TableTransformerForObjectDetection(DetrForObjectDetection):
    """Table Transformer with heads for classes (the last one is no-object) and boxes."""

    config_class = TableTransformerConfig
    base_class = TableTransformerModel
