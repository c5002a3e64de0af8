"""An exported folder runs where PyTorch is not installed, and gives what the full installation gives."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit import Detector, DetrConfig, DetrForSegmentation, DetrImageProcessor, rgb_to_id
from detrkit.common.without_torch import FULL_INSTALLATION, explained
from detrkit.engines.export import export_model
from tests.conftest import make_picture
from tests.exported import SIZE, write_exported
from tests.tiny import shake, tiny_config

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements" / "runtime.txt"

# An import of one of these fails as if it were not installed; nor are these of a small installation.
MISSING = sorted({*FULL_INSTALLATION, "pandas", "matplotlib", "accelerate", "pydantic_settings"})
HIDE = f"import sys\nfor name in {MISSING}: sys.modules[name] = None\n"

RESULTS = """
import numpy as np
from detrkit import Detector

detector = Detector.from_pretrained(sys.argv[1])
images = sys.argv[3:]
found = detector(images, threshold=0.2, batch_size=2, overlap=0.9)
segmented = detector.segment(images, threshold=0.3)
tables = {}
for number, (objects, segments) in enumerate(zip(found, segmented)):
    tables |= {f"boxes{number}": objects.boxes, f"scores{number}": objects.scores}
    tables |= {f"labels{number}": objects.labels, f"masks{number}": objects.masks}
    tables |= {f"ids{number}": segments.ids, f"areas{number}": [s["area"] for s in segments.segments]}
    tables[f"drawing{number}"] = np.asarray(segments.draw())
np.savez(sys.argv[2], **tables)
"""


def run_python(code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of an exported model with masks."""
    return write_exported(tmp_path_factory.mktemp("exported"), is_thing_map={"1": False, "2": False})


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Two sizes, so that one image is larger than the model sees it and another smaller."""
    where = tmp_path_factory.mktemp("images")
    sizes = [(300, 200), (61, 80), (300, 200)]
    for number, size in enumerate(sizes):
        make_picture(*size, seed=number).save(where / f"{number}.png")
    return [where / f"{number}.png" for number in range(len(sizes))]


def results_of(prelude: str, folder: Path, images: list[Path], out: Path) -> dict[str, np.ndarray]:
    run_python(prelude + RESULTS, folder, out, *images)
    return dict(np.load(out))


def test_results_are_those_of_the_full_installation(folder, images, tmp_path) -> None:
    small = results_of(HIDE, folder, images, tmp_path / "small.npz")
    full = results_of("import sys, torch, transformers\n", folder, images, tmp_path / "full.npz")
    assert small.keys() == full.keys()
    for name, expected in full.items():
        np.testing.assert_array_equal(small[name], expected, err_msg=name)
    assert len(small["boxes0"]) > 1
    assert small["masks0"].any()
    assert len(small["areas0"]) > 1


def test_commands_run_and_start_without_pytorch_in_every_installation(folder, images, tmp_path) -> None:
    truth = {
        "images": [
            {"id": i, "file_name": path.name, "width": size[0], "height": size[1]}
            for i, (path, size) in enumerate(zip(images, [(300, 200), (61, 80), (300, 200)]))
        ],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 2, "bbox": [5, 5, 30, 40], "area": 1200, "iscrowd": 0}
            for i in range(3)
        ],
        "categories": [{"id": 2, "name": "class 2"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    code = """
from pathlib import Path
from detrkit.cli import run

out, model, images = Path(sys.argv[2]), sys.argv[1], sys.argv[3:]
for name, arguments in {
    "detect": ["detect", *images, "-t", "0.2", "--json", f"{out}/objects.json", "--save-dir", f"{out}/drawn"],
    "segment": ["segment", *images, "-t", "0.3", "--save-dir", f"{out}/segments"],
    "evaluate": ["evaluate", "--images", str(Path(images[0]).parent), "--annotations", f"{out}/../truth.json",
                 "--json", f"{out}/metrics.json"],
}.items():
    assert run([*arguments, "-m", model]) == 0, name
