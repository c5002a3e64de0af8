"""The processor of exported models gives what those of Transformers' interface give, pixels and results."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detrkit import ConditionalDetrImageProcessor, DetrImageProcessor
from detrkit.errors import ImageError, SettingError
from detrkit.processing.array_processor import ArrayImageProcessor
from detrkit.processing.panoptic_rule import MaskSizes, PanopticRule, pixel_centres, pixel_corners
from tests.conftest import make_picture

PROCESSORS = {"softmax": DetrImageProcessor, "sigmoid": ConditionalDetrImageProcessor}
BOTH = pytest.mark.parametrize("scores", PROCESSORS)

# (height, width) of the image as the model saw it, of the batch, of the result.
GEOMETRIES = {
    "shrunk": ((200, 266), (200, 266), (120, 160)),
    "padded": ((200, 266), (224, 320), (200, 266)),
    "enlarged": ((100, 133), (100, 133), (301, 400)),
    "one direction each": ((100, 150), (104, 160), (150, 97)),
}


def outputs(queries: int, padded: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Outputs of a model with smooth masks, as real ones are, and many confident queries."""
    torch.manual_seed(seed)
    height, width = (-(-length // 4) for length in padded)
    coarse = torch.randn(1, queries, height // 8, width // 8) * 4
    return {
        "logits": torch.randn(1, queries, 121) * 3,
        "pred_boxes": torch.rand(1, queries, 4),
        "pred_masks": F.interpolate(coarse, (height, width), mode="bilinear"),
    }


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"longest_edge": 90}},
        {"size": {"shortest_edge": 60, "longest_edge": 100}, "pad_size": {"height": 100, "width": 100}},
        {"size": {"height": 64, "width": 48}, "do_normalize": False},
        {"max_size": 120, "size": 64, "image_mean": [0.5, 0.4, 0.3]},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"size": 64, "num_channels": 1, "image_mean": 0.4, "image_std": 0.2},
    ],
)
def test_pixels_and_masks_are_equal(options: dict) -> None:
    ours, theirs = ArrayImageProcessor("softmax", **options), DetrImageProcessor(**options)
    pictures = [make_picture(120, 80), make_picture(81, 67, seed=1)]
    for images in ([pictures[0]], pictures):
        found, wanted = ours(images), theirs(images, return_tensors="np")
        assert found.keys() == wanted.keys()
        for name, expected in wanted.items():
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected)


def test_it_is_made_of_another_processor_s_options() -> None:
    theirs = DetrImageProcessor(size={"longest_edge": 90}, is_thing_map={1: True, 2: False}, do_pad=False)
    ours = ArrayImageProcessor.of(theirs, "softmax")
    assert (ours.size, ours.is_thing_map) == ({"longest_edge": 90}, {1: True, 2: False})
    assert ArrayImageProcessor.of(ours, "softmax") is ours
    assert "pixel_mask" not in ours(make_picture(40, 30))
    with pytest.raises(SettingError, match="cannot be one batch"):
        ours([make_picture(40, 30), make_picture(30, 40)])


def test_options_hold_for_a_call_and_unknown_ones_are_refused() -> None:
    ours = ArrayImageProcessor("softmax")
    assert ours(make_picture(40, 30), size=60)["pixel_values"].shape == (1, 3, 60, 80)
    with pytest.raises(SettingError, match="unknown option 'do_resise'"):
        ours(make_picture(40, 30), do_resise=False)
    with pytest.raises(ImageError, match="no image given"):
        ours([])


@BOTH
@pytest.mark.parametrize("top_k", [None, 7, 5000])
def test_candidates_are_equal(scores: str, top_k: int | None) -> None:
    found = outputs(30, (64, 64))
    ours = ArrayImageProcessor(scores).candidates(arrays(found), top_k)
    theirs = PROCESSORS[scores]().candidates(found, top_k)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-7)
    assert ours.scores.dtype == ours.boxes.dtype == np.float32
    queries = PROCESSORS[scores]().candidate_queries(found["logits"], top_k)[1]
    np.testing.assert_array_equal(ours.queries, queries)


@BOTH
def test_extreme_logits_are_probabilities_without_a_warning(scores: str) -> None:
    logits = np.array([[[1e4, -1e4, 0.0]]], np.float32)
    found = ArrayImageProcessor(scores).candidates({"logits": logits, "pred_boxes": np.ones((1, 1, 4))})
    assert found.scores[0, 0] == 1


