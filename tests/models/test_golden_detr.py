"""Full-size DETR against what Transformers 4.57 (equal to the original) gave for the files on the Hub."""

import json

import pytest
import torch
from safetensors.torch import save_file

from detrkit import DetrForObjectDetection
from tests.golden import GOLDEN, golden_batch, golden_case, golden_weights, needs_golden

CASES = sorted(
    f.name
    for f in (GOLDEN / "hub").glob("detr-*")
    if json.loads((f / "case.json").read_text())["class"] == "DetrForObjectDetection"
)
FAST = "detr-resnet-50@main"


def save_case(case: dict, folder) -> None:
    save_file(golden_weights(case), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(case["config"]))


@needs_golden
@pytest.mark.parametrize("name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_files_of_the_hub_give_the_golden_outputs(name, tmp_path):
    case = golden_case(f"hub/{name}")
    save_case(case, tmp_path)
    model, info = DetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        outputs = model(*golden_batch())
    expected = case["outputs"]
    assert (outputs.logits - torch.from_numpy(expected["logits"])).abs().max() < 1e-4
    assert (outputs.pred_boxes - torch.from_numpy(expected["pred_boxes"])).abs().max() < 1e-5
