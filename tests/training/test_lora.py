"""Training by adapters, and the plain model that they become."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from detrkit import Detector, DetrForObjectDetection
from detrkit.data import DetectionDataset
from detrkit.errors import MissingExtraError, SettingError
from detrkit.evaluation import evaluate_detector
from detrkit.training import train
from detrkit.training.lora import adapted_layers, add_adapters, merged
from detrkit.training.preparation import build_model
from tests.closeness import assert_same_outputs
from tests.tiny import FAMILIES, padded_batch, some_labels
from tests.training.test_run import Killed, kill_at_step, read_metrics

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs PEFT")


def adapted(model: torch.nn.Module) -> torch.nn.Module:
    """The model with adapters of random values."""
    add_adapters(model, 3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_adapters_give_the_same_outputs(name: str, masks: bool) -> None:
    family = FAMILIES[name]
    if masks and family.segmentation_class is None:
        pytest.skip("has no masks")
    torch.manual_seed(0)
    plain = family.segmenter() if masks else family.detector()
    keys = plain.state_dict().keys()
    with torch.no_grad():
        before = plain(*padded_batch())
        model = adapted(plain)
        expected = model(*padded_batch())
        whole = merged(model)
        found = whole(*padded_batch())
    assert (expected.logits - before.logits).abs().max() > 1e-2
    assert_same_outputs(found, expected)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    assert whole.state_dict().keys() == keys
    assert adapted_layers(model)  # this one can be trained on


@pytest.mark.parametrize("name", FAMILIES)
def test_all_but_the_backbone_and_the_adapted_weights_learns(name: str) -> None:
    model = FAMILIES[name].detector(auxiliary_loss=True).train()
    linear = {n for n, part in model.named_modules() if type(part) is torch.nn.Linear and ".layers." in n}
    linear = {n for n in linear if ".encoder.layers." in n or ".decoder.layers." in n}
    model = adapted(model)
    assert adapted_layers(model).keys() == linear
    model(*padded_batch(), labels=some_labels()).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        is_fixed = "base_layer" in parameter_name or "conv_encoder" in parameter_name
        assert parameter.requires_grad != is_fixed, parameter_name
        assert (parameter.grad is None) == is_fixed, parameter_name


def test_a_run_leaves_a_plain_model(recipe, tiny_deformable_detr, capsys) -> None:
    chosen = recipe(lora=2, epochs=1, learning_rate=0.01)
    result = train(chosen)
    assert "(LoRA)" in capsys.readouterr().err
    detector = Detector.from_pretrained(chosen.output, device="cpu")
    found = evaluate_detector(detector, chosen.val_images, chosen.val_annotations, batch_size=2, raw=True)
    assert found.stats["AP"] == pytest.approx(result.best["AP"], abs=1e-9)
    start, end = (
        type(detector.model).from_pretrained(folder).state_dict()
        for folder in (tiny_deformable_detr, chosen.output)
    )
    assert not [name for name in end if "lora" in name or "base_layer" in name]
    changed = {
        name for name in start if end[name].shape != start[name].shape or (end[name] != start[name]).any()
    }
    assert {"model.encoder.layers.0.fc1.weight", "class_embed.0.weight", "model.level_embed"} <= changed
    assert "model.encoder.layers.0.fc1.bias" not in changed
    assert not [name for name in changed if "conv_encoder" in name]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipe, tmp_path, monkeypatch) -> None:
    train(recipe(output=tmp_path / "whole", lora=2))
    with monkeypatch.context() as patch:
        kill_at_step(patch, 5)
        with pytest.raises(Killed):
            train(recipe(output=tmp_path / "killed", lora=2))
    with pytest.raises(SettingError, match="started with --lora 2, not None"):
        train(recipe(output=tmp_path / "killed", resume=True))
    train(recipe(output=tmp_path / "killed", lora=2, resume=True))
    assert len(read_metrics(tmp_path / "killed")) == 6
    for name in ("metrics.csv", "model.safetensors", "checkpoints/checkpoint-6/averaged_weights.pt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_masks_are_trained_with_adapters(recipe, tiny_panoptic) -> None:
    chosen = recipe(model=str(tiny_panoptic), masks=True, lora=2, epochs=1)
    train(chosen)
    assert Detector.from_pretrained(chosen.output).has_masks


@pytest.mark.parametrize("options", [{}, {"lora": 2}])
def test_training_goes_on_from_an_adapter_with_what_it_adds(recipe, tmp_path, options) -> None:
    peft = pytest.importorskip("peft")
    FAMILIES["detr"].save(tmp_path / "model")
    model = DetrForObjectDetection.from_pretrained(tmp_path / "model")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["fc1", "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    rates = {"learning_rate": 1e-12, "backbone_learning_rate": 0.0}
    chosen = recipe(model=str(tmp_path / "adapter"), epochs=1, **rates, **options)
    train(chosen)
    expected = model.merge_and_unload().state_dict()
    found = DetrForObjectDetection.from_pretrained(chosen.output).state_dict()
    for name in ("model.encoder.layers.0.fc1.weight", "model.decoder.layers.1.self_attn.q_proj.weight"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)
    data = DetectionDataset.from_coco(chosen.train_images, chosen.train_annotations)
    network, *_ = build_model(chosen, data)
    plain = {"model.encoder.layers.0.fc1.weight", "model.encoder.layers.0.fc1.bias"}
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert (plain <= learns) == (not options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_scratch": True, "model": "detr"}, "leave out --from-scratch"),
        ({"freeze": "nothing"}, "leave out --freeze nothing"),
        ({"freeze": "detector", "masks": True}, "leave out --freeze detector"),
        ({"live_batch_norm": True}, "leave out --live-batch-norm"),
        ({"lora": 0}, "--lora must be at least 1, not 0"),
    ],
)
def test_what_contradicts_adapters_is_refused(recipe, options, message) -> None:
    with pytest.raises(SettingError, match=message):
        recipe(**{"lora": 2, **options})


def test_without_peft_a_message_names_the_extra_before_any_work(recipe, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    chosen = recipe(lora=2)
    with pytest.raises(MissingExtraError, match=r"--lora needs packages .*pip install '\.\[lora\]'"):
        train(chosen)
    assert not chosen.output.exists()
    train(recipe(epochs=1))  # others do not need it
