from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detrkit import DetectionConfig, Detections, Detector, pipeline
from detrkit.cli import run
from detrkit.endpoint import EndpointHandler
from detrkit.engines.export import export_model
from detrkit.errors import CheckpointError, SettingError
from detrkit.evaluation import evaluate_detector
from detrkit.results.detection_config import DetectionRule
from tests.conftest import make_picture

NAMES = {1: "cat", 2: "remote", 3: "couch"}
SETTINGS = DetectionConfig(
    threshold={"cat": 0.3, "couch": 0.2},
    overlap=0.6,
    class_agnostic=True,
    max_objects=5,
    calibration={"cat": [(0.0, 0.0), (0.5, 0.8), (1.0, 1.0)]},
    chosen={"images": 12},
)


def select(config: DetectionConfig, scores: list[float], labels: list[int], boxes: Any = None) -> list[int]:
    given = np.arange(4 * len(scores)).reshape(-1, 4) * 100 if boxes is None else np.array(boxes)
    rule = DetectionRule(config, NAMES)
    return rule.select(np.array(scores, np.float32), np.array(labels), given.astype(np.float32))[0].tolist()


@pytest.fixture
def with_settings(tiny_detr: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_detr, folder)
    SETTINGS.save_pretrained(folder)
    return folder


def test_settings_are_saved_beside_a_model_and_read_back(with_settings: Path, tiny_detr: Path) -> None:
    assert DetectionConfig.from_pretrained(tiny_detr) == DetectionConfig()
    read = DetectionConfig.from_pretrained(with_settings)
    assert read.decisions() == json.loads(json.dumps(SETTINGS.decisions()))
    assert read.chosen == {"images": 12}
    assert Detector.from_pretrained(with_settings, device="cpu").detection_config == read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be between 0 and 1, not 1.5"),
        ({"threshold": {"cat": float("nan")}}, "threshold of 'cat' must be between 0 and 1"),
        ({"overlap": 0}, "overlap must be above 0; None keeps all"),
        ({"overlap": True}, "overlap must be between 0 and 1"),
        ({"class_agnostic": 1}, "class_agnostic must be true or false"),
        ({"max_objects": 0}, "max_objects must be at least 1"),
        ({"max_objects": 2.5}, "max_objects must be a whole number"),
        ({"tile_overlap": 1}, "tile_overlap must be below 1"),
        ({"calibration": [1]}, "calibration must be a mapping"),
        ({"chosen": None}, "chosen must be a mapping"),
        ({"calibration": {"cat": [(0, 0)]}}, "calibration of 'cat' must be a list of points"),
        ({"calibration": {"cat": [(0, 0.5), (1, 0.2)]}}, "calibration of 'cat' must rise"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        DetectionConfig(**options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must contain a JSON object"),
        ('{"treshold": 0.4}', "unknown setting 'treshold'"),
        ('{"threshold": 7}', "threshold must be between"),
        ('{"threshold": {"dog": 0.4}}', "a class 'dog' that the model does not have"),
        ("{", "detection_config.json"),
    ],
)
def test_a_broken_file_is_refused_by_name(with_settings: Path, content: str, message: str) -> None:
    (with_settings / "detection_config.json").write_text(content)
    with pytest.raises((CheckpointError, SettingError), match=message):
        Detector.from_pretrained(with_settings, device="cpu")


def test_each_class_has_its_threshold_and_others_the_default() -> None:
    config = DetectionConfig(threshold={"cat": 0.2, "remote": 0.9})
    assert select(config, [0.3, 0.8, 0.45, 0.6], [1, 2, 3, 3]) == [3, 0]


def test_a_threshold_is_not_reached_by_an_equal_score() -> None:
    assert select(DetectionConfig(threshold=0.5), [0.5, 0.75], [1, 1]) == [1]


