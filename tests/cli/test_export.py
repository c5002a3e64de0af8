"""``detrkit export`` writes a folder that the other commands run."""

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.conftest import read_json

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.mark.parametrize("to", ["onnx", "openvino"])
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "detr-resnet-5", "--to", "onnx"), "detr-resnet-50"),
        (("--model", "{model}", "--to", "tflite"), "onnx, openvino"),
        (("--model", "{model}"), "--to"),
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
