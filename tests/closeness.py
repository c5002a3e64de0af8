"""When two computations of the same float32 network count as equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

# The order in which a matrix library adds up depends on the processor, the threads and how the weights are
# aligned in memory, so equal weights do not give bit-equal outputs. A sum is off by about one part in
# 2**23 of its largest term. A thousand times as much leaves room for all layers of a network, and is far less
# than what a mistake does to the outputs of a model with random weights.
FLOAT32_NOISE = 1000 * torch.finfo(torch.float32).eps

# What every implementation of a model is held to, the original one included.
OUTPUT_TOLERANCES = {"logits": 1e-4, "pred_boxes": 1e-5, "pred_masks": 1e-3}


def assert_same_numbers(found: Any, expected: Any) -> None:
    """Checks that two tensors or arrays differ by no more than the noise of float32.

    Args:
        found: Floating point values of any shape.
        expected: Values of the same shape; their largest magnitude, or 1 if that is less, sets the scale.
    """
    found, expected = (torch.as_tensor(values).detach() for values in (found, expected))
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, atol=FLOAT32_NOISE * scale, rtol=0)


def assert_same_outputs(found: Any, expected: Any) -> None:
    """Checks that two models' outputs are equal: logits, boxes and, where both have them, masks.

    Args:
        found: Outputs of a model.
        expected: Outputs of a model with the same weights on the same images.
    """
    for field, tolerance in OUTPUT_TOLERANCES.items():
        if found.get(field) is not None and expected.get(field) is not None:
            torch.testing.assert_close(found[field], expected[field], atol=tolerance, rtol=0)


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Checks that two models have the same parameters and buffers, bit by bit."""
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def assert_same_documents(found: Path, expected: Path) -> None:
    """Checks that two JSON files of results agree, in scores and pixels to 0.001."""
    _assert_same_values(*(json.loads(path.read_text(encoding="utf-8")) for path in (found, expected)))


def _assert_same_values(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            _assert_same_values(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-3)
    else:
        assert found == expected
