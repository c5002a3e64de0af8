"""``detrkit export`` writes a folder that the other commands run."""

import json
import shutil
from pathlib import Path

import pytest

from detrkit import DetectionConfig
from tests.cli.conftest import Run
from tests.conftest import read_json

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_an_exported_folder_detects_the_same_without_the_torch_weights(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path, to: str
) -> None:
    folder = tmp_path / "exported"
    done = detrkit_here("export", "--model", tiny_detr, "--to", to, folder)
    assert (done.returncode, done.stdout) == (0, "")
    assert "the results differ from PyTorch's by at most" in done.stderr
    assert not list(folder.glob("*.safetensors"))
    documents = []
    for model in (tiny_detr, folder):
        file = tmp_path / "found.json"
        settings = ("--threshold", 0.3, "--batch-size", 2, "--device", "cpu", "--json", file)
        done = detrkit_here("detect", *pictures, "--model", model, *settings)
        assert done.returncode == 0, done.stderr
        documents.append(read_json(file))
    expected, found = documents
    assert len(found["annotations"]) == len(expected["annotations"]) > 10
    for ours, theirs in zip(found["annotations"], expected["annotations"]):
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)


def test_a_folder_for_transformers_js_is_not_written_over_other_files_and_its_settings_are_told(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_detr, tmp_path / "model")
    DetectionConfig(threshold=0.4, overlap=0.8).save_pretrained(model)
    command = ("export", "--model", model, "--to", "transformers.js", "--no-verify", tmp_path / "js")
    done = detrkit_here(*command)
    assert (done.returncode, done.stdout) == (0, "")
    assert "pass {threshold: 0.4}; not applied: overlap filter (0.8)" in done.stderr
    files = {path.name for path in (tmp_path / "js").rglob("*") if path.is_file()}
    assert files == {"config.json", "preprocessor_config.json", "detection_config.json", "model.onnx"}
    assert read_json(tmp_path / "js" / "config.json")["transformers.js_config"] == {"dtype": "fp32"}

    (tmp_path / "js" / "onnx" / "model.onnx").write_bytes(b"somebody's")
    done = detrkit_here(*command)
    assert done.returncode == 2
    assert "would overwrite" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "detr-resnet-5", "--to", "onnx"), "detr-resnet-50"),
        (("--model", "{model}", "--to", "tflite"), "onnx, openvino, transformers.js"),
        (("--model", "{model}", "--to", "transformers.js", "--calibration", "."), "needs no calibration"),
        (("--model", "{model}"), "--to"),
        (("--model", "{model}", "--to", "openvino", "--int8"), "--calibration"),
        (("--model", "{model}", "--to", "openvino", "--calibration", "."), "require --int8"),
        (("--model", "{model}", "--to", "onnx", "--int8", "--calibration", "."), "int8 is for OpenVINO only"),
        (
            ("--model", "{model}", "--to", "openvino", "--int8", "--calibration", "."),
            "no images in this folder",
        ),
        (("--model", "{model}", "--to", "openvino", "--int8", "--calibration", "gone"), "not found: gone"),
    ],
)
def test_mistakes_give_one_line_and_status_2(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [argument.format(model=tiny_detr) for argument in arguments]
    done = detrkit_here("export", *given, tmp_path / "exported")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_int8_is_calibrated_on_a_folder_and_its_cost_is_told(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("nncf")
    pytest.importorskip("faster_coco_eval")
    (pictures[0].parent / "broken.jpg").write_bytes(b"no picture")
    document = {
        "images": [{"id": 1, "file_name": "wide.jpg", "width": 120, "height": 80}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 20, 50, 40], "area": 2000, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    annotations, folder = tmp_path / "boxes.json", tmp_path / "exported"
    annotations.write_text(json.dumps(document))
    settings = ("--int8", "--calibration", pictures[0].parent, "--annotations", annotations)
    done = detrkit_here("export", "--model", tiny_detr, "--to", "openvino", *settings, folder)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert lines[0] == ["AP", "AP50", "AP75"]
    assert [line[0] for line in lines if len(line) == 4] == ["float32", "int8", "difference"]
    assert "broken.jpg" in done.stderr
    assert f"Calibrated int8 on 4 images of {pictures[0].parent}" in done.stderr
    assert read_json(folder / "engine.json")["precision"] == "int8"


def test_a_calibration_without_any_readable_image_is_one_error(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nncf")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"no picture")
    settings = ("--int8", "--calibration", tmp_path / "pictures")
    done = detrkit_here("export", "--model", tiny_detr, "--to", "openvino", *settings, tmp_path / "exported")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no image in" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "exported").exists()


def test_an_exported_folder_has_no_weights_for_torch(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(tiny_detr, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    manifest = '{"engine": "onnx", "file": "model.onnx", "outputs": [], "precision": "float32"}'
    (folder / "engine.json").write_text(manifest)
    done = detrkit_here("detect", pictures[0], "--model", folder, "--engine", "torch")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "exported for the engine 'onnx', which 'torch' cannot run" in done.stderr
