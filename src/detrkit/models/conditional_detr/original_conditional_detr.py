"""The tensors of Atten4Vis/ConditionalDETR's checkpoints."""

from __future__ import annotations

from detrkit.models.original import (
    BACKBONE,
    NECK_AND_HEADS,
    OriginalLayout,
    decoder_layer,
    encoder_layer,
    packed_attention,
)

_PROJECTIONS = (
    *(f"sa_{part}_proj" for part in ("qcontent", "qpos", "kcontent", "kpos", "v")),
    *(f"ca_{part}_proj" for part in ("qcontent", "qpos", "kcontent", "kpos", "v", "qpos_sine")),
)

ORIGINAL = OriginalLayout(
    markers=("transformer.decoder.layers.0.sa_qcontent_proj.weight",),
    names={
        **BACKBONE,
        **NECK_AND_HEADS,
        **encoder_layer(packed_attention("self_attn", "self_attn")),
        **decoder_layer(
            {name: name for name in _PROJECTIONS}
            | {"self_attn.out_proj": "self_attn.out_proj", "cross_attn.out_proj": "encoder_attn.out_proj"}
        ),
        "transformer.decoder.query_scale.layers.N": "model.decoder.query_scale.layers.N",
        "transformer.decoder.ref_point_head.layers.N": "model.decoder.ref_point_head.layers.N",
    },
)