def test_calibrated_scores_meet_the_threshold_and_set_the_order() -> None:
    config = DetectionConfig(threshold=0.5, calibration={"cat": [(0.0, 0.0), (0.2, 0.9), (1.0, 1.0)]})
    rule = DetectionRule(config, NAMES)
    scores, labels = np.array([0.2, 0.6, 0.1], np.float32), np.array([1, 2, 1])
    places, final = rule.select(scores, labels, np.zeros((3, 4), np.float32))
    assert places.tolist() == [0, 1]
    np.testing.assert_allclose(final, [0.9, 0.6], atol=1e-6)
    assert scores.tolist() == pytest.approx([0.2, 0.6, 0.1])  # the caller's stay


def test_the_overlap_filter_acts_within_a_class_or_across_them() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10]]
    scores, labels = [0.9, 0.8, 0.7], [1, 1, 2]
    assert select(DetectionConfig(overlap=0.8), scores, labels, boxes) == [0, 2]
    assert select(DetectionConfig(overlap=0.8, class_agnostic=True), scores, labels, boxes) == [0]
    assert select(DetectionConfig(overlap=1.0), scores, labels, boxes) == [0, 1, 2]
    assert select(DetectionConfig(max_objects=2), scores, labels, boxes) == [0, 1]


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_nothing_at_or_below_the_least_score_is_ever_kept(seed: int, threshold: float, other: float) -> None:
    rng = np.random.default_rng(seed)
    xs, ys = np.sort(rng.choice(1001, (2, 4), replace=False) / 1000, axis=1)
    curve = list(zip(xs.tolist(), ys.tolist()))
    rule = DetectionRule(
        DetectionConfig(threshold={"cat": threshold, "couch": other}, calibration={"cat": curve}), NAMES
    )
    scores = rng.random(200).astype(np.float32)
    places, _ = rule.select(scores, rng.integers(1, 4, 200), np.zeros((200, 4), np.float32))
    assert (scores[places] > rule.least_score - 1e-6).all()


@pytest.fixture(scope="module")
def image() -> Any:
    return make_picture(120, 80)


def facts(found: Detections) -> tuple[list[str], np.ndarray, np.ndarray]:
    return found.names, found.scores, found.boxes


def assert_equal(one: Detections, other: Detections) -> None:
    assert one.names == other.names
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)


def test_settings_change_what_a_call_gives_and_a_call_may_say_otherwise(
    with_settings: Path, tiny_detr: Path, image: Any
) -> None:
    plain = Detector.from_pretrained(tiny_detr, device="cpu")
    own = Detector.from_pretrained(with_settings, device="cpu")
    config = own.detection_config
    assert len(plain(image, 0.0)) == 12
    assert 1 <= len(own(image)) <= 5
    assert_equal(plain.with_config(config)(image), own(image))
    assert plain.detection_config == DetectionConfig()  # with_config gave another one
    everything = own(image, 0.0, overlap=1.0, max_objects=100)
    assert sorted(everything.names) == sorted(plain(image, 0.0).names)
    options = {"threshold": {"cat": 0.3, "couch": 0.2}, "overlap": 0.6, "class_agnostic": True}
    by_call = plain.with_config(DetectionConfig(calibration=SETTINGS.calibration))(
        image, max_objects=5, **options
    )
    assert_equal(by_call, own(image))
    assert_equal(own.predict(image, 0).detections(), own(image))
    with pytest.raises(SettingError, match="'dog'"):
        own.detection_config = DetectionConfig(threshold={"dog": 0.5})


