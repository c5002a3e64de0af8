"""How a family's file pairs the modules of the original implementation with ours.

A table maps the original's module to the name on the Hub. ``N`` stands for a number, ``*`` for the rest of a
module's name, and ``{q,k,v}`` for the three parts, in this order, of a packed projection. Tables are read in
both directions: forwards to convert, backwards to name a missing tensor the way the checkpoint would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class OriginalLayout:
    """What the tensors of a family's original checkpoints are called.

    Attributes:
        markers: Tensors that tell the family. Of two families that fit, the one with more markers is meant.
        names: Module of the original's detector -> module of ours.
        class_head: Weight of a class head, of shape (outputs, d_model).
    """

    markers: tuple[str, ...]
    names: Mapping[str, str]
    class_head: str = "class_embed.weight"


BACKBONE = {
    "backbone.0.body.*": "model.backbone.conv_encoder.model.*",
    "backbone.1.row_embed": "model.backbone.position_embedding.row_embeddings",
    "backbone.1.col_embed": "model.backbone.position_embedding.column_embeddings",
    "query_embed": "model.query_position_embeddings",
}
"""The backbone, learned positions, and the object queries."""

NECK_AND_HEADS = {
    "input_proj": "model.input_projection",
    "class_embed": "class_labels_classifier",
    "bbox_embed.layers.N": "bbox_predictor.layers.N",
    "transformer.decoder.norm": "model.decoder.layernorm",
}
"""What surrounds the Transformer in a family with one feature map."""

MASKS = {"bbox_attention.*": "bbox_attention.*", "mask_head.*": "mask_head.*"}
"""The mask head, which stands beside the detector."""


def under(original: str, hub: str, table: Mapping[str, str]) -> dict[str, str]:
    """A table with prefixes on both sides."""
    return {original + key: hub + value for key, value in table.items()}


def packed_attention(original: str, hub: str) -> dict[str, str]:
    """An ``nn.MultiheadAttention``, whose query, key and value projections are one tensor."""
    return {f"{original}.in_proj": f"{hub}.{{q,k,v}}_proj", f"{original}.out_proj": f"{hub}.out_proj"}


def encoder_layer(attention: Mapping[str, str]) -> dict[str, str]:
    """The encoder's layers, given the names within their attention."""
    return _layer("encoder", attention, "self_attn_layer_norm", "final_layer_norm")


def decoder_layer(
    attention: Mapping[str, str], first: str = "self_attn_layer_norm", second: str = "encoder_attn_layer_norm"
) -> dict[str, str]:
    """The decoder's layers, given the names within their attentions and of the first two norms."""
    return _layer("decoder", attention, first, second, "final_layer_norm")


def _layer(part: str, attention: Mapping[str, str], *norms: str) -> dict[str, str]:
    layer = {**attention, "linear1": "fc1", "linear2": "fc2"}
    layer |= {f"norm{number}": norm for number, norm in enumerate(norms, 1)}
    return under(f"transformer.{part}.layers.N.", f"model.{part}.layers.N.", layer)
