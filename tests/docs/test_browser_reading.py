"""What the page "Try it in the browser" computes in JavaScript is what detrkit computes in Python."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import DeformableDetrImageProcessor, DetectionConfig
from detrkit.processing.resize import size_for
from detrkit.results.detection_config import DetectionRule
from tests.docs.blocks import ROOT

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def node(**given: object) -> object:
    script = Path(__file__).with_name("reading.mjs")
    done = subprocess.run(
        [NODE, "--no-warnings", script], input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", [{"shortest_edge": 288, "longest_edge": 384}, {"shortest_edge": 50}])
def test_images_get_the_same_size(size: dict[str, int]) -> None:
    sides = [(480, 640), (640, 480), (333, 333), (283, 640), (7, 2000), (1, 5000), (1200, 675), (599, 1000)]
    assert node(call="sizes", sides=sides, size=size) == [list(size_for(*pair, size)) for pair in sides]


@pytest.mark.parametrize("to", [(288, 384), (480, 640), (700, 933), (50, 640), (480, 77), (479, 900)])
def test_pixels_are_pillows_within_one_level_and_the_models_input_follows(
    to: tuple[int, int], tmp_path: Path
) -> None:
    picture = Image.open(ROOT / "examples" / "BloodImage_00000.jpg").convert("RGB")
    (tmp_path / "rgba").write_bytes(picture.convert("RGBA").tobytes())
    processor = DeformableDetrImageProcessor(size={"height": to[0], "width": to[1]})
    node(
        call="pixels",
        file=str(tmp_path / "rgba"),
        width=picture.width,
        height=picture.height,
        to=to,
        bytes=str(tmp_path / "bytes"),
        values=str(tmp_path / "values"),
        processor=processor.to_dict(),
    )
    found = np.frombuffer((tmp_path / "bytes").read_bytes(), np.uint8).reshape(*to, 3).astype(int)
    expected = np.asarray(picture.resize(to[::-1], Image.Resampling.BILINEAR)).astype(int)
    differences = np.abs(found - expected)
    assert differences.max() <= 1
    assert differences.mean() < 0.0001  # most are equal: the rounding is Pillow's too
    values = np.frombuffer((tmp_path / "values").read_bytes(), np.float32).reshape(3, *to)
    wanted = processor(images=[Image.fromarray(found.astype(np.uint8))], return_tensors="np")
    np.testing.assert_allclose(values, wanted["pixel_values"][0], atol=1e-5)


CONFIGS = {
    "defaults": DetectionConfig(),
    "low": DetectionConfig(threshold=0.05, max_objects=30),
    "overlap": DetectionConfig(threshold=0.2, overlap=0.3),
    "agnostic": DetectionConfig(threshold=0.2, overlap=0.3, class_agnostic=True),
    "by-class": DetectionConfig(threshold={"b": 0.8, "c": 0.1}, overlap=0.6),
    "calibrated": DetectionConfig(
        threshold=0.3, calibration={"a": [(0.1, 0.2), (0.5, 0.4), (0.9, 1.0)], "c": [(0, 0.1), (1, 0.6)]}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_objects_are_chosen(name: str) -> None:
    import torch

    config, names, size = CONFIGS[name], ["a", "b", "c"], (480, 640)
    random = np.random.default_rng(3)
    logits = random.normal(-1, 2, (1, 60, 3)).astype(np.float32)
    # Around few places, so that boxes overlap.
    boxes = random.uniform(0.3, 0.7, (1, 60, 4)).round(1).astype(np.float32)
    boxes += random.uniform(0, 0.05, boxes.shape).astype(np.float32)
    outputs = {"logits": torch.from_numpy(logits), "pred_boxes": torch.from_numpy(boxes)}
    processor = DeformableDetrImageProcessor()
    scores, labels, corners, _ = (
        part[0].numpy() for part in processor.candidates(outputs, processor.object_limit(60))
    )
    corners = corners * np.array([640, 480, 640, 480], np.float32)
    places, final = DetectionRule(config, dict(enumerate(names))).select(scores, labels, corners)
    found = node(
        call="objects",
        logits=logits.ravel().tolist(),
        boxes=boxes.ravel().tolist(),
        names=names,
        size=size,
        config=dict(config.decisions()),
    )
    assert len(found) == len(places) > 4
    assert [one["label"] for one in found] == labels[places].tolist()
    np.testing.assert_allclose([one["score"] for one in found], final, atol=1e-5)
    np.testing.assert_allclose([one["box"] for one in found], corners[places], atol=0.01)