loaded = {"torch", "torchvision", "transformers", "timm", "scipy"}
print(*(name for name in loaded if sys.modules.get(name) is not None))
"""
    documents = []
    for name, prelude in {"small": HIDE, "full": "import sys\n"}.items():
        out = tmp_path / name
        out.mkdir()
        done = run_python(prelude + code, folder, out, *images)
        assert done.stdout.splitlines()[-1:] in ([], [""]), done.stdout
        parts = [json.loads((out / f"{part}.json").read_text()) for part in ("objects", "metrics")]
        parts.append(json.loads((out / "segments" / "panoptic.json").read_text()))
        for part in parts[:2]:
            part["info"].pop("date")
        parts[1].pop("annotations")
        parts[1].pop("seconds_per_image")
        documents.append(parts)
    assert documents[0] == documents[1]
    assert len(documents[0][0]["annotations"]) > 9


TRAIN = "train --train-images x --train-annotations x --val-images x --val-annotations x --output out"


@pytest.mark.parametrize(
    ("command", "begins"),
    [
        (f"{TRAIN} -m blood-cells", "detrkit train needs PyTorch"),
        ("convert x.pth out --model detr-resnet-50", "detrkit convert needs PyTorch"),
        ("export out -m blood-cells --to onnx", "detrkit export needs PyTorch"),
        ("benchmark -m blood-cells", "detrkit benchmark needs PyTorch"),
        ("explain IMAGE -m blood-cells --save-dir out", "detrkit explain needs PyTorch"),
        ("detect IMAGE -m detr-resnet-50", "facebook/detr-resnet-50 is not the folder of an exported model"),
        ("detect IMAGE -m blood-cells", "BLOOD-CELLS is not the folder of an exported model"),
        ("detect IMAGE -m FOLDER --engine torch", "the engine 'torch' needs PyTorch"),
        ("segment IMAGE -m blood-cells", "BLOOD-CELLS is not the folder of an exported model"),
    ],
)
def test_what_needs_pytorch_says_so_in_one_line(folder, images, tmp_path, command: str, begins: str) -> None:
    code = HIDE + "from detrkit.cli import run\nsys.exit(run(sys.argv[1:]))"
    names = {"IMAGE": str(images[0]), "FOLDER": str(folder)}
    arguments = [names.get(word, word) for word in command.split()]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    from detrkit.checkpoints.registry import BUNDLED

    wanted = begins.replace("BLOOD-CELLS", str(BUNDLED["blood-cells"]))
    assert done.stderr.startswith(f"Error: {wanted}")
    assert done.stderr.endswith("for all of detrkit run in its checkout: pip install .\n")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_names_that_need_pytorch_say_so() -> None:
    code = HIDE + "import detrkit\ntry: detrkit.DetrForObjectDetection\nexcept ImportError as e: print(e)"
    said = run_python(code).stdout
    assert said.startswith("detrkit.DetrForObjectDetection needs PyTorch, which is not installed")


def test_a_missing_runtime_is_installed_alone_where_pytorch_is_missing(folder) -> None:
    code = "sys.modules['onnxruntime'] = None\nfrom detrkit import Detector\n"
    code += "try: Detector.from_pretrained(sys.argv[1])\nexcept ImportError as error: print(error)"
    wanted = "the engine 'onnx' needs onnxruntime, which is not installed; run: pip install onnxruntime\n"
    assert run_python(HIDE + code, folder).stdout == wanted
    assert "pip install '.[export]'" in run_python("import sys\n" + code, folder).stdout


def test_only_packages_of_the_full_installation_are_explained() -> None:
    assert explained(ModuleNotFoundError("no", name="nowhere"), "this") is None
    assert explained(ImportError("no", name="torch"), "this") is None
    assert "this needs timm" in str(explained(ModuleNotFoundError("no", name="timm.models"), "this"))


def _bounds(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\s*\"?([\w-]+)(?:\[[\w,]+\])?>=([\d.]+)", text, re.MULTILINE))


def test_the_small_installation_has_the_lower_bounds_of_the_full_one() -> None:
    small = _bounds(REQUIREMENTS.read_text(encoding="utf-8"))
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8").replace(", ", "\n").replace("[", "\n")
    full = _bounds(listed)
    assert {"numpy", "pillow", "onnxruntime", "typer"} <= small.keys()
    assert {name: full[name] for name in small if name in full} == {
        name: bound for name, bound in small.items() if name in full
    }


@pytest.mark.slow
def test_a_small_installation_runs_an_exported_folder(images, tmp_path) -> None:
    torch.manual_seed(0)
    config = tiny_config(DetrConfig, encoder_attention_heads=8, encoder_layers=1, decoder_layers=1)
    model, processor = shake(DetrForSegmentation(config)).eval(), DetrImageProcessor(size=SIZE)
    with torch.no_grad():
        model.detector.class_labels_classifier.weight.mul_(6)
        model.detector.class_labels_classifier.bias[-1] = -20  # no-object
    folder = export_model(model, tmp_path / "model", "onnx", processor=processor).folder
    place = tmp_path / "venv"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*arguments: object) -> str:
        command = [str(python), "-m", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("pip", "install", "-q", "--no-deps", ROOT)
    call("pip", "install", "-q", "-r", REQUIREMENTS)
    installed = {entry["name"] for entry in json.loads(call("pip", "list", "--format", "json"))}
    assert not installed & {"torch", "transformers", "scipy"}
    size = sum(path.lstat().st_size for path in place.rglob("*") if path.is_file())
    assert size < 300e6
    found = json.loads(call("detrkit", "detect", *images, "-m", folder, "-t", 0.2, "--json", "-"))
    engine = Detector(model, processor, device="cpu")
    wanted = [row for image in images for row in engine(image, 0.2).to_coco()]
    assert len(found["annotations"]) == len(wanted) > 9
    for ours, theirs in zip(found["annotations"], wanted):
        assert ours["category_id"] == theirs["category_id"]
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=0.05)
    call("detrkit", "segment", *images, "-m", folder, "-t", 0.3, "--save-dir", "segments")
    ids = rgb_to_id(np.asarray(Image.open(tmp_path / "segments" / "panoptic" / "0.png")))
    segments = engine.segment(images[0], 0.3)
    assert len(segments) > 1
    assert (ids != segments.ids).mean() < 0.03  # where masks are nearly equal
