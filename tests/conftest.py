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
from transformers import ResNetConfig

# One thread each, here and in the processes that tests start, unless whoever runs the tests asks for more.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

# How long an example takes says nothing about the code: the first pays for imports and caches, and others may
# be at work on the machine.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

TINY_NAMES = {0: "N/A", 1: "cat", 2: "remote", 3: "couch"}


def make_tiny_detr(folder: Path, family: str = "Detr", masks: bool = False) -> Path:
    """Saves a detector with random weights: a narrow ResNet, 2 + 2 layers, 12 queries, 3 named classes.

    Queries and class head are far larger than at initialisation, so that the queries find different
    things with scores all over [0, 1].

    Args:
        folder: Where to.
        family: What the names of the classes begin with: ``Detr``, ``ConditionalDetr`` or ``DeformableDetr``,
            the last one with box refinement and two stages.
        masks: Whether to give it a mask head; the couch is stuff then, the other classes are things.
    """
    import detrkit

    torch.manual_seed(0)
    deformable = family == "DeformableDetr"
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"] if deformable else ["stage4"],
    )
    proposals = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 12}
    config = getattr(detrkit, f"{family}Config")(
        use_timm_backbone=False,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=8 if masks else 4,
        decoder_attention_heads=4,
        num_queries=12,
        id2label=TINY_NAMES,
        label2id={name: label for label, name in TINY_NAMES.items()},
        **(proposals if deformable else {}),
    )
    task = "Segmentation" if masks else "ObjectDetection"
    whole = getattr(detrkit, f"{family}For{task}")(config).eval()
    model = whole.detector if masks else whole
    with torch.no_grad():
        if deformable:
            for head in model.class_embed:
                head.weight.normal_(std=0.7)
                head.bias.zero_()
            for head in model.bbox_embed:
                head.layers[-1].reset_parameters()
        else:
            model.model.query_position_embeddings.weight.normal_(std=30)
            model.class_labels_classifier.weight.normal_(std=0.7)
            model.class_labels_classifier.bias.zero_()
        if family == "ConditionalDetr":
            # Reference points all over the image, and boxes of different sizes around them.
            model.model.decoder.ref_point_head.layers[-1].weight /= 30
            model.bbox_predictor.layers[-1].reset_parameters()
        if masks:
            whole.bbox_attention.q_linear.weight *= 20
            whole.mask_head.lay1.weight[:, config.d_model :] *= 100  # masks that differ among queries
            whole.mask_head.out_lay.weight *= 30
    whole.save_pretrained(folder)
    processor_class = getattr(detrkit, f"{family}ImageProcessor")
    things = {"is_thing_map": {1: True, 2: True, 3: False}} if masks else {}
    processor_class(size={"shortest_edge": 64, "longest_edge": 107}, **things).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny DETR; its images are resized to a shortest edge of 64 pixels."""
    return make_tiny_detr(tmp_path_factory.mktemp("models") / "tiny-detr")


@pytest.fixture(scope="session")
def tiny_conditional_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny Conditional DETR, otherwise like ``tiny_detr``."""
    return make_tiny_detr(tmp_path_factory.mktemp("models") / "tiny-conditional-detr", "ConditionalDetr")


@pytest.fixture(scope="session")
def tiny_deformable_detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny two-stage Deformable DETR, otherwise like ``tiny_detr``."""
    return make_tiny_detr(tmp_path_factory.mktemp("models") / "tiny-deformable-detr", "DeformableDetr")


@pytest.fixture(scope="session")
def tiny_panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny DETR with masks, otherwise like ``tiny_detr``."""
    return make_tiny_detr(tmp_path_factory.mktemp("models") / "tiny-panoptic", masks=True)


@pytest.fixture(scope="session")
def tiny_conditional_panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a saved tiny Conditional DETR with masks, otherwise like ``tiny_panoptic``."""
    folder = tmp_path_factory.mktemp("models") / "tiny-conditional-panoptic"
    return make_tiny_detr(folder, "ConditionalDetr", masks=True)


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
