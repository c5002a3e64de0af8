"""Golden cases: what the original implementations gave on deterministic weights.

A compact set is part of the repository (see ``README.md`` beside this file). The full set is stored beside a
checkout, in ``../shared/golden``, and its cases are added where it exists. Other tests that need
``../shared`` are skipped without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import detrkit
from detrkit.checkpoints.registry import REGISTRY
from detrkit.families import FAMILIES, Family
from tests.golden.weights import make_state_dict

HERE = Path(__file__).parent
SHARED = HERE.parents[2] / "shared"
GOLDEN = SHARED / "golden"
DATA = SHARED / "data"
_EXAMPLES = HERE.parents[1] / "examples"
# Cases of pre- and post-processing that are in both sources are taken from the first.
_PROCESSING = (HERE / "processing", GOLDEN / "processing")

PANOPTIC = HERE / "panoptic"
COCO_RESULTS = HERE / "coco_results"
ODD_IMAGES = HERE.parent / "odd_images"
"""Image files that programs have trouble with."""

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the test images of ../shared")

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class GoldenCase:
    """What one model gave for two real images.

    Attributes:
        folder: Where its files are.
    """

    folder: Path

    @property
    def name(self) -> str:
        """``NAME`` of the original's checkpoint, ``NAME@REVISION`` of a file of the Hub."""
        return self.folder.name

    @property
    def checkpoint(self) -> str:
        """The registry's name for the original's checkpoint."""
        return self.name.removesuffix("-learned")

    @property
    def family(self) -> Family:
        """The model's family; the originals call Table Transformer DETR with pre-norm layers."""
        if self.settings["options"].get("pre_norm"):
            return FAMILIES["table-transformer"]
        return FAMILIES[self.settings["family"]]

    @property
    def class_name(self) -> str:
        """The name of the model's class."""
        if "class" in self.settings:
            return self.settings["class"]
        return self.family.load_model_class(self.settings["options"].get("masks", False)).__name__

    @property
    def proposes(self) -> bool:
        """Whether the model has two stages: proposals of nearly the same score may change places."""
        return "two-stage" in self.name

    @cached_property
    def keys(self) -> dict[str, dict[str, Any]]:
        """Shape and dtype of each tensor of the checkpoint, by name."""
        return self._read("keys.json")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The original's options or the class, and how the weights are made."""
        return self._read("case.json")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of a file of the Hub."""
        return self._read("config.json")

    @cached_property
    def losses(self) -> dict[str, Any]:
        """Loss terms, their total and the gradient's norm of each parameter."""
        return self._read("losses.json")

    @cached_property
    def outputs(self) -> dict[str, torch.Tensor]:
        """What the model gave; ``NAME_every_Nth`` has the queries 0, N, 2N, ... only."""
        return {name: torch.from_numpy(array) for name, array in np.load(self.folder / "outputs.npz").items()}

    def weights(self) -> dict[str, torch.Tensor]:
        """The checkpoint, made from names and shapes."""
        arrays = make_state_dict(self.keys, **self.settings["fill"])
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The padded images: pixel values (2, 3, height, width) and their mask (2, height, width)."""
        images = [torch.from_numpy(self._inputs[f"image{i}"]) for i in range(2)]
        height, width = (max(image.shape[d] for image in images) for d in range(2))
        pixels = torch.zeros(2, 3, height, width)
        mask = torch.zeros(2, height, width, dtype=torch.long)
        for i, image in enumerate(images):
            h, w = image.shape[:2]
            pixels[i, :, :h, :w] = ((image / 255.0 - MEAN) / STD).permute(2, 0, 1)
            mask[i, :h, :w] = 1
        return pixels, mask

    def targets(self) -> list[dict[str, torch.Tensor]]:
        """For each image: classes, boxes (normalised cxcywh), masks, original (height, width), id."""
        names = {name: name for name in ("boxes", "masks", "orig_size", "image_id")}
        names["class_labels"] = "labels"
        return [
            {ours: torch.from_numpy(self._inputs[f"target{i}_{name}"]) for ours, name in names.items()}
            for i in range(2)
        ]

    @property
    def _inputs(self) -> dict[str, np.ndarray]:
        folder = next(folder for folder in self.folder.parents if (folder / "inputs.npz").exists())
        return np.load(folder / "inputs.npz")

    def _read(self, file: str) -> Any:
        return json.loads((self.folder / file).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class ImageCase:
    """What the original's evaluation transform made of an image and its annotations.

    Attributes:
        image: The image's file.
        document: COCO annotations that it is part of.
        recorded: The file of the results, in which its images are numbered.
    """

    image: Path
    document: Path
    recorded: Path

    def target(self) -> dict[str, Any]:
        """What an image processor takes for the image's annotations."""
        document = json.loads(self.document.read_text(encoding="utf-8"))
        (found,) = (image["id"] for image in document["images"] if image["file_name"] == self.image.name)
        own = [entry for entry in document["annotations"] if entry["image_id"] == found]
        return {"image_id": found, "annotations": own}

    def expected(self) -> dict[str, np.ndarray]:
        """``grid`` is every 97th row and 89th column of the pixels."""
        return _with_prefix(self.recorded, f"{_image_names(self.recorded).index(self.image.name)}_")