@BOTH
@pytest.mark.parametrize("queries", [100, 5])
def test_as_many_objects_are_given(scores: str, queries: int) -> None:
    assert ArrayImageProcessor(scores).object_limit(queries) == PROCESSORS[scores]().object_limit(queries)


@BOTH
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("queries", [1, 40])
def test_panoptic_maps_are_equal(scores: str, geometry: str, queries: int) -> None:
    image, padded, target = GEOMETRIES[geometry]
    found = outputs(queries, padded)
    settings = {
        "processed_sizes": [image],
        "target_sizes": [target],
        "padded_size": padded,
        "threshold": 0.2,
    }
    [(ids, segments)] = ArrayImageProcessor(scores).panoptic_maps(arrays(found), **settings)
    [(wanted, expected)] = PROCESSORS[scores]().panoptic_maps(found, **settings)
    assert len(segments) > (0 if queries == 1 else 10)
    np.testing.assert_array_equal(ids, wanted)
    assert ids.dtype == np.int32
    assert [s.pop("score") for s in segments] == pytest.approx([s.pop("score") for s in expected], abs=2e-6)
    assert segments == expected


def test_more_masks_than_are_held_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, padded, target = GEOMETRIES["shrunk"]
    found = arrays(outputs(40, padded))
    settings = {"processed_sizes": [image], "target_sizes": [target], "threshold": 0.1}
    [(ids, segments)] = ArrayImageProcessor("softmax").panoptic_maps(found, **settings)
    monkeypatch.setattr("detrkit.processing.array_segmentation._NUMBERS_AT_ONCE", 1)
    [(again, the_same)] = ArrayImageProcessor("softmax").panoptic_maps(found, **settings)
    np.testing.assert_array_equal(ids, again)
    assert segments == the_same


def test_the_pixels_of_equal_masks_go_to_the_first() -> None:
    found = outputs(6, (64, 64))
    found["pred_masks"][0, 1:] = found["pred_masks"][0, :1].clone()
    found["logits"] = torch.full((1, 6, 121), -9.0)
    found["logits"][0, torch.arange(6), torch.arange(1, 7)] = 9.0
    settings = {"processed_sizes": [(64, 64)], "target_sizes": [(40, 40)]}
    [(ids, segments)] = ArrayImageProcessor("softmax").panoptic_maps(arrays(found), **settings)
    [(wanted, expected)] = DetrImageProcessor().panoptic_maps(found, **settings)
    np.testing.assert_array_equal(ids, wanted)
    assert [s["category_id"] for s in segments] == [s["category_id"] for s in expected] == [1]


def test_no_query_above_the_threshold_makes_an_empty_map() -> None:
    found = outputs(4, (64, 64))
    settings = {"processed_sizes": [(64, 64)], "target_sizes": [(40, 30)], "threshold": 1.0}
    [(ids, segments)] = ArrayImageProcessor("softmax").panoptic_maps(arrays(found), **settings)
    assert ids.shape == (40, 30)
    assert not ids.any()
    assert segments == []


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_masks_of_detections_are_equal(geometry: str) -> None:
    image, padded, target = GEOMETRIES[geometry]
    found = outputs(12, padded)
    settings = {"processed_sizes": [image], "target_sizes": [target], "padded_size": padded}
    rows = [np.array([7, 2, 2, 11])]
    [masks] = ArrayImageProcessor("softmax").detection_masks(arrays(found), rows, **settings)
    resized = F.interpolate(found["pred_masks"].float(), padded, mode="bilinear")[0, rows[0]]
    cropped = resized[:, : image[0], : image[1]]
    wanted = F.interpolate(cropped[None], target, mode="nearest")[0].sigmoid() > 0.5
    assert masks.dtype == bool
    assert (masks != wanted.numpy()).mean() < 1e-5  # where a logit is zero but for rounding


@pytest.mark.parametrize(
    ("length", "target"), [(1, 7), (7, 1), (97, 97), (800, 480), (333, 1000), (1066, 641)]
)
def test_corners_are_those_of_pytorch_s_nearest_mode(length: int, target: int) -> None:
    line = torch.arange(length, dtype=torch.float32)[None, None]
    wanted = F.interpolate(line, size=target, mode="nearest")[0, 0].long()
    np.testing.assert_array_equal(pixel_corners(length, target), wanted)
    assert pixel_centres(length, target).max() < length


def test_what_decides_about_segments_is_said_of_each_label() -> None:
    rule = PanopticRule.of(lambda label: label < 3, {2})
    assert [rule.is_merged(label) for label in (2, 3)] == [True, False]
    assert MaskSizes((4, 4), (3, 4), (2, 2)).image == (3, 4)
