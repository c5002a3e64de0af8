"""Data sets of a run: how they are given and split, and what they share with each other and the model."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit import Detector, DetrForSegmentation
from detrkit.data.coco import DetectionDataset
from detrkit.errors import AnnotationError, SettingError
from detrkit.training import train
from detrkit.training.preparation import build_model, read_datasets


def test_validation_images_with_unknown_classes_are_refused(recipe, annotations, tmp_path):
    document = json.loads(annotations.read_text())
    document["categories"][0]["name"] = "ring"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=r"other\.json.*3 \(ring\).*training data does not have"):
        train(recipe(val_annotations=other))


@pytest.mark.parametrize("freeze", ["default", "detector"])
def test_masks_are_trained_and_measured(recipe, tiny_panoptic, freeze):
    result = train(recipe(model=str(tiny_panoptic), masks=True, freeze=freeze, epochs=1, ema_decay=0))
    assert {"AP", "mask_AP", "loss_mask", "loss_dice"} <= {name for row in result.rows for name in row}
    before, after = (DetrForSegmentation.from_pretrained(f) for f in (tiny_panoptic, result.folder))
    changed = {
        n
        for n, p in before.named_parameters()
        if not torch.equal(p, after.get_parameter(n)) and p.shape == after.get_parameter(n).shape
    }
    assert any(name.startswith("mask_head") for name in changed)
    assert any(name.startswith("detr.model.encoder") for name in changed) == (freeze == "default")


def test_a_model_that_has_the_classes_keeps_its_head(recipe, annotations, tmp_path):
    first = train(recipe(epochs=1))
    document = json.loads(annotations.read_text())
    document["categories"].reverse()
    for category, number in zip(document["categories"], (1, 2)):
        for entry in document["annotations"]:
            if entry["category_id"] == category["id"]:
                entry["category_id"] = number + 100
        category["id"] = number + 100
    other = tmp_path / "renumbered.json"
    other.write_text(json.dumps(document))
    options = {"train_annotations": other, "val_annotations": other, "learning_rate": 0, "ema_decay": 0}
    second = train(recipe(model=str(first.folder), output=tmp_path / "second", epochs=1, **options))
    assert Detector.from_pretrained(second.folder).names == {0: "disc", 1: "square"}
    # Nothing was learnt, so the numbers are the same although the file numbers its categories otherwise.
    assert second.best["AR100"] == pytest.approx(first.best["AR100"], abs=1e-9)


def test_a_class_head_that_is_replaced_is_pointed_out(recipe, annotations, tmp_path, caplog):
    first = train(recipe(epochs=1))
    document = json.loads(annotations.read_text())
    document["categories"][0]["name"] = "discs"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    build_model(
        recipe(model=str(first.folder)), DetectionDataset.from_coco(annotations.parent / "images", other)
    )
    assert "classes differ: only in the data discs; only in the model disc" in caplog.text


def test_data_sets_can_be_given_instead_of_files(recipe, annotations):
    data = DetectionDataset.from_coco(annotations.parent / "images", annotations)
    chosen = recipe(train_annotations="none.json", val_annotations="none.json", epochs=1)
    assert len(train(chosen, train_dataset=data, val_dataset=data).rows) == 3


def test_one_data_set_is_split_where_it_has_no_validation_images(recipe, annotations):
    none = dict.fromkeys(("train_images", "train_annotations", "val_images", "val_annotations"))
    chosen = recipe(**none, data=str(annotations), val_fraction=0.4, epochs=1)
    assert "AP" in train(chosen).best
    split = json.loads((chosen.output / "split.json").read_text())
    assert sorted(split["train"] + split["val"]) == [f"{i}.png" for i in range(1, 7)]
    assert len(split["val"]) == 2
    with pytest.raises(SettingError, match="no validation images; add --val-fraction"):
        train(replace(chosen, val_fraction=None, output=chosen.output / "other"))


def test_a_run_is_resumed_with_the_same_data_wherever_it_is(recipe, annotations, tmp_path):
    first = recipe(epochs=1)
    train(first)
    shutil.copytree(annotations.parent, tmp_path / "moved")
    moved = {
        "train_images": tmp_path / "moved/images",
        "train_annotations": tmp_path / "moved/instances.json",
    }
    more = train(replace(first, resume=True, epochs=2, **moved))
    assert [row["epoch"] for row in more.rows if "AP" in row] == [1, 2]
    with pytest.raises(SettingError, match="--epochs 2, not 1"):
        train(replace(first, resume=True))
    document = json.loads(annotations.read_text())
    document["annotations"][0]["bbox"][2] += 1
    moved["train_annotations"].write_text(json.dumps(document))
    with pytest.raises(SettingError, match="started with different training data"):
        train(replace(first, resume=True, epochs=2, **moved))


def test_validation_images_that_are_training_images_are_warned_of(recipe):
    with pytest.warns(UserWarning, match=r"6 of the 6 validation images are also training images"):
        read_datasets(recipe(), None, None)


def test_photos_that_a_split_at_random_puts_into_both_parts_are_warned_of(recipe, tmp_path):
    document = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    noise = np.random.default_rng(0)
    for number in range(1, 13):  # every photo once as PNG and once as JPEG
        if number % 2:
            pixels = noise.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        name = f"{number}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(pixels).resize((128, 96)).save(tmp_path / name)
        document["images"].append({"id": number, "file_name": name})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 40, 40]}
        document["annotations"].append(box)
    (tmp_path / "all.json").write_text(json.dumps(document))
    options = {"train_images": tmp_path, "train_annotations": tmp_path / "all.json"}
    whole = recipe(**options, val_images=None, val_annotations=None, val_fraction=0.4)
    with pytest.warns(UserWarning, match="validation images look like training images"):
        read_datasets(whole, None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_images": None, "train_annotations": None}, "pass --data PATH"),
        ({"train_annotations": None}, "pass both --train-images and --train-annotations"),
        ({"val_images": None, "val_annotations": None}, "or --val-fraction"),
        ({"val_fraction": 0.1}, "either --val-images"),
        ({"data": "x"}, "--data replaces"),
    ],
)
def test_data_is_named_in_one_way(recipe, options, message):
    with pytest.raises(SettingError, match=message):
        train(recipe(**options))
