"""The tensors of facebookresearch/detr's checkpoints."""

from __future__ import annotations

from detrkit.models.original import (
    BACKBONE,
    NECK_AND_HEADS,
    OriginalLayout,
    decoder_layer,
    encoder_layer,
    packed_attention,
)

ORIGINAL = OriginalLayout(
    markers=("transformer.decoder.layers.0.multihead_attn.in_proj_weight",),
    names={
        **BACKBONE,
        **NECK_AND_HEADS,
        **encoder_layer(packed_attention("self_attn", "self_attn")),
        "transformer.encoder.norm": "model.encoder.layernorm",  # of pre-norm layers
        **decoder_layer(
            packed_attention("self_attn", "self_attn") | packed_attention("multihead_attn", "encoder_attn")
        ),
    },
)
