"""Numbers that no model has are refused when it is loaded, and named."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from detrkit import Detector, DetrForObjectDetection
from detrkit.errors import CheckpointError
from tests.conftest import make_picture

WEIGHT = "model.encoder.layers.0.fc1.weight"
VARIANCE = "model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var"


@pytest.fixture
def model(tiny_detr: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_detr, tmp_path / "model"))


def change(path: Path, **entries) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def with_value(value):
    def spoil(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return spoil


@pytest.mark.parametrize("as_pickle", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        (WEIGHT, with_value(math.nan)),
        (WEIGHT, with_value(math.inf)),
        (VARIANCE, with_value(-math.inf)),
        (VARIANCE, with_value(-1.0)),
        (WEIGHT, lambda tensor: tensor.int()),
        (WEIGHT, lambda tensor: tensor > 0),
        (WEIGHT, lambda tensor: tensor.to(torch.complex64)),
    ],
    ids=["nan", "infinite", "infinite-buffer", "negative-variance", "integer", "boolean", "complex"],
)
def test_weights_that_are_no_real_numbers_are_refused_by_name(model, name, spoil, as_pickle):
    tensors = load_file(model / "model.safetensors")
    tensors[name] = spoil(tensors[name])
    if as_pickle:
        (model / "model.safetensors").unlink()
        torch.save(tensors, model / "pytorch_model.bin")
    else:
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for read in (Detector.from_pretrained, DetrForObjectDetection.from_pretrained):
        with pytest.raises(CheckpointError, match=name):
            read(model)


def test_counts_of_batches_and_half_precision_are_no_fault(model):
    tensors = {name: tensor.half() for name, tensor in load_file(model / "model.safetensors").items()}
    tensors[VARIANCE.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    DetrForObjectDetection.from_pretrained(model)


@pytest.mark.parametrize(
    "labels", [{0: "a", 7: "b", 9: "c", 1: "d"}, {1: "a", 2: "b", 3: "c", 4: "d"}, {-1: "a", 0: "b", 1: "c"}]
)
def test_labels_with_gaps_are_refused(model, labels):
    change(model / "config.json", id2label=labels)
    with pytest.raises(CheckpointError, match="id2label"):
        Detector.from_pretrained(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_mean", [math.nan] * 3),
        ("image_mean", [-0.1, 0.4, 0.4]),
        ("image_mean", "grey"),
        ("image_std", [math.inf] * 3),
        ("image_std", [-0.2, 0.2, 0.2]),
        ("image_std", [0.2, 0, 0.2]),
        ("rescale_factor", math.nan),
        ("rescale_factor", -1),
        ("rescale_factor", 0),
        ("pad_size", {"height": 9900, "width": 107}),
    ],
)
def test_a_processors_numbers_are_refused_by_name(model, name, value):
    change(model / "preprocessor_config.json", **{name: value})
    with pytest.raises(CheckpointError, match=name):
        Detector.from_pretrained(model)


def test_padding_to_a_larger_square_is_no_fault(model):
    change(model / "preprocessor_config.json", pad_size={"height": 128, "width": 128})
    assert len(Detector.from_pretrained(model, device="cpu")(make_picture(60, 40), threshold=0)) == 12
