from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from detrkit import Detector
from detrkit.training import TrainingRecipe
from detrkit.training.recipe import flag_of
from tests.cli.conftest import Run
from tests.golden import IMAGES
from tests.training.conftest import make_dataset


def options(model: object, annotations: Path, output: Path, *more: object) -> list[object]:
    images = annotations.parent / "images"
    return [
        *("train", "--model", model, "--output", output),
        *("--train-images", images, "--train-annotations", annotations),
        *("--val-images", images, "--val-annotations", annotations),
        *("--epochs", 1, "--batch-size", 2, "--workers", 0, "--device", "cpu", *more),
    ]


def test_every_field_of_the_recipe_is_an_option(detrkit_here: Run) -> None:
    # Wide enough that no name is broken.
    done = detrkit_here("train", "--help")
    assert done.returncode == 0
    for field in fields(TrainingRecipe):
        assert flag_of(field.name)[:12] in done.stdout, field.name


def test_a_checkpoint_is_trained_and_used(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, pictures: list[Path]
) -> None:
    annotations = make_dataset(tmp_path / "data", count=4)
    done = detrkit_here(*options(tiny_detr, annotations, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Epoch 1 of 1: loss" in done.stderr
    assert "shards" not in done.stderr
    used = detrkit_here("detect", pictures[0], "--model", tmp_path / "run")
    assert used.returncode == 0, used.stderr


def test_a_misspelt_option_is_suggested(detrkit_here: Run) -> None:
    done = detrkit_here("train", "--lerning-rate", "1e-4")
    assert done.returncode == 2
    assert "--learning-rate" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("other", "name"), [("--lr", "--learning-rate"), ("--imgsz", "--image-size")])
def test_the_name_of_an_option_in_other_programs_is_explained(
    detrkit_here: Run, other: str, name: str
) -> None:
    done = detrkit_here("train", other, "1")
    assert done.returncode == 2
    assert f"{other}; did you mean {name}?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "--epochs"),
        (("--schedule", "cosinus"), "cosine"),
        (("--freeze", "detector"), "--masks"),
        (("--mosaic", 2), "--mosaic"),
    ],
)
def test_a_wrong_value_gives_one_line(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    done = detrkit_here(*options(tiny_detr, tmp_path / "none.json", tmp_path / "run", *arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_misspelt_model_is_suggested(detrkit_here: Run, tmp_path: Path) -> None:
    done = detrkit_here(*options("detr-resnet-5", tmp_path / "none.json", tmp_path / "run"))
    assert done.returncode == 2
    assert "detr-resnet-50" in done.stderr


def broken(document: dict, kind: str) -> object:
    """What the annotation file holds instead, and what the message says of it."""
    if kind == "no json":
        return "{"
    if kind == "boxes without area":
        for entry in document["annotations"]:
            entry["bbox"][2] = 0
    if kind == "no categories":
        document["categories"] = []
    if kind == "missing images":
        for entry in document["images"]:
            entry["file_name"] = "gone-" + entry["file_name"]
    return json.dumps(document)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no json", "not a JSON file"),
        ("boxes without area", "box without area"),
        ("no categories", "category"),
        ("missing images", "image file missing"),
    ],
)
def test_a_broken_data_set_gives_one_line(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, kind: str, message: str
) -> None:
    annotations = make_dataset(tmp_path / "data", count=3)
    annotations.write_text(str(broken(json.loads(annotations.read_text()), kind)))
    done = detrkit_here(*options(tiny_detr, annotations, tmp_path / "run"))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_strict_refuses_a_small_flaw(detrkit_here: Run, tiny_detr: Path, tmp_path: Path) -> None:
    annotations = make_dataset(tmp_path / "data", count=3)
    document = json.loads(annotations.read_text())
    document["annotations"][0]["bbox"][2] = 0
    annotations.write_text(json.dumps(document))
    done = detrkit_here(*options(tiny_detr, annotations, tmp_path / "run", "--strict"))
    assert done.returncode == 2
    assert "has problems" in done.stderr


@pytest.mark.parametrize("family", ["detr", "conditional_detr", "deformable_detr"])
def test_real_images_and_their_classes(
    detrkit_here: Run, request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    model = request.getfixturevalue(f"tiny_{family}")
    document = json.loads(IMAGES[0].document.read_text())
    used = {entry["category_id"] for entry in document["annotations"]}
    document["categories"] = [entry for entry in document["categories"] if entry["id"] in used]
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(document))
    (tmp_path / "images").mkdir()
    for image in document["images"]:
        (case,) = (case for case in IMAGES if case.image.name == image["file_name"])
        (tmp_path / "images" / case.image.name).symlink_to(case.image)
    done = detrkit_here(*options(model, annotations, tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    names = {entry["name"] for entry in document["categories"]}
    assert set(Detector.from_pretrained(tmp_path / "run").names.values()) == names
