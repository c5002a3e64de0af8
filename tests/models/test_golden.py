"""Full-size detectors against what the original implementations and Transformers 4.57 gave."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import detrkit
from detrkit import ConditionalDetrImageProcessor
from detrkit.checkpoints.registry import REGISTRY
from detrkit.conversion.convert import convert_checkpoint
from detrkit.conversion.original import original_name, read_architecture
from detrkit.losses.matcher import PackedTargets, match
from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.outputs import ObjectDetectionOutput
from tests.golden import COMPACT, HUB, ORIGINALS, GoldenCase

TOLERANCES = {"logits": 1e-4, "pred_boxes": 1e-5, "pred_masks": 1e-3}
FAST = (
    *("table-transformer-detection", "table-transformer-detection@main"),
    *("detr-resnet-50-panoptic@main", "conditional-detr-resnet-50@main", "deformable-detr@main"),
)


def params(cases: list[GoldenCase]) -> list:
    return [
        pytest.param(
            case,
            id=f"{case.folder.parent.name}/{case.name}",
            marks=() if case in COMPACT or case.name in FAST else pytest.mark.slow,
        )
        for case in cases
    ]


@dataclass
class Run:
    """What a converted checkpoint gives for the images of its case.

    Attributes:
        case: What is expected.
        card: The model card that the conversion wrote.
        config: The model's configuration.
        outputs: With losses and auxiliary outputs.
        gradient_norms: 2-norm of each parameter's gradient, by the original's names.
    """

    case: GoldenCase
    card: str
    config: DetrFamilyConfig
    outputs: ObjectDetectionOutput
    gradient_norms: dict[str, float]


@pytest.fixture(scope="module", params=params([*COMPACT, *ORIGINALS]))
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A checkpoint of the original's layout, converted, loaded, run forwards and backwards."""
    case: GoldenCase = request.param
    folder = tmp_path_factory.mktemp("original")
    weights = case.weights()
    torch.save({"model": weights}, folder / "original.pth")
    convert_checkpoint(folder / "original.pth", folder / "converted", case.checkpoint, verify=False)
    model_class = getattr(detrkit, case.class_name)
    model = model_class.from_pretrained(folder / "converted", auxiliary_loss=True)
    card = (folder / "converted" / "README.md").read_text(encoding="utf-8")
    shutil.rmtree(folder)  # hundreds of megabytes, and pytest keeps folders of three runs
    outputs = model(*case.batch(), labels=case.targets())
    outputs.loss.backward()
    return Run(case, card, model.config, outputs, gradient_norms(model, weights))


