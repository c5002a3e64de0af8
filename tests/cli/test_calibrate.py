from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from detrkit import DetectionConfig, Detector
from detrkit.benchmark import speed_settings
from tests.cli.conftest import Run
from tests.cli.test_evaluate import annotations as annotations  # the fixture

FILES = {"config.json", "preprocessor_config.json", "model.safetensors", "detection_config.json"}


def test_a_model_is_copied_with_its_settings_or_gets_them_in_place(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calibrated"
    data = ["--images", pictures[0].parent, "--annotations", annotations, "--device", "cpu"]
    done = detrkit_here("calibrate", "--model", tiny_detr, "--output", output, *data)
    assert done.returncode == 0, done.stderr
    assert "Chosen on" in done.stderr
    assert {"F1", "AP50"} <= set(done.stdout.split())
    assert {path.name for path in output.iterdir()} >= FILES | {"calibration.png", "operating_points.csv"}
    detector = Detector.from_pretrained(output, device="cpu")
    assert detector.detection_config.chosen["data"].endswith("instances.json")
    plain = Detector.from_pretrained(tiny_detr, device="cpu")(pictures[0], 0.0)
    raw = detector.with_config(DetectionConfig(threshold=0.0))(pictures[0])
    np.testing.assert_allclose(raw.boxes, plain.boxes)

    card = (output / "README.md").read_text()
    assert f"copy of `{tiny_detr.name}`" in card
    assert str(tmp_path) not in card

    model = tmp_path / "model"
    shutil.copytree(tiny_detr, model)
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nIts AP is 12.3.\n")
    (model / "NOTICE").write_text("Pixels by somebody.\n")
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for _ in range(2):  # and again over its own files
        done = detrkit_here("calibrate", "--model", model, "--output", model, *data)
        assert done.returncode == 0, done.stderr
    assert json.loads((model / "detection_config.json").read_text())["chosen"]["images"] == len(pictures)
    assert all((model / name).read_bytes() == content for name, content in before.items())
    assert "README.md still describes the earlier settings" in done.stderr

    for _ in range(2):  # and again over its own files
        done = detrkit_here("calibrate", "--model", model, "--output", tmp_path / "copy", *data)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy" / "NOTICE").read_bytes() == before["NOTICE"]
    card = (tmp_path / "copy" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n> This is a copy of `model`")
    assert card.endswith("# Mine\n\nIts AP is 12.3.\n")
    assert "numbers below are the original's" in " ".join(card.split())


def test_mistakes_are_one_line_and_change_nothing(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    output = tmp_path / "calibrated"
    output.mkdir()
    (output / "detection_config.json").write_text('{"mine": 1}')
    data = ["--images", pictures[0].parent, "--annotations", annotations]
    for given, message in (
        (data, "which detrkit did not write"),
        ([*data, "--overwrite", "--confidence", "0.9"], "confidence requires recall"),
        ([*data, "--overwrite", "--recall", "0.9", "--confidence", "0.95"], "needs at least"),
        (["--images", pictures[0].parent], "pass either --data PATH"),
        ([*data, "--split", "val"], "--split requires --data"),
        ([*data, "--max-ms", "0"], "--max-ms must be a number of milliseconds above 0, not 0"),
        ([*data, "--max-ms", "nan"], "--max-ms must be a number of milliseconds above 0, not nan"),
        ([*data, "--max-ms", "9", "--recall", "0.9", "--confidence", "0.9"], "cannot guarantee a recall"),
        ([*data, "--max-ms", "9", "--overwrite"], "is not empty; choose a folder that does not exist yet"),
    ):
        done = detrkit_here("calibrate", "--model", tiny_detr, "--output", output, *given)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert (output / "detection_config.json").read_text() == '{"mine": 1}'
    assert len(list(output.iterdir())) == 1


def test_a_copy_never_lies_beside_an_exported_model_nor_is_one_made_faster(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    exported = tmp_path / "exported"
    shutil.copytree(tiny_detr, exported)
    (exported / "engine.json").write_text("{}")
    data = ["--images", pictures[0].parent, "--annotations", annotations, "--device", "cpu"]
    done = detrkit_here("calibrate", "--model", tiny_detr, "--output", exported, *data)
    assert done.returncode == 2
    assert "contains an exported model, which would stay in use" in done.stderr
    output = tmp_path / "fast"
    done = detrkit_here("calibrate", "--model", exported, "--output", output, *data, "--max-ms", "9")
    assert done.returncode == 2
    assert "pass the model that it was exported from" in done.stderr
    assert not output.exists()


def test_a_model_whose_settings_ask_for_tiles_has_no_time_per_image(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], annotations: Path, tmp_path: Path
) -> None:
    tiled = tmp_path / "tiled"
    shutil.copytree(tiny_detr, tiled)
    DetectionConfig(tile_size=64).save_pretrained(tiled)
    data = ["--images", pictures[0].parent, "--annotations", annotations, "--device", "cpu"]
    done = detrkit_here("calibrate", "--model", tiled, "--output", tmp_path / "fast", *data, "--max-ms", "9")
    assert done.returncode == 2
    assert "the model's settings cut them into tiles" in done.stderr


@pytest.mark.slow
def test_a_model_for_a_time_is_written_and_a_time_that_is_too_short_refused(
    detrkit_here: Run,
    tiny_detr: Path,
    pictures: list[Path],
    annotations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed_settings, "SIZES", (1.0, 0.5))
    output = tmp_path / "fast"
    data = ["--images", pictures[0].parent, "--annotations", annotations, "--device", "cpu"]
    given = ["calibrate", "--model", tiny_detr, "--output", output, *data, "--engine", "torch"]
    done = detrkit_here(*given, "--max-ms", "0.001")
    assert done.returncode == 2
    assert "no setting takes at most 0.001 ms an image on this machine; the fastest" in done.stderr
    assert not output.exists()

    done = detrkit_here(*given, "--max-ms", "100000")  # which no machine needs
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chosen") == 1
    assert "Chosen for at most 100000 ms: input " in done.stderr
    assert {path.name for path in output.iterdir()} >= FILES | {"speed.csv", "README.md", "calibration.png"}
    assert "run as `--max-ms 100000` chose" in " ".join((output / "README.md").read_text().split())
    speed = Detector.from_pretrained(output, device="cpu").detection_config.chosen["speed"]
    config = json.loads((output / "config.json").read_text())
    assert config["decoder_layers"] == speed["layers"]
    done = detrkit_here("detect", pictures[0], "--model", output, "--device", "cpu")
    assert done.returncode == 0, done.stderr