def test_masks_are_those_of_the_objects_that_the_settings_keep(tiny_panoptic: Path, image: Any) -> None:
    detector = Detector.from_pretrained(tiny_panoptic, device="cpu")
    everything = detector(image, 0.0)
    assert everything.masks is not None
    for config in (
        DetectionConfig(threshold=0.0, overlap=0.3, class_agnostic=True),
        DetectionConfig(threshold=0.4, calibration={"cat": [(0.0, 0.2), (1.0, 1.0)]}),
    ):
        found = detector.with_config(config)(image)
        assert found.masks is not None
        assert 0 < len(found) < len(everything)
        for box, mask in zip(found.boxes, found.masks):
            place = int(np.abs(everything.boxes - box).sum(1).argmin())
            np.testing.assert_array_equal(mask, everything.masks[place])


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_exported_model_keeps_the_settings(
    with_settings: Path, tmp_path: Path, image: Any, to: str
) -> None:
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[to])
    status = run(["export", str(tmp_path / "out"), "--model", str(with_settings), "--to", to, "--no-verify"])
    assert status == 0
    exported = Detector.from_pretrained(tmp_path / "out")
    assert exported.detection_config.decisions() == json.loads(json.dumps(SETTINGS.decisions()))
    assert_equal(exported(image), Detector.from_pretrained(with_settings, device="cpu")(image))


def test_the_command_the_endpoint_and_the_pipeline_use_the_settings(
    with_settings: Path, tmp_path: Path, image: Any
) -> None:
    image.save(tmp_path / "image.png")
    wanted = Detector.from_pretrained(with_settings, device="cpu")(image)
    output = tmp_path / "found.json"
    command = ["detect", str(tmp_path / "image.png"), "--model", str(with_settings), "--json", str(output)]
    assert run(command) == 0
    document = json.loads(output.read_text())
    assert [entry["score"] for entry in document["annotations"]] == pytest.approx(wanted.scores, abs=1e-4)
    assert document["info"]["overlap"] == 0.6
    assert document["info"]["threshold"] == {"cat": 0.3, "couch": 0.2}
    assert run([*command, "--overlap", "1", "--max-objects", "50", "--threshold", "0", "--overwrite"]) == 0
    assert len(json.loads(output.read_text())["annotations"]) == 12

    answer = EndpointHandler(str(with_settings))({"inputs": image})
    piped = pipeline("object-detection", model=str(with_settings), device="cpu")(image)
    for results in (answer, piped):
        assert [one["label"] for one in results] == wanted.names
        assert [one["score"] for one in results] == pytest.approx(wanted.scores, abs=1e-4)


def test_the_average_precision_has_the_filter_but_no_threshold_and_raw_has_neither(
    with_settings: Path, tiny_detr: Path, tmp_path: Path, image: Any
) -> None:
    image.save(tmp_path / "image.png")
    truth = Detector.from_pretrained(tiny_detr, device="cpu")(image, 0.0)
    annotations = [{**entry, "iscrowd": 0} for entry in truth.to_coco(1)]
    document = {
        "images": [{"id": 1, "file_name": "image.png", "width": 120, "height": 80}],
        "categories": [{"id": label, "name": name} for label, name in NAMES.items()],
        "annotations": annotations,
    }
    (tmp_path / "truth.json").write_text(json.dumps(document))
    own = Detector.from_pretrained(with_settings, device="cpu")
    filtered = evaluate_detector(own, tmp_path, tmp_path / "truth.json")
    raw = evaluate_detector(own, tmp_path, tmp_path / "truth.json", raw=True)
    assert raw.stats["AR100"] == 1.0
    assert filtered.stats["AR100"] < 1.0
    strict = own.with_config(own.detection_config.with_options(threshold=1.0))
    assert evaluate_detector(strict, tmp_path, tmp_path / "truth.json").stats == filtered.stats
    assert filtered.to_dict()["settings"]["overlap"] == 0.6  # type: ignore[index]


def test_an_export_over_another_model_does_not_inherit_its_settings(tiny_detr: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    out.mkdir()
    SETTINGS.save_pretrained(out)
    from detrkit.checkpoints.loading import load_pretrained

    model, processor = load_pretrained(str(tiny_detr), None)
    export_model(model, out, "onnx", processor=processor, verify=False)
    assert DetectionConfig.from_pretrained(out) == DetectionConfig()
