"""What reaches the model is the same whether the CPU scales pixels or the device does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detrkit import DetrImageProcessor
from detrkit.inference.prepared import PreparedImage, prepare_image, to_device
from tests.conftest import make_picture

CPU = torch.device("cpu")


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepares an image for the CPU and for a GPU, whose pinned memory is left out where there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)

    def prepare(processor: DetrImageProcessor, size: tuple[int, int]) -> tuple[PreparedImage, PreparedImage]:
        image = make_picture(*size)
        return prepare_image(image, processor), prepare_image(image, processor, for_gpu=True)

    return prepare


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}, {"pad_size": (90, 150)}],
    ids=str,
)
def test_bytes_that_the_device_scales_are_the_processors_numbers(
    prepare: Any, options: dict[str, Any], device: torch.device
) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if "pad_size" in options:
        options = {"pad_size": {"height": 90, "width": 150}}
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107}, **options)
    pairs = [prepare(processor, (120, 80)) for _ in range(2)]
    assert all(theirs.pixel_values.dtype == torch.uint8 for _, theirs in pairs)
    assert all(ours.frame == theirs.frame for ours, theirs in pairs)
    expected = to_device([ours for ours, _ in pairs], CPU, torch.float32, None)
    found = to_device([theirs for _, theirs in pairs], device, torch.float32, processor.pixel_scaling)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].cpu(), value)


def test_the_threads_of_a_call_go_back_to_pytorchs(tmp_path: Path) -> None:
    from detrkit.processing import batch

    with batch.image_threads(1):
        assert batch._threads.get() == 1
    assert batch._threads.get() is None
