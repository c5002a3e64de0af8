"""The page about export shows how to run a model without PyTorch; what it finds is what a Detector finds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from detrkit import Detector
from tests.docs.blocks import ROOT, blocks_of
from tests.exported import write_exported

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WITHOUT_TORCH = "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'detrkit'])\n"
SAVE = """
found = detect("photo.jpg", 0.3)
np.savez("found.npz", names=[f[0] for f in found], scores=[f[1] for f in found], boxes=[f[2] for f in found])
"""


@pytest.mark.parametrize(
    ("model_type", "size"),
    [
        ("detr", {"shortest_edge": 64, "longest_edge": 90}),
        ("conditional_detr", {"shortest_edge": 64}),
        ("deformable_detr", {"shortest_edge": 64, "longest_edge": 1333}),
        ("table-transformer", {"longest_edge": 100}),
    ],
)
def test_the_code_without_detrkit_finds_the_same_with_every_family(
    model_type: str, size: dict[str, int], pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "my-onnx").mkdir()
    folder = write_exported(tmp_path / "my-onnx", model_type, size)
    (block,) = [b for b in blocks_of(ROOT / "docs" / "export.md") if "import onnxruntime" in b.code]
    detector = Detector.from_pretrained(folder)
    (tmp_path / "photo.jpg").write_bytes(pictures[0].read_bytes())
    code = WITHOUT_TORCH + block.code + SAVE
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    found, expected = np.load(tmp_path / "found.npz"), detector(pictures[0], threshold=0.3)
    assert found["names"].tolist() == expected.names
    assert len(expected) > 3
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5)
    np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.05)
