"""A tiny DETR and small pictures, made by the tests themselves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

from tests.tiny import FAMILIES

# One thread each, here and in the processes that tests start, unless whoever runs the tests asks for more.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# How long an example takes says nothing about the code: the first pays for imports and caches, and others may
# be at work on the machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tiny_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny DETR; its images are resized to a shortest edge of 64 pixels."""
    return FAMILIES["detr"].save(tmp_path_factory.mktemp("models") / "tiny-detr")


@pytest.fixture(scope="session")
def tiny_conditional_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny Conditional DETR, otherwise like ``tiny_detr``."""
    return FAMILIES["conditional_detr"].save(tmp_path_factory.mktemp("models") / "tiny-conditional-detr")


@pytest.fixture(scope="session")
def tiny_deformable_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny two-stage Deformable DETR, otherwise like ``tiny_detr``."""
    return FAMILIES["deformable_detr_two_stage"].save(
        tmp_path_factory.mktemp("models") / "tiny-deformable-detr"
    )


@pytest.fixture(scope="session")
def tiny_table_transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny Table Transformer, otherwise like ``tiny_detr``."""
    return FAMILIES["table_transformer"].save(tmp_path_factory.mktemp("models") / "tiny-table-transformer")


@pytest.fixture(scope="session")
def tiny_panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny DETR with masks, otherwise like ``tiny_detr``."""
    return FAMILIES["detr"].save(tmp_path_factory.mktemp("models") / "tiny-panoptic", masks=True)


@pytest.fixture(scope="session")
def tiny_conditional_panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny Conditional DETR with masks, otherwise like ``tiny_panoptic``."""
    folder = tmp_path_factory.mktemp("models") / "tiny-conditional-panoptic"
    return FAMILIES["conditional_detr"].save(folder, masks=True)


def make_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A colourful RGB picture of blurred noise; different seeds give different pictures."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Four picture files of three shapes: wide, tall, wide (PNG) and square."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    sizes = {"wide.jpg": (120, 80), "tall.jpg": (80, 120), "wide_too.png": (120, 80), "square.jpg": (90, 90)}
    for seed, (name, size) in enumerate(sizes.items()):
        make_picture(*size, seed=seed).save(folder / name)
    return [folder / name for name in sizes]


def wait_until(condition: Callable[[], object]) -> None:
    """Waits for what another thread or process does; fails if it has not happened in five minutes."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.002)


def read_json(path: Path) -> dict:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