@dataclass(frozen=True)
class OutputsCase:
    """What the original's post-processing made of synthetic outputs.

    Attributes:
        name: The case's name in its file.
        folder: Where the files of its source are.
    """

    name: str
    folder: Path

    def outputs(self) -> SimpleNamespace:
        """A model's ``logits``, ``pred_boxes`` and ``pred_masks`` for one image."""
        names = {"logits": "logits", "pred_masks": "masks", "pred_boxes": "boxes"}
        arrays = self.expected()
        return SimpleNamespace(**{ours: torch.from_numpy(arrays[name])[None] for ours, name in names.items()})

    def expected(self) -> dict[str, np.ndarray]:
        """Sizes, detections, packed masks and panoptic ids."""
        return _with_prefix(self.folder / "post_process.npz", f"{self.name}_")

    def segments(self, target: str) -> list[dict[str, Any]]:
        """Panoptic segments at the "size" that the model saw or the "orig" size."""
        document = json.loads((self.folder / "post_process_segments.json").read_text(encoding="utf-8"))
        return document[f"{self.name}_panoptic_{target}"]


def _with_prefix(file: Path, prefix: str) -> dict[str, np.ndarray]:
    arrays = np.load(file)
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def _image_names(file: Path) -> list[str]:
    return [str(name) for name in np.load(file)["file_names"]]


def _image_cases() -> list[ImageCase]:
    coco = DATA / "coco_tiny"
    sources = [
        (_PROCESSING[0], [_PROCESSING[0] / "images", _EXAMPLES], _PROCESSING[0] / "annotations.json"),
        (_PROCESSING[1], [coco / "val2017"], coco / "annotations" / "instances_val2017.json"),
    ]
    cases: dict[str, ImageCase] = {}
    for folder, image_folders, document in sources:
        recorded = folder / "pre_process.npz"
        for name in _image_names(recorded) if recorded.exists() else []:
            (image,) = (path for place in image_folders if (path := place / name).exists())
            cases.setdefault(name, ImageCase(image, document, recorded))
    return list(cases.values())


def _outputs_cases() -> list[OutputsCase]:
    cases: dict[str, OutputsCase] = {}
    for folder in _PROCESSING:
        recorded = folder / "post_process.npz"
        names = np.load(recorded).files if recorded.exists() else []
        for name in [name.removesuffix("_logits") for name in names if name.endswith("_logits")]:
            cases.setdefault(name, OutputsCase(name, folder))
    return list(cases.values())


def _cases(folder: Path) -> list[GoldenCase]:
    return [GoldenCase(path.parent) for path in sorted(folder.glob("*/case.json"))]


COMPACT = _cases(HERE / "compact")
# The shared cases may be ahead of this version.
ORIGINALS = [case for case in _cases(GOLDEN / "original") if case.checkpoint in REGISTRY]
HUB = [case for case in _cases(GOLDEN / "hub") if hasattr(detrkit, case.class_name)]
IMAGES = _image_cases()
OUTPUTS = _outputs_cases()
