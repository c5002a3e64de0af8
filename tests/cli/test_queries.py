"""``--queries``: more proposals of a two-stage model, in every command that takes the option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.conftest import make_picture, read_json
from tests.tiny import FAMILIES


@pytest.fixture(scope="module")
def two_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["deformable_detr_two_stage"].save(tmp_path_factory.mktemp("two_stage"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    make_picture(120, 80).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_detect_records_the_number_and_resumes_no_run_of_another(
    detrkit_here: Run, two_stage: Path, image: Path, tmp_path: Path
) -> None:
    command = ["detect", image, "--model", two_stage, "-t", 0, "--max-objects", 500]
    command += ["--json", tmp_path / "out.json"]
    assert detrkit_here(*command, "--queries", 30).returncode == 0
    many = read_json(tmp_path / "out.json")
    assert many["info"]["queries"] == 30
    done = detrkit_here(*command, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "made with queries 30, not None" in done.stderr
    assert detrkit_here(*command).returncode == 0
    few = read_json(tmp_path / "out.json")
    assert few["info"]["queries"] is None
    assert len(few["annotations"]) < len(many["annotations"])


def test_evaluate_measures_the_model_with_that_number(
    detrkit_here: Run, two_stage: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import detrkit.evaluation

    used: list[int] = []
    evaluate = detrkit.evaluation.evaluate_dataset

    def watched(detector: Any, *args: Any, **options: Any) -> Any:
        used.append(detector.config.object_queries)
        return evaluate(detector, *args, **options)

    monkeypatch.setattr(detrkit.evaluation, "evaluate_dataset", watched)
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 40], "area": 2000}
    truth = {
        "images": [{"id": 1, "file_name": image.name, "width": 120, "height": 80}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{**annotation, "iscrowd": 0}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    command = [
        "evaluate",
        "--model",
        two_stage,
        "--images",
        tmp_path,
        "--annotations",
        tmp_path / "truth.json",
    ]
    done = detrkit_here(*command, "--queries", 30, "--json", tmp_path / "ap.json")
    assert done.returncode == 0, done.stderr
    assert (used, read_json(tmp_path / "ap.json")["info"]["queries"]) == ([30], 30)


def test_export_passes_the_model_with_that_number_on(
    detrkit_here: Run, two_stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from detrkit.engines import export, transformers_js

    exported: list[int] = []

    def note(model: Any, *args: Any, **options: Any) -> Any:
        exported.append(model.config.object_queries)
        return SimpleNamespace(differences={"logits": 0.0})

    monkeypatch.setattr(export, "export_model", note)
    monkeypatch.setattr(transformers_js, "export_for_transformers_js", note)
    for target in ("onnx", "transformers.js"):
        command = ["export", tmp_path / "out", "--model", two_stage, "--to", target, "--queries", 30]
        assert detrkit_here(*command).returncode == 0
    assert exported == [30, 30]


def test_an_exported_model_keeps_its_number(detrkit_here: Run, image: Path, tmp_path: Path) -> None:
    from tests.exported import QUERIES, write_exported

    folder = tmp_path / "exported"
    folder.mkdir()
    write_exported(folder)
    done = detrkit_here("detect", image, "--model", folder, "--queries", 30)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"exported with, {QUERIES}; export it again with --queries 30" in done.stderr
    assert detrkit_here("detect", image, "--model", folder, "--queries", QUERIES).returncode == 0


def test_servers_load_their_models_with_that_number(two_stage: Path) -> None:
    from detrkit.serving.local import load_detector
    from detrkit.serving.settings import ModelSettings

    settings = ModelSettings(models={"tiny": str(two_stage)}, queries=30)
    assert load_detector(str(two_stage), settings).config.object_queries == 30  # type: ignore[attr-defined]
