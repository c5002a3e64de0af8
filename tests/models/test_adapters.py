"""Adapters of PEFT: what they add is part of the model, wherever it goes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detrkit import Detector, DetrForObjectDetection, families
from detrkit.engines.export import export_model
from detrkit.errors import CheckpointError, SettingError
from detrkit.models import adapters
from tests.closeness import assert_same_outputs
from tests.tiny import FAMILIES, padded_batch

peft = pytest.importorskip("peft")


def adapted(model, layers, **options):
    """A model with an adapter of random values on some layers, which must make a difference."""
    with torch.no_grad():
        before = model(*padded_batch())
        found = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers, **options)).eval()
        for name, parameter in found.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        assert (found(*padded_batch()).logits - before.logits).abs().max() > 1e-3
    return found


def processor_of(family):
    entry = families.FAMILIES[family.config_class.model_type]
    return entry.load(entry.processor)(size={"shortest_edge": 64, "longest_edge": 107})


@pytest.fixture
def folders(tmp_path: Path):
    """A model's folder, that of an adapter of it, and the adapted model."""
    FAMILIES["detr"].save(tmp_path / "model")
    model = adapted(DetrForObjectDetection.from_pretrained(tmp_path / "model"), ["fc1", "q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter", model


@pytest.mark.parametrize("layers", [["fc1"], "all-linear", r".*convolution", ["query_position_embeddings"]])
def test_a_detector_has_the_adapters_of_the_model_that_it_is_given(one_stage_family, layers):
    model = adapted(one_stage_family.detector(), layers)
    with torch.inference_mode():
        expected = model(*padded_batch())
        found = Detector(model, processor_of(one_stage_family)).model(*padded_batch())
    assert_same_outputs(found, expected)


def adapted_segmenter(family, layers):
    """A model with masks and an adapter on layers of its mask head, which must make a difference."""
    model = peft.get_peft_model(family.segmenter(), peft.LoraConfig(r=4, target_modules=layers)).eval()
    with torch.no_grad():
        before = model(*padded_batch()).pred_masks
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
        assert (model(*padded_batch()).pred_masks - before).abs().max() > 0.1
    return model


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_masks_have_the_adapters_of_the_mask_head(name):
    model = adapted_segmenter(FAMILIES[name], r".*mask_head\.(lay1|lay2)")
    with torch.no_grad():
        expected = model(*padded_batch())
        merged = model.merge_and_unload()(*padded_batch())  # plain layers, whose first is split in two
    assert_same_outputs(merged, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_a_model_is_exported_with_the_adapter_of_its_first_mask_layer(name, tmp_path, monkeypatch):
    # The graph is recorded with two images.
    monkeypatch.setattr("detrkit.engines.export._CHECKED", ((1, 97, 210), (3, 97, 210)))
    model = adapted_segmenter(FAMILIES[name], r".*mask_head\.lay1")
    written = export_model(model, tmp_path / "exported", "onnx")  # which compares the two
    assert set(written.differences) == {"logits", "pred_boxes", "pred_masks", "query_indices"}


def test_a_folder_with_an_adapter_is_loaded_with_its_model(folders):
    _, folder, model = folders
    with torch.no_grad():
        expected = model(*padded_batch())
        detector = Detector.from_pretrained(folder, device="cpu")
        assert_same_outputs(detector.model(*padded_batch()), expected)
        assert_same_outputs(DetrForObjectDetection.from_pretrained(folder).eval()(*padded_batch()), expected)
    assert detector.processor.size["shortest_edge"] == 64


@pytest.mark.slow
def test_an_adapted_model_is_exported_with_its_adapter(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("detrkit.engines.export._CHECKED", ((1, 320, 416),))
    processor = processor_of(FAMILIES["detr"])
    export_model(
        folders[2], tmp_path / "exported", "onnx", processor=processor
    )  # which compares it with the adapted model
    with torch.no_grad():
        expected = folders[2](padded_batch()[0])
        found = Detector.from_pretrained(tmp_path / "exported").model(padded_batch()[0])
    assert_same_outputs(found, expected)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"base_model_name_or_path": None}, "adapter.*does not name its model"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ({"r": 7}, "adapter"),
        ({"target_modules": ["fc2"]}, "does not fit its model"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_refused_by_name(folders, entries, says):
    path = folders[1] / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    for read in (Detector.from_pretrained, DetrForObjectDetection.from_pretrained):
        with pytest.raises(CheckpointError, match=says):
            read(folders[1])


def test_without_peft_a_message_says_what_it_is(folders, monkeypatch):
    found = adapters.importlib.util.find_spec
    monkeypatch.setattr(
        adapters.importlib.util, "find_spec", lambda name: None if name == "peft" else found(name)
    )
    for read in (Detector.from_pretrained, DetrForObjectDetection.from_pretrained):
        with pytest.raises(CheckpointError, match=r"adapter for the model .*pip install peft"):
            read(folders[1])


def test_a_prompt_is_refused_by_name():
    prompt = SimpleNamespace(is_prompt_learning=True, peft_type="PREFIX_TUNING")
    model = SimpleNamespace(peft_config={}, get_base_model=None, active_peft_config=prompt)
    with pytest.raises(SettingError, match="PREFIX_TUNING"):
        Detector(model, processor_of(FAMILIES["detr"]))