def gradient_norms(model: DetrFamilyPreTrainedModel, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """2-norms by the original's names, packed projections as one."""
    architecture = read_architecture(weights)
    squares: dict[str, float] = defaultdict(float)
    for ours, parameter in model.named_parameters():
        if parameter.grad is not None:
            theirs, _ = original_name(ours, architecture)
            squares[theirs] += parameter.grad.double().square().sum().item()
    return {name: square**0.5 for name, square in squares.items()}


def in_the_order_of(outputs: Mapping[str, Tensor], wanted: Tensor) -> dict[str, Tensor]:
    """The queries in the order of those wanted: proposals of nearly the same score may change places."""
    distance = (outputs["pred_boxes"][:, None] - wanted[:, :, None]).abs().amax(-1)
    order = distance.argmin(-1)
    assert all(len(set(image)) == wanted.shape[1] for image in order.tolist())
    fields = ("logits", "pred_boxes")
    return {f: outputs[f].gather(1, order[..., None].expand_as(outputs[f])) for f in fields}


def assert_golden(
    outputs: Mapping[str, Tensor], case: GoldenCase, *fields: str, prefix: str = "", any_order: bool = False
) -> None:
    """Compares with what a case has recorded: all queries, or every Nth."""
    if any_order:
        outputs = in_the_order_of(outputs, case.outputs[f"{prefix}pred_boxes"])
    for field in fields:
        pattern = re.compile(rf"{prefix}{field}(?:_every_(\d+)th)?")
        ((found, wanted),) = [(m, v) for k, v in case.outputs.items() if (m := pattern.fullmatch(k))]
        ours = outputs[field].detach()[:, :: int(found[1] or 1)]
        torch.testing.assert_close(ours, wanted, atol=TOLERANCES[field], rtol=0)


def test_a_converted_checkpoint_gives_the_originals_outputs_in_every_layer(original: Run) -> None:
    case, outputs = original.case, original.outputs
    assert_golden(outputs, case, "logits", "pred_boxes", any_order=case.proposes)
    if "pred_masks" in outputs:
        assert_golden(outputs, case, "pred_masks")
    assert len(outputs.auxiliary_outputs) == original.config.decoder_layers - 1
    first = outputs.auxiliary_outputs[0]
    assert_golden(first, case, "logits", "pred_boxes", prefix="aux0_", any_order=case.proposes)
    if "enc_logits" in case.outputs:
        proposals = {
            "logits": outputs.enc_outputs_class[..., :4],
            "pred_boxes": outputs.enc_outputs_coord_logits.sigmoid(),
        }
        assert_golden(proposals, case, "logits", "pred_boxes", prefix="enc_")


def test_a_converted_checkpoint_has_cocos_classes_and_the_published_numbers(original: Run) -> None:
    assert original.config.id2label[17] == "cat"
    # Learned position embeddings are none of the released checkpoints', nor are 91 classes of tables.
    entry = REGISTRY[original.case.checkpoint]
    released = original.case.name == entry.name and original.config.num_labels == entry.num_labels
    assert ("These are published numbers" in original.card) == released


def test_detections_are_those_of_the_originals_post_processing(original: Run) -> None:
    case = original.case
    sizes = torch.stack([target["orig_size"] for target in case.targets()])
    processor = getattr(detrkit, case.family.processor)()
    for i, found in enumerate(processor.post_process(original.outputs, sizes)):
        wanted = {key: case.outputs[f"det{i}_{key}"] for key in found}
        scores = found["scores"].sort(descending=True).values[: len(wanted["scores"])]
        # A softmax moves by up to half of what its logits (here up to 100) may; a sigmoid saturates sooner.
        tolerance = 5e-5 if case.family.class_scores == "softmax" else 3e-6
        torch.testing.assert_close(scores, wanted["scores"], atol=tolerance, rtol=0)
        # Rounding may swap detections of nearly the same score, also the last one with one left out.
        distance = (found["boxes"] - wanted["boxes"][:, None]).abs().amax(-1)
        distance[found["labels"] != wanted["labels"][:, None]] = float("inf")
        safe = wanted["scores"] > wanted["scores"].min() + 2e-6
        assert safe.sum() > min(40, original.config.num_queries // 2)
        assert distance.amin(1)[safe].max() < 1e-3


def test_queries_are_matched_to_the_originals_targets(original: Run) -> None:
    case, config, outputs = original.case, original.config, original.outputs
    if case.proposes:
        outputs = in_the_order_of(outputs, case.outputs["pred_boxes"])
    targets = case.targets()
    logits, boxes = outputs["logits"][None], outputs["pred_boxes"][None]
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    packed = PackedTargets(targets, logits.device)
    matches = match(logits, boxes, packed, *costs, focal=case.family.class_scores == "sigmoid")
    first = 0
    for i, target in enumerate(targets):
        own = matches.image == i
        order = matches.query[0, own].argsort()
        assert matches.query[0, own][order].tolist() == case.outputs[f"match{i}_query"].tolist()
        assert (matches.target[0, own][order] - first).tolist() == case.outputs[f"match{i}_target"].tolist()
        first += len(target["boxes"])


def test_losses_equal_the_originals(original: Run) -> None:
    expected = original.case.losses
    for term, value in expected["terms"].items():
        assert original.outputs.loss_dict[term].item() == pytest.approx(value, rel=1e-4), term
    assert original.outputs.loss.item() == pytest.approx(expected["total"], rel=1e-4)


def test_gradients_equal_the_originals(original: Run) -> None:
    wanted, ours = original.case.losses["grad_norms"], dict(original.gradient_norms)
    # Heads that layers share have the name of one of their places there.
    for name in ours.keys() - wanted.keys():
        ours[f"transformer.decoder.{name}"] = ours.pop(name)
    assert ours.keys() == wanted.keys()
    # The first layer's queries attend to zeros: gradients of its projections are zero but for rounding.
    rounding = 1e-7 * max(wanted.values())
    for name, norm in wanted.items():
        assert ours[name] == pytest.approx(norm, rel=1e-3, abs=rounding), name


CONDITIONAL = [pytest.param(c, id=c.name) for c in ORIGINALS if c.family.model_type == "conditional_detr"]


@pytest.mark.parametrize("case", CONDITIONAL)
def test_conditional_detrs_outputs_are_read_as_the_original_reads_them(case: GoldenCase) -> None:
    sizes = torch.stack([target["orig_size"] for target in case.targets()])
    for i, found in enumerate(ConditionalDetrImageProcessor().post_process(case.outputs, sizes)):
        for key, tolerance in (("scores", 1e-6), ("labels", 0), ("boxes", 1e-3)):
            torch.testing.assert_close(found[key], case.outputs[f"det{i}_{key}"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("case", params(HUB))
def test_files_of_the_hub_give_the_golden_outputs(case: GoldenCase, tmp_path: Path) -> None:
    save_file(case.weights(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(case.config))
    model, info = getattr(detrkit, case.class_name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.inference_mode():
        outputs = model(*case.batch())
    assert_golden(outputs, case, "logits", "pred_boxes", any_order=case.proposes)
    if "pred_masks" in outputs:
        assert_golden(outputs, case, "pred_masks")
