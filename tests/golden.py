"""Golden cases: what the original implementations gave on deterministic weights.

The full set lies beside a checkout (``../shared/golden``) and is not part of the repository; tests that
need it skip where it is absent.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "golden"
DATA = SHARED / "data"

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs the golden cases of ../shared")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs the test images of ../shared")

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def golden_case(name: str) -> dict:
    """The files of one case, ``original/NAME`` or ``hub/NAME@REVISION``."""
    folder = GOLDEN / name
    case = {
        "keys": json.loads((folder / "keys.json").read_text()),
        **json.loads((folder / "case.json").read_text()),
        "outputs": dict(np.load(folder / "outputs.npz")),
    }
    if (folder / "config.json").exists():
        case["config"] = json.loads((folder / "config.json").read_text())
    if (folder / "losses.json").exists():
        case["losses"] = json.loads((folder / "losses.json").read_text())
    return case


def golden_weights(case: dict) -> dict[str, torch.Tensor]:
    """The state dict of a case, made from names and shapes."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {k: torch.from_numpy(v) for k, v in module.make_state_dict(case["keys"], **case["fill"]).items()}


def golden_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The padded batch of two real images: pixel values (2, 3, 320, 341) and their mask (2, 320, 341)."""
    data = np.load(GOLDEN / "inputs.npz")
    images = [torch.from_numpy(data[f"image{i}"]) for i in range(2)]
    height, width = (max(image.shape[d] for image in images) for d in range(2))
    pixels = torch.zeros(2, 3, height, width)
    mask = torch.zeros(2, height, width, dtype=torch.long)
    for i, image in enumerate(images):
        h, w = image.shape[:2]
        pixels[i, :, :h, :w] = ((image / 255.0 - MEAN) / STD).permute(2, 0, 1)
        mask[i, :h, :w] = 1
    return pixels, mask


def golden_targets() -> list[dict[str, torch.Tensor]]:
    """The targets of the two images: classes, boxes (normalised cxcywh), masks, original (height, width)."""
    data = np.load(GOLDEN / "inputs.npz")
    return [
        {
            "class_labels": torch.from_numpy(data[f"target{i}_labels"]),
            "boxes": torch.from_numpy(data[f"target{i}_boxes"]),
            "masks": torch.from_numpy(data[f"target{i}_masks"]),
            "orig_size": torch.from_numpy(data[f"target{i}_orig_size"]),
            "image_id": torch.from_numpy(data[f"target{i}_image_id"]),
        }
        for i in range(2)
    ]
