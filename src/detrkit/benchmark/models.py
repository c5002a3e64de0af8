"""The models that are measured: as folders for every side, and what an image costs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detrkit.checkpoints.cost import Cost, count_cost
from detrkit.checkpoints.loading import read_model_files
from detrkit.checkpoints.registry import find_checkpoint
from detrkit.common.errors import DetrkitError

# As many queries of a panoptic model have a mask, about as many as in a photo.
SURVIVORS = 10


def save_random(name: str, folder: Path, **changes: Any) -> None:
    """Saves an architecture of the registry with random weights and some options of its configuration."""
    import torch

    from detrkit.conversion.convert import released_model

    empty, processor = released_model(find_checkpoint(name))
    for option, value in changes.items():
        setattr(empty.config, option, value)
    torch.manual_seed(0)
    type(empty)(empty.config).save_pretrained(folder)
    processor.save_pretrained(folder)


def cost_of(model: str, size: tuple[int, int]) -> Cost:
    """What an image of this height and width costs a model, counted on its plain form."""
    files = read_model_files(model)
    return count_cost(files.family.load(files.model_class), files.config, size)


def export(model: str, engine: str, folder: Path, *options: str) -> None:
    """Runs ``detrkit export`` with these options in a process of its own, which gives its memory back."""
    command = [sys.executable, "-m", "detrkit", "export", str(folder), "--model", model, "--to", engine]
    done = subprocess.run([*command, "--no-verify", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DetrkitError(f"cannot export {model} for {engine!r}: {done.stderr.strip()}")


def threshold_of(model: str, settings: Mapping[str, Any]) -> float:
    """The least score for end-to-end runs: 0, or where there are masks one that few queries survive."""
    import torch

    from detrkit.benchmark.sides import Settings

    files = read_model_files(model)
    if not files.has_masks:
        return 0.0
    network, processor = files.load_model(), files.load_processor()
    one = Settings(**{**settings, "batch": 1, "threshold": 0.0, "device": "cpu", "dtype": "float32"})
    inputs = processor(images=one.images, size=one.size, return_tensors="pt")
    with torch.inference_mode():
        logits = network.eval().detector(**inputs)["logits"]
    scores = processor.query_probabilities(logits)[0].amax(-1)[0].sort(descending=True).values
    # Both sides find the same queries: the threshold is between the scores of two of them.
    return float(scores[SURVIVORS - 1 : SURVIVORS + 1].mean())
