"""Stored tiles where only whole images are looked at: honoured or refused, never ignored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import detrkit
from detrkit import DetectionConfig, Detector
from detrkit.cli import run
from detrkit.errors import SettingError
from tests.conftest import make_picture

REFUSED = "which the model's settings cut into tiles of 80x60"
CONFIG = DetectionConfig(threshold=0.3, tile_size=(60, 80))


@pytest.fixture(scope="module")
def folder(tiny_panoptic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with masks whose settings ask for tiles."""
    copy = tmp_path_factory.mktemp("tiled") / "model"
    shutil.copytree(tiny_panoptic, copy)
    CONFIG.save_pretrained(copy)
    return copy


@pytest.fixture(scope="module")
def detector(folder: Path) -> Detector:
    return Detector.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def large() -> Image.Image:
    return make_picture(150, 110, seed=3)


@pytest.fixture(scope="module")
def small() -> Image.Image:
    return make_picture(80, 60, seed=3)


def test_segments_predictions_and_prepared_images_are_of_whole_images(
    detector: Detector, large: Image.Image, small: Image.Image
) -> None:
    looks = [
        detector.segment,
        detector.predict,
        lambda image: list(detector.stream_segments([image])),
        lambda image: list(detector.stream_predictions([image])),
        lambda image: detector(detector.prepare(image)),
        lambda image: detector.predict(image, attentions=True),
    ]
    for look in looks:
        look(small)
        with pytest.raises(SettingError, match=REFUSED):
            look(large)
    whole = detector.with_config(detector.detection_config, tiles=0)
    for look in (whole.segment, whole.predict):
        look(large)


@pytest.mark.parametrize("task", ["object-detection", "image-segmentation"])
def test_pipelines_refuse_an_image_that_is_to_be_cut(
    folder: Path, large: Image.Image, small: Image.Image, task: str
) -> None:
    pipe = detrkit.pipeline(task, model=str(folder), device="cpu")
    pipe(small)
    with pytest.raises(SettingError, match=REFUSED):
        pipe(large)


@pytest.mark.parametrize("command", ["segment", "explain"])
def test_commands_for_whole_images_refuse_unless_told_otherwise(
    folder: Path, large: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    large.save(tmp_path / "large.png")
    arguments = [
        command,
        str(tmp_path / "large.png"),
        "--model",
        str(folder),
        "--save-dir",
        str(tmp_path / "out"),
    ]
    assert run(arguments) == 2
    said = capsys.readouterr().err
    assert REFUSED in said
    assert said.count("\n") == 1
    assert run([*arguments, "--tiles", "0"]) == 0
    capsys.readouterr()
    assert run([*arguments, "--tiles", "auto"]) == 2


def test_a_prediction_in_tiles_gives_at_each_threshold_what_a_call_gives(
    detector: Detector, large: Image.Image
) -> None:
    prediction = detector.predict_in_tiles(large, 0.1)
    assert len(prediction.detections(0.1)) > len(prediction.detections())
    for threshold in (0.1, 0.3, 0.6, None):
        called = detector(large, threshold=threshold, masks=False)
        found = prediction.detections(threshold)
        assert found.boxes.tobytes() == called.boxes.tobytes()
        assert (found.scores.tolist(), found.names) == (called.scores.tolist(), called.names)
    with pytest.raises(SettingError, match=r"at least 0\.1, which the model was run for"):
        prediction.detections(0.05)


def test_the_page_cuts_as_the_command_does(detector: Detector, large: Image.Image, tmp_path: Path) -> None:
    from detrkit.demo.results import Result

    large.save(tmp_path / "large.png")
    result = Result.of(str(tmp_path / "large.png"), "large.png", detector, "model")
    document = result.boxes(None).document
    assert document is not None
    assert len(document["annotations"]) == len(detector(large, masks=False)) > 0
    for look in (lambda: result.segments(0.85), result.look_inside):
        with pytest.raises(SettingError, match=REFUSED):
            look()
