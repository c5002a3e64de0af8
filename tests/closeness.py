"""When two computations of the same float32 network count as equal."""

from __future__ import annotations

from typing import Any

import torch

# The order in which a matrix library adds up depends on the processor, the threads and how the weights are
# aligned in memory, so equal weights do not give bit-equal outputs. A sum is off by about one part in
# 2**23 of its largest term. A thousand times as much leaves room for all layers of a network, and is far less
# than what a mistake does to the outputs of a model with random weights.
FLOAT32_NOISE = 1000 * torch.finfo(torch.float32).eps


def assert_same_numbers(found: Any, expected: Any) -> None:
    """Checks that two tensors or arrays differ by no more than the noise of float32.

    Args:
        found: Floating point values of any shape.
        expected: Values of the same shape; their largest magnitude, or 1 if that is less, sets the scale.
    """
    found, expected = (torch.as_tensor(values).detach() for values in (found, expected))
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, atol=FLOAT32_NOISE * scale, rtol=0)


def assert_same_weights(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Checks that two models have the same parameters and buffers, bit by bit."""
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
