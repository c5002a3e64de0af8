"""Deterministic weights for a checkpoint, from its names and shapes alone.

Two programs that agree on the names and shapes agree on the values, so a golden case needs no weight file:
only its ``keys.json`` (name -> shape, dtype, alias).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

_EMBEDDINGS = (
    "query_embed.weight",
    "query_position_embeddings.weight",
    "level_embed",
    "row_embed.weight",
    "col_embed.weight",
    "row_embeddings.weight",
    "column_embeddings.weight",
)


def make_state_dict(
    keys: Mapping[str, Mapping[str, Any]], salt: int = 0, class_gain: float = 64.0, class_bias: float = 0.0
) -> dict[str, np.ndarray]:
    """A checkpoint.

    Args:
        keys: For each tensor ``shape``, ``dtype``, and ``alias`` where it repeats another one.
        salt: Other values for another number.
        class_gain: Variance of the class head's weights, times its number of inputs.
        class_bias: Mean of the class head's biases.

    Returns:
        float32 arrays, the same on every machine, and int64 zeros for integer types.
    """
    return {
        name: _make_tensor(
            spec.get("alias", name), tuple(spec["shape"]), spec["dtype"], salt, class_gain, class_bias
        )
        for name, spec in keys.items()
    }


def _make_tensor(
    name: str, shape: tuple[int, ...], dtype: str, salt: int, class_gain: float, class_bias: float
) -> np.ndarray:
    if "int" in dtype:
        return np.zeros(shape, dtype=np.int64)
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + 1_000_003 * salt))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    normal = rng.standard_normal(shape, dtype=np.float32)
    in_backbone = ".body." in name or "conv_encoder" in name
    classifies = "class_embed" in name or "class_labels_classifier" in name
    if leaf == "running_mean":
        return 0.1 * normal
    if "sampling_offsets" in name:
        return (2.0 if leaf == "bias" else 0.02) * normal
    if classifies and leaf == "bias":
        return class_bias + 0.05 * normal
    if leaf == "bias" or leaf.endswith("_bias"):
        return 0.05 * normal
    if len(shape) == 1:  # scale of a normalisation layer
        return (0.5 if in_backbone else 1.0) + 0.1 * normal
    if name.endswith(_EMBEDDINGS):
        return normal
    fan_in = math.prod(shape[1:])
    gain = class_gain if classifies else 2.0 if in_backbone else 1.0
    return math.sqrt(gain / fan_in) * normal
