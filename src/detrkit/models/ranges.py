"""The sizes that a configuration may ask for."""

from __future__ import annotations

from collections.abc import Mapping

from detrkit.common.screening import MOST_LAYERS

# Name of a size -> its least and its largest value. Published models stay far below the latter; what exceeds
# them is an accident or an attack, and is refused before memory is spent.
_RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_queries", "two_stage_num_proposals"), (1, 10_000)),
    "num_labels": (1, 100_000),
    "d_model": (1, 8_192),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), (0, MOST_LAYERS)),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), (1, 65_536)),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_channels"), (1, 1_024)),
    **dict.fromkeys(("encoder_n_points", "decoder_n_points"), (1, 64)),
    "num_feature_levels": (1, 16),
}


def check_ranges(values: Mapping[str, object]) -> None:
    """Refuses sizes that are out of range.

    Raises:
        ValueError: One is.
    """
    for name, (least, largest) in _RANGES.items():
        value = values.get(name)
        if value is not None and not (isinstance(value, (int, float)) and least <= value <= largest):
            raise ValueError(f"{name} must be between {least} and {largest}, not {value!r}")
