from __future__ import annotations

import pytest

from detrkit import DetrConfig
from detrkit.common.screening import MOST_LAYERS, check_config
from detrkit.errors import CheckpointError


@pytest.mark.parametrize(
    "entries",
    [
        {"backbone_config": {"depths": [1000] * 4}},
        {"backbone_config": {"depths": [[200, 200], [200]]}},
        {"encoder_layers": 10**6},
        {"backbone_config": {"num_hidden_layers": 1e9}},
        {"backbone_kwargs": {"num_blocks": [10**400]}},
    ],
)
def test_networks_of_thousands_of_layers_are_refused_before_they_are_built(entries: dict) -> None:
    with pytest.raises(CheckpointError, match="more than 512 layers"):
        check_config({"model_type": "detr", **entries}, "config.json")


def test_deep_networks_that_are_in_use_are_read() -> None:
    deep = {"depths": [3, 30, 48, 8], "num_hidden_layers": 48, "encoder_layers": 12, "hidden_sizes": [10**4]}
    check_config({"model_type": "detr", "backbone_config": deep}, "config.json")


def test_configurations_that_are_not_files_have_the_same_limit() -> None:
    DetrConfig(encoder_layers=MOST_LAYERS)
    for options in (
        {"encoder_layers": MOST_LAYERS + 1},
        {"backbone_config": {"model_type": "resnet", "depths": [MOST_LAYERS, 1]}},
    ):
        with pytest.raises(ValueError, match=f"{MOST_LAYERS}"):
            DetrConfig(**options)
