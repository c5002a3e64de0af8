"""Full-size detectors against what Transformers 4.57 and the original implementations gave."""

import json

import pytest
import torch
from safetensors.torch import save_file

import detrkit
from detrkit import ConditionalDetrImageProcessor
from tests.golden import GOLDEN, golden_batch, golden_case, golden_targets, golden_weights, needs_golden


def hub_cases() -> list[str]:
    """Files of the Hub whose class this version has."""
    folders = sorted((GOLDEN / "hub").glob("*"))
    return [f.name for f in folders if hasattr(detrkit, json.loads((f / "case.json").read_text())["class"])]


def only_fast(names: list[str], *fast: str) -> list:
    """The names as parameters, all but a few marked slow."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def in_the_order_of(outputs, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """The queries in the order of those wanted: proposals of nearly the same score may change places."""
    distance = (outputs["pred_boxes"][:, None] - wanted[:, :, None]).abs().amax(-1)
    order = distance.argmin(-1)
    assert all(len(set(image)) == wanted.shape[1] for image in order.tolist())
    fields = ("logits", "pred_boxes")
    return {f: outputs[f].gather(1, order[..., None].expand_as(outputs[f])) for f in fields}


def assert_golden(outputs, expected, prefix="", any_order=False):
    if any_order:
        outputs = in_the_order_of(outputs, torch.from_numpy(expected[prefix + "pred_boxes"]))
    for field, tolerance in (("logits", 1e-4), ("pred_boxes", 1e-5)):
        wanted = torch.from_numpy(expected[prefix + field])
        torch.testing.assert_close(outputs[field], wanted, atol=tolerance, rtol=0)
    if not prefix and "pred_masks_every_10th" in expected:
        wanted = torch.from_numpy(expected["pred_masks_every_10th"])
        torch.testing.assert_close(outputs["pred_masks"][:, ::10], wanted, atol=1e-3, rtol=0)


@needs_golden
@pytest.mark.parametrize(
    "name",
    only_fast(
        hub_cases(), "detr-resnet-50-panoptic@main", "conditional-detr-resnet-50@main", "deformable-detr@main"
    ),
)
def test_files_of_the_hub_give_the_golden_outputs(name, tmp_path):
    case = golden_case(f"hub/{name}")
    save_file(golden_weights(case), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(case["config"]))
    model, info = getattr(detrkit, case["class"]).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        outputs = model(*golden_batch())
    assert_golden(outputs, case["outputs"], any_order="two-stage" in name)


@needs_golden
@pytest.mark.parametrize(
    "name",
    only_fast(
        sorted(f.name for f in (GOLDEN / "original").glob("*")),
        "conditional-detr-resnet-50",
        "deformable-detr-with-box-refine-two-stage",
    ),
)
def test_originals_give_their_layers_and_detections(name, tmp_path):
    from detrkit.conversion.convert import convert_checkpoint

    case = golden_case(f"original/{name}")
    torch.save({"model": golden_weights(case)}, tmp_path / "original.pth")
    convert_checkpoint(
        tmp_path / "original.pth", tmp_path / "out", name.removesuffix("-learned"), verify=False
    )
    family = {"conditional": "Conditional", "deformable": "Deformable"}.get(name.split("-")[0], "")
    task = "Segmentation" if "panoptic" in name else "ObjectDetection"
    model_class = getattr(detrkit, f"{family}DetrFor{task}")
    model = model_class.from_pretrained(tmp_path / "out", auxiliary_loss=True)
    with torch.inference_mode():
        outputs = model(*golden_batch())
    proposed = "two-stage" in name
    assert_golden(outputs, case["outputs"], any_order=proposed)
    assert_golden(outputs.auxiliary_outputs[0], case["outputs"], prefix="aux0_", any_order=proposed)
    assert len(outputs.auxiliary_outputs) == 5
    if "enc_logits" in case["outputs"]:
        proposals = {
            "logits": outputs.enc_outputs_class[..., :4],
            "pred_boxes": outputs.enc_outputs_coord_logits.sigmoid(),
        }
        assert_golden(proposals, case["outputs"], prefix="enc_")

    sizes = torch.stack([target["orig_size"] for target in golden_targets()])
    processor = getattr(detrkit, f"{family}DetrImageProcessor")()
    for i, found in enumerate(processor.post_process(outputs, sizes)):
        order = found["scores"].argsort(descending=True, stable=True)
        found = {key: values[order] for key, values in found.items()}
        wanted = {key: torch.from_numpy(case["outputs"][f"det{i}_{key}"]) for key in found}
        # A softmax moves by up to half of what its logits (here up to 100) may; a sigmoid saturates sooner.
        tolerance = 3e-6 if family else 5e-5
        torch.testing.assert_close(found["scores"], wanted["scores"], atol=tolerance, rtol=0)
        # Rounding may swap detections of nearly the same score, also the last one with one left out.
        distance = (found["boxes"] - wanted["boxes"][:, None]).abs().amax(-1)
        distance[found["labels"] != wanted["labels"][:, None]] = float("inf")
        safe = wanted["scores"] > wanted["scores"].min() + 2e-6
        assert safe.sum() > 50
        assert distance.amin(1)[safe].max() < 1e-3


@needs_golden
@pytest.mark.parametrize("name", sorted(f.name for f in (GOLDEN / "original").glob("conditional-*")))
def test_conditional_detrs_outputs_are_read_as_the_original_reads_them(name):
    expected = golden_case(f"original/{name}")["outputs"]
    outputs = {key: torch.from_numpy(expected[key]) for key in ("logits", "pred_boxes")}
    sizes = torch.stack([target["orig_size"] for target in golden_targets()])
    for i, found in enumerate(ConditionalDetrImageProcessor().post_process(outputs, sizes)):
        for key, tolerance in (("scores", 1e-6), ("labels", 0), ("boxes", 1e-3)):
            wanted = torch.from_numpy(expected[f"det{i}_{key}"])
            torch.testing.assert_close(found[key], wanted, atol=tolerance, rtol=0)
