"""Detectors that several modules look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detrkit import Detections, Detector

QUERIES = 12


class SpyModel(torch.nn.Module):
    """Passes calls on and notes the shape of every batch and whether it came with a mask."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: list[tuple[tuple[int, ...], bool]] = []

    def forward(self, **inputs: torch.Tensor) -> object:
        self.calls.append((tuple(inputs["pixel_values"].shape), "pixel_mask" in inputs))
        return self.model(**inputs)


@pytest.fixture
def spy(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> SpyModel:
    spy = SpyModel(detector.model)
    monkeypatch.setattr(detector, "model", spy)
    return spy


def assert_same(a: Detections, b: Detections, tolerance: float = 1e-4) -> None:
    assert a.image_size == b.image_size
    np.testing.assert_allclose(a.scores, b.scores, atol=tolerance)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=100 * tolerance)
    assert a.names == b.names


@pytest.fixture(scope="module")
def detector(tiny_detr: Path) -> Detector:
    return Detector.from_pretrained(tiny_detr, device="cpu")


@pytest.fixture(scope="module", params=["tiny_panoptic", "tiny_conditional_panoptic"])
def segmenter(request: pytest.FixtureRequest) -> Detector:
    return Detector.from_pretrained(request.getfixturevalue(request.param), device="cpu")
