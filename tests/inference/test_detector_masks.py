"""Masks and segments of a detector, and predictions that are read at several thresholds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from detrkit import Detector
from detrkit.errors import SettingError
from tests.conftest import make_picture
from tests.inference.conftest import QUERIES, SpyModel, assert_same
from tests.tiny import TINY_NAMES


def test_segments_are_those_of_forward_and_post_processing(tiny_panoptic: Path) -> None:
    from detrkit import DetrForSegmentation, DetrImageProcessor

    image = make_picture(120, 80)
    model = DetrForSegmentation.from_pretrained(tiny_panoptic).eval()
    processor = DetrImageProcessor.from_pretrained(tiny_panoptic)
    with torch.no_grad():
        inputs = processor(images=image, return_tensors="pt")
        outputs = model(**inputs)
    wanted = processor.post_process_panoptic_segmentation(
        outputs, threshold=0.5, target_sizes=[(80, 120)], processed_sizes=[inputs["pixel_mask"].shape[-2:]]
    )[0]
    found = Detector.from_pretrained(tiny_panoptic, device="cpu").segment(image, threshold=0.5)
    assert len(found) >= 2
    assert [s["category_id"] for s in found.segments] == [s["label_id"] for s in wanted["segments_info"]]
    different = found.ids != wanted["segmentation"].numpy()
    assert different.mean() < 0.01  # rounding at the borders


def test_segments_have_the_promised_types(segmenter: Detector) -> None:
    found = segmenter.segment(make_picture(120, 80), threshold=0.5)
    assert (found.ids.dtype, found.ids.shape) == (np.int32, (80, 120))
    assert found.image_size == (80, 120)
    assert found.names == [TINY_NAMES[s["category_id"]] for s in found.segments]
    areas = dict(zip(*np.unique(found.ids[found.ids > 0], return_counts=True)))
    assert areas == {s["id"]: s["area"] for s in found.segments}
    assert all(s["isthing"] == (s["category_id"] != 3) for s in found.segments)
    assert found.draw(make_picture(120, 80)).size == (120, 80)


def test_segmenting_in_batches_keeps_results_and_order(segmenter: Detector) -> None:
    pictures = [make_picture(*size, seed=i) for i, size in enumerate([(120, 80), (80, 120), (120, 80)] * 2)]
    one_by_one = [segmenter.segment(picture, threshold=0.5) for picture in pictures]
    together = segmenter.segment(pictures, threshold=0.5, batch_size=3)
    for a, b in zip(one_by_one, together):
        assert (a.image_size, a.names) == (b.image_size, b.names)
        assert (a.ids != b.ids).mean() < 0.01


def test_detections_of_a_model_with_masks_have_them(segmenter: Detector) -> None:
    picture = make_picture(120, 80)
    found = segmenter(picture, threshold=0.3)
    boxes = segmenter(picture, threshold=0.3, masks=False)
    assert boxes.masks is None
    assert len(found) == len(boxes) >= 2
    np.testing.assert_allclose(found.boxes, boxes.boxes, atol=1e-2)
    assert found.masks is not None
    assert (found.masks.dtype, found.masks.shape) == (bool, (len(found), 80, 120))


def test_masks_belong_to_their_detections(tiny_panoptic: Path) -> None:
    """Each mask is the one that the old instance post-processing gives for the same query."""
    from detrkit import DetrForSegmentation, DetrImageProcessor

    image = make_picture(120, 80)
    model = DetrForSegmentation.from_pretrained(tiny_panoptic).eval()
    processor = DetrImageProcessor.from_pretrained(tiny_panoptic)
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = torch.tensor([[80, 120]])
    results = processor.post_process(outputs, sizes)
    processed = torch.tensor([inputs["pixel_mask"].shape[-2:]])
    results = processor.post_process_instance(results, outputs, sizes, processed)
    found = Detector.from_pretrained(tiny_panoptic, device="cpu")(image, threshold=0.3)
    assert len(found) >= 2
    for one in found:
        query = int((results[0]["scores"] - one.score).abs().argmin())
        wanted = results[0]["masks"][query, 0].numpy().astype(bool)
        assert (one.mask != wanted).mean() < 0.01


def test_a_model_without_masks_says_so(detector: Detector) -> None:
    for call in (detector.segment, lambda image: detector(image, masks=True)):
        with pytest.raises(SettingError, match="detects boxes only"):
            call(make_picture(120, 80))
    assert detector(make_picture(120, 80)).masks is None
    assert all("isthing" not in entry for entry in detector.categories())


def test_a_prediction_gives_at_any_threshold_what_a_call_gives_without_running_the_model_again(
    detector: Detector, segmenter: Detector, spy: SpyModel
) -> None:
    picture = make_picture(120, 80)
    prediction = detector.predict(picture, min_threshold=0.1)
    for threshold in (0.1, 0.3, 0.7, 1):
        assert_same(prediction.detections(threshold), detector(picture, threshold))
    assert len(spy.calls) == 1 + 4  # the prediction, and the calls it is compared with

    prediction = segmenter.predict(picture, min_threshold=0.1)
    for threshold in (0.1, 0.5, 0.85):
        found, wanted = prediction.segments(threshold), segmenter.segment(picture, threshold)
        assert found.names == wanted.names
        assert (found.ids != wanted.ids).mean() < 0.01  # another number of masks is computed at once
        assert_same(prediction.detections(threshold), segmenter(picture, threshold, masks=False))


def test_a_prediction_refuses_thresholds_that_the_model_was_not_run_for(detector: Detector) -> None:
    prediction = detector.predict(make_picture(120, 80), min_threshold=0.3)
    for threshold in (0.2, 1.1, float("nan")):
        with pytest.raises(SettingError, match=r"between 0\.3, which the model was run for, and 1"):
            prediction.detections(threshold)
    with pytest.raises(SettingError, match="detects boxes only"):
        prediction.segments(0.5)


def test_categories_say_what_is_a_thing(segmenter: Detector) -> None:
    assert segmenter.categories() == [
        {"id": 1, "name": "cat", "isthing": 1},
        {"id": 2, "name": "remote", "isthing": 1},
        {"id": 3, "name": "couch", "isthing": 0},
    ]


def test_a_config_without_architectures_is_told_by_the_weights(tiny_panoptic: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_panoptic, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = None
    (folder / "config.json").write_text(json.dumps(config))
    assert Detector.from_pretrained(folder, device="cpu").has_masks


def test_candidates_are_the_detections_at_every_threshold_with_their_queries(
    detector: Detector, tiny_detr: Path
) -> None:
    picture = make_picture(120, 80)
    prediction = detector.predict(picture, min_threshold=0)
    candidates = prediction.candidates()
    everything = prediction.detections(0)
    np.testing.assert_array_equal(candidates.detections.boxes, everything.boxes)
    best = detector.processor.query_probabilities(prediction.outputs["logits"])[0][0].amax(-1).numpy()
    np.testing.assert_array_equal(best[candidates.queries], everything.scores)
    middle = float(everything.scores[QUERIES // 2])
    kept = prediction.objects(middle)
    np.testing.assert_array_equal(kept.detections.scores, prediction.detections(middle).scores)
    np.testing.assert_array_equal(kept.queries, candidates.queries[: len(kept.queries)])


def test_a_stream_of_predictions_gives_the_calls_detections_in_order(
    detector: Detector, segmenter: Detector, pictures: list[Path]
) -> None:
    for one in (detector, segmenter):
        predictions = list(one.stream_predictions(pictures, batch_size=2))
        for prediction, wanted in zip(predictions, one(pictures, 0.3, masks=False), strict=True):
            assert_same(prediction.detections(0.3), wanted)
            assert prediction.frame.source == wanted.source
    with pytest.raises(SettingError, match="without masks"):
        predictions[0].segments(0.5)
