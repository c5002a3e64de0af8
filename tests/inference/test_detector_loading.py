"""What cannot be loaded is named in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from detrkit import Detector
from detrkit.errors import CheckpointError, SettingError


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(CheckpointError, match="detr-resnet-50"):
        Detector.from_pretrained("detr-resnet-5O")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no-such-folder"):
        Detector.from_pretrained(tmp_path / "no-such-folder")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{broken")


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def no_family(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def truncate_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_one_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["class_labels_classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def resize_queries(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_queries": 5}))


def remove_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json"),
        (remove_config, "config.json"),
        (other_family, "'bert'"),
        (no_family, "model_type|config.json"),
        (truncate_weights, "weights"),
        (empty_weights, "weights"),
        (remove_weights, "weights"),
        (drop_one_tensor, "class_labels_classifier.weight"),
        (resize_queries, "weights"),
        (remove_processor, "preprocessor_config.json"),
    ],
)
def test_a_damaged_model_folder_is_named_in_one_line(
    tiny_detr: Path, tmp_path: Path, damage: object, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_detr, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Detector.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "onnx", "dtype": "float16"}, "in 'float32' only"),
        ({"engine": "openvino", "device": "cuda"}, "not available|device 'cpu'"),
        ({"engine": "torhc"}, "unknown engine"),
        ({"device": "gpu7"}, "unknown device"),
        ({"device": "cuda:99"}, "not available"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"dtype": torch.int64}, "unknown dtype"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(tiny_detr: Path, settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        Detector.from_pretrained(tiny_detr, **settings)
    assert isinstance(caught.value, ValueError)
