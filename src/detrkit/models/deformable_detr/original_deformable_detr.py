"""The tensors of fundamentalvision/Deformable-DETR's checkpoints."""

from __future__ import annotations

from detrkit.models.original import BACKBONE, OriginalLayout, decoder_layer, encoder_layer, packed_attention


def _sampling_attention(original: str, hub: str) -> dict[str, str]:
    parts = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return {f"{original}.{part}": f"{hub}.{part}" for part in parts}


_TWO_STAGE = ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
_BESIDE_THE_LAYERS = ("level_embed", "reference_points", *_TWO_STAGE)

ORIGINAL = OriginalLayout(
    markers=("transformer.level_embed",),
    names={
        **BACKBONE,
        "input_proj.N.N": "model.input_proj.N.N",
        "class_embed.N": "class_embed.N",
        "bbox_embed.N.layers.N": "bbox_embed.N.layers.N",
        **encoder_layer(_sampling_attention("self_attn", "self_attn")),
        # Cross-attention comes first in the numbering of the norms, although it is applied second.
        **decoder_layer(
            packed_attention("self_attn", "self_attn") | _sampling_attention("cross_attn", "encoder_attn"),
            first="encoder_attn_layer_norm",
            second="self_attn_layer_norm",
        ),
        "transformer.decoder.class_embed.N": "model.decoder.class_embed.N",
        "transformer.decoder.bbox_embed.N.layers.N": "model.decoder.bbox_embed.N.layers.N",
        **{f"transformer.{name}": f"model.{name}" for name in _BESIDE_THE_LAYERS},
    },
    class_head="class_embed.0.weight",
)
