"""The same 40 images of blood cells as many tools export them give the same counts, training and AP."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from detrkit.evaluation.coco import STATISTICS
from tests.cli.conftest import Run
from tests.conftest import read_json
from tests.data import test_layouts
from tests.data.test_layouts import LAYOUTS
from tests.golden import DATA, needs_data
from tests.training.test_run import read_metrics

pytestmark = [needs_data, pytest.mark.slow]

IMAGES = 40
EXPORTERS = (
    *("Roboflow", "CVAT", "Label Studio", "LabelMe", "VIA", "Datumaro", "FiftyOne"),
    *("YOLO", "Pascal VOC", "Hugging Face", "image folder"),
)
_NEW_MODEL = (
    *("--model", "deformable-detr", "--from-scratch", "--backbone", "resnet18", "--d-model", 32),
    *("--encoder-layers", 1, "--decoder-layers", 1, "--queries", 20, "--image-size", 64),
    *("--epochs", 1, "--batch-size", 4, "--learning-rate", 1e-3, "--workers", 0, "--device", "cpu"),
)


# Counts by class, numbers of the evaluation, and rows of the training's log.
Measured = tuple[list[list[str]], dict[str, float], list[dict[str, str]]]


def forty_images() -> dict:
    """The first images of BCCD's training split, and their objects."""
    document = read_json(DATA / "bccd" / "annotations" / "instances_train.json")
    images = document["images"][:IMAGES]
    kept = {image["id"] for image in images}
    return {
        "images": images,
        "annotations": [entry for entry in document["annotations"] if entry["image_id"] in kept],
        "categories": document["categories"],
    }


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the images in a layout; gives the folder and the split."""
    monkeypatch.setattr(test_layouts, "plain_document", forty_images)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(name: str) -> tuple[Path, str]:
        folder, writers, split = LAYOUTS[name]
        root = tmp_path / re.sub(r"\W+", "-", name)
        (root / folder).mkdir(parents=True)
        for image in forty_images()["images"]:
            shutil.copy(DATA / "bccd" / "train" / image["file_name"], root / folder)
        for writer in writers if isinstance(writers, list) else [writers]:
            writer(root)
        return root, split

    return make


def measured(run: Run, root: Path, split: str, out: Path) -> Measured:
    """What `data check` prints, `evaluate` gives and `train` logs."""
    check = run("data", "check", root)
    assert check.returncode == 0, check.stderr
    counts = [line.split() for line in check.stdout.splitlines()]
    counts = [line for line in counts if line and line[0] in ("Platelets", "RBC", "WBC")]
    common = ("--data", root, "--device", "cpu")
    done = run("evaluate", "--model", "blood-cells", *common, "--split", split, "--limit", 4,
               "--json", out / "numbers.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("train", "--data", root, *_NEW_MODEL, "--val-fraction", 0.25, "--output", out / "model")
    assert done.returncode == 0, done.stderr
    return counts, read_json(out / "numbers.json")["boxes"], read_metrics(out / "model")


@pytest.fixture(scope="module")
def known() -> dict[str, Measured]:
    """What the plain COCO file gives, once the first test has measured it."""
    return {}


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_exporter_gives_the_same_counts_training_and_ap(
    name: str, detrkit_here: Run, write: Callable[[str], tuple[Path, str]], tmp_path: Path, known: dict
) -> None:
    if not known:
        known["COCO"] = measured(detrkit_here, *write("COCO"), tmp_path / "expected")
        assert len(known["COCO"][0]) == 3
        assert known["COCO"][1]["AP"] > 0.4
    expected_counts, expected_boxes, expected_rows = known["COCO"]
    counts, boxes, rows = measured(detrkit_here, *write(name), tmp_path / "found")
    assert counts == expected_counts
    for key in STATISTICS:
        assert boxes[key] == pytest.approx(expected_boxes[key], abs=1e-9), key
    assert len(rows) == len(expected_rows)
    for row, expected in zip(rows, expected_rows):
        assert row.keys() == expected.keys()
        for key, value in row.items():
            assert float(value or 0) == pytest.approx(float(expected[key] or 0), abs=1e-4), key
