"""The compiled engine gives what the eager one gives, from one graph for all sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from detrkit import Detector
from tests.conftest import make_picture

# The last two are thin: their coarsest features are one pixel high or wide.
SIZES = [(120, 80), (80, 120), (100, 90), (200, 10), (10, 200)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_detr", "tiny_conditional_detr"])
def test_one_graph_serves_all_sizes(name: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    pictures = [make_picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    expected = Detector.from_pretrained(folder, device="cpu")(pictures, threshold=0.3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    detector = Detector.from_pretrained(folder, engine="compile", device="cpu")
    for found, eager in zip(detector(pictures, threshold=0.3), expected):
        np.testing.assert_allclose(found.boxes, eager.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, eager.scores, atol=1e-4)
        np.testing.assert_array_equal(found.labels, eager.labels)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_model_with_masks_segments_the_same(tiny_panoptic: Path) -> None:
    picture = make_picture(120, 80)
    expected = Detector.from_pretrained(tiny_panoptic, device="cpu").segment(picture, threshold=0.3)
    detector = Detector.from_pretrained(tiny_panoptic, engine="compile", device="cpu")
    found = detector.segment(picture, threshold=0.3)
    assert [s["category_id"] for s in found.segments] == [s["category_id"] for s in expected.segments]
    assert (found.ids != expected.ids).mean() < 0.01


@pytest.mark.slow
def test_deformable_detr_gives_the_same(tiny_deformable_detr: Path) -> None:
    pictures = [make_picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    expected = Detector.from_pretrained(tiny_deformable_detr, device="cpu")(pictures, threshold=0.1)
    detector = Detector.from_pretrained(tiny_deformable_detr, engine="compile", device="cpu")
    for found, eager in zip(detector(pictures, threshold=0.1), expected):
        assert len(eager) > 0
        np.testing.assert_allclose(found.boxes, eager.boxes, atol=1e-2)
        np.testing.assert_allclose(found.scores, eager.scores, atol=1e-4)


@pytest.mark.slow
def test_a_backbone_whose_pooling_rounds_up_is_compiled_too() -> None:
    picture = make_picture(160, 120)
    eager = Detector.from_pretrained("blood-cells", device="cpu")(picture, threshold=0.05)
    found = Detector.from_pretrained("blood-cells", engine="compile", device="cpu")(picture, threshold=0.05)
    np.testing.assert_allclose(found.boxes, eager.boxes, atol=1e-2)
    np.testing.assert_allclose(found.scores, eager.scores, atol=1e-4)
