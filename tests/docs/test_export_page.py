"""The page about export shows how to run a model without PyTorch; what it finds is what a Detector finds."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from detrkit import Detector
from detrkit.engines.export import export_model
from tests.docs.blocks import ROOT, blocks_of

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

WITHOUT_TORCH = "import sys; sys.modules |= dict.fromkeys(['torch', 'transformers', 'detrkit'])\n"
SAVE = """
found = detect("photo.jpg", 0.3)
np.savez("found.npz", names=[f[0] for f in found], scores=[f[1] for f in found], boxes=[f[2] for f in found])
"""


def test_the_code_without_pytorch_finds_the_same(
    tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    from detrkit.checkpoints.loading import load_pretrained

    model, processor = load_pretrained(str(tiny_detr), None)
    export_model(model, tmp_path / "my-onnx", "onnx", processor=processor, verify=False)
    (block,) = [b for b in blocks_of(ROOT / "docs" / "export.md") if "import onnxruntime" in b.code]
    detector = Detector.from_pretrained(tiny_detr, device="cpu")
    for picture in pictures[:2]:
        (tmp_path / "photo.jpg").write_bytes(picture.read_bytes())
        code = WITHOUT_TORCH + block.code + SAVE
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
        found, expected = np.load(tmp_path / "found.npz"), detector(picture, threshold=0.3)
        assert found["names"].tolist() == expected.names
        assert len(expected) > 3
        np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-3)
        np.testing.assert_allclose(found["boxes"], expected.boxes, atol=0.1)
