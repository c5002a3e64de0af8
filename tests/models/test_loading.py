"""Loading and saving: layouts, renamed tensors, mismatches, backbone weights, freezing, initialisation."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from detrkit import (
    ConditionalDetrConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrModel,
    DetrConfig,
    DetrForObjectDetection,
    DetrModel,
    TableTransformerConfig,
    TableTransformerForObjectDetection,
)
from detrkit.errors import CheckpointError
from detrkit.models.layers import backbone as backbone_module
from tests.closeness import assert_same_numbers, assert_same_outputs, assert_same_weights
from tests.tiny import FAMILIES, padded_batch, shake, tiny_config, tiny_resnet

HEADS = ("class_labels_classifier", "bbox_predictor", "class_embed", "bbox_embed")
TIMM = {"backbone_config": None, "use_timm_backbone": True, "backbone": "resnet18"}


def assert_same_predictions(model, expected):
    with torch.no_grad():
        assert_same_outputs(model(*padded_batch()), expected(*padded_batch()))


@pytest.mark.parametrize(
    "options", [{}, TIMM, {**TIMM, "dilation": True}, {"position_embedding_type": "learned"}],
    ids=["resnet-config", "timm", "timm-dc5", "learned-positions"],
)  # fmt: skip
class TestTransformers:
    def test_a_model_saved_by_detrkit_loads_in_transformers(self, one_stage_family, options, tmp_path):
        ours = one_stage_family.detector(**options)
        ours.save_pretrained(tmp_path)
        theirs, info = one_stage_family.transformers_detector_class.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert_same_predictions(theirs, ours)

    def test_a_model_saved_by_transformers_loads_in_detrkit(self, one_stage_family, options, tmp_path):
        theirs = one_stage_family.transformers_detector(**options)
        theirs.save_pretrained(tmp_path)
        ours, info = one_stage_family.detector_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same_predictions(ours, theirs)

    def test_a_state_dict_of_transformers_5_loads_in_detrkit(self, one_stage_family, options, tmp_path):
        theirs = one_stage_family.transformers_detector(**options)
        theirs.config.save_pretrained(tmp_path)
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        ours, info = one_stage_family.detector_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same_predictions(ours, theirs)

    def test_what_was_loaded_renamed_is_saved_with_the_names_of_the_hub(
        self, one_stage_family, options, tmp_path
    ):
        theirs = one_stage_family.transformers_detector(**options)
        theirs.config.save_pretrained(tmp_path / "v5")
        torch.save(theirs.state_dict(), tmp_path / "v5" / "pytorch_model.bin")
        ours = one_stage_family.detector_class.from_pretrained(tmp_path / "v5")
        ours.save_pretrained(tmp_path / "ours")
        names = set(load_file(tmp_path / "ours" / "model.safetensors"))
        assert set(ours.state_dict()) <= names
        assert all(".conv_encoder.model." in n for n in names if "backbone" in n and "position" not in n)


def test_saving_and_loading_gives_the_same_outputs_and_configuration(family, tmp_path):
    names = {0: "cell", 1: "spot"}
    ids = {name: i for i, name in names.items()}
    model = family.detector(num_labels=2, id2label=names, label2id=ids, dropout=0.3)
    model.save_pretrained(tmp_path)
    loaded = family.detector_class.from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_same_predictions(loaded, model)
    assert loaded.config.id2label == {0: "cell", 1: "spot"}
    assert loaded.config.dropout == 0.3
    assert not loaded.training


def test_bare_model_loads_from_a_detector_and_the_other_way_round(one_stage_family, tmp_path):
    model = one_stage_family.detector()
    model.save_pretrained(tmp_path / "detector")
    bare = one_stage_family.base_class.from_pretrained(tmp_path / "detector")
    expected = model(*padded_batch()).last_hidden_state
    torch.testing.assert_close(bare(*padded_batch()).last_hidden_state, expected)
    bare.save_pretrained(tmp_path / "bare")
    detector, info = one_stage_family.detector_class.from_pretrained(
        tmp_path / "bare", output_loading_info=True
    )
    torch.testing.assert_close(detector(*padded_batch()).last_hidden_state, expected)
    assert all(n.startswith(HEADS) for n in info["missing_keys"])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.segmentation_class])
def test_a_detector_reads_the_detector_inside_a_panoptic_checkpoint(name, tmp_path):
    family = FAMILIES[name]
    config = family.transformers_config_class(**family.config(encoder_attention_heads=8).to_dict())
    theirs = shake(getattr(transformers, family.segmentation_class.__name__)(config)).eval()
    theirs.save_pretrained(tmp_path)
    ours, info = family.detector_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(n.startswith(("mask_head", "bbox_attention")) for n in info["unexpected_keys"])
    # Transformers' Conditional DETR for segmentation forgets the reference points of its boxes.
    with torch.no_grad():
        assert_same_numbers(ours(*padded_batch()).logits, theirs(*padded_batch()).logits)


def test_stray_batch_counters_of_old_files_are_no_matter(family, tmp_path):
    model = family.detector(**TIMM)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.backbone.conv_encoder.model.layer2.0.downsample.1.num_batches_tracked"] = torch.tensor(0)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = family.detector_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert_same_weights(loaded, model)
    assert_same_predictions(loaded, model)


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"num_labels": 3}, "class_labels_classifier.weight"),
        ({"num_queries": 7}, "query_position_embeddings"),
    ],
)
def test_a_changed_number_of_labels_or_queries_names_the_tensor_and_the_remedy(change, tensor, tmp_path):
    DetrForObjectDetection(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes=True") as error:
        DetrForObjectDetection.from_pretrained(tmp_path, **change)
    assert f"{tensor}" in str(error.value)
    assert "is (6, 32), not (4, 32)" in str(error.value) or "is (12, 32), not (7, 32)" in str(error.value)


def test_a_changed_number_of_labels_starts_a_new_class_head_with_a_message(tmp_path, caplog):
    model = shake(DetrForObjectDetection(tiny_config()))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="detrkit"):
        loaded = DetrForObjectDetection.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert "class head was reinitialised for 3 labels" in caplog.text
    assert loaded.class_labels_classifier.weight.shape == (4, 32)
    assert loaded.class_labels_classifier.weight.abs().max() <= 32**-0.5 + 1e-6
    torch.testing.assert_close(loaded.bbox_predictor.layers[0].weight, model.bbox_predictor.layers[0].weight)
    assert len(loaded.config.id2label) == 3


def test_a_changed_number_of_queries_says_that_they_are_new(one_stage_family, tmp_path, caplog):
    one_stage_family.detector().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="detrkit"):
        loaded = one_stage_family.detector_class.from_pretrained(
            tmp_path, num_queries=20, ignore_mismatched_sizes=True
        )
    assert "object queries were reinitialised because their number changed to 20" in caplog.text
    with torch.no_grad():
        outputs = loaded(*padded_batch())
    assert outputs.logits.shape == (2, 20, one_stage_family.outputs())
    assert torch.isfinite(outputs.logits).all()


def test_missing_and_unexpected_tensors_are_reported_by_name(tmp_path):
    shake(DetrForObjectDetection(tiny_config())).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["stranger"] = torch.zeros(3)
    gone = "model.backbone.conv_encoder.model.embedder.embedder.normalization.running_var"
    del tensors[gone], tensors["model.encoder.layers.1.fc1.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lack tensors of DetrForObjectDetection: 2, such as model\.backbone"
    ):
        DetrForObjectDetection.from_pretrained(tmp_path)
    loaded, info = DetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True, ignore_mismatched_sizes=True
    )
    assert set(info["missing_keys"]) == {gone, "model.encoder.layers.1.fc1.weight"}
    assert set(info["unexpected_keys"]) == {"stranger"}
    assert all(torch.isfinite(t).all() for t in loaded.state_dict().values())
    assert (loaded.state_dict()[gone] == 1).all()


@pytest.mark.parametrize("name", ["model.encoder.layernorm", "model.encoder.norm"])
def test_a_norm_after_the_encoder_is_refused_unless_the_layers_are_pre_norm(name, tmp_path):
    model = shake(DetrForObjectDetection(tiny_config(normalize_before=True))).eval()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key.replace("model.encoder.layernorm", name): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = DetrForObjectDetection.from_pretrained(tmp_path).eval()
    assert_same_predictions(loaded, model)
    entries = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**entries, "normalize_before": False}))
    with pytest.raises(CheckpointError, match=r"model\.encoder\.layernorm.*set normalize_before to true"):
        DetrForObjectDetection.from_pretrained(tmp_path)


def test_pre_norm_layers_want_the_norm_after_the_encoder(tmp_path):
    shake(DetrForObjectDetection(tiny_config())).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack tensors .* such as model\.encoder\.layernorm"):
        DetrForObjectDetection.from_pretrained(tmp_path, normalize_before=True)


@pytest.mark.parametrize(
    ("config_class", "value"), [(ConditionalDetrConfig, True), (TableTransformerConfig, False)]
)
def test_a_family_refuses_layers_that_it_does_not_have(config_class, value):
    with pytest.raises(ValueError, match=f"normalize_before={value} does not go with"):
        config_class(normalize_before=value)


def test_a_checkpoint_of_another_family_is_refused_by_name(tmp_path):
    model = shake(TableTransformerForObjectDetection(tiny_config(TableTransformerConfig)))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a 'table-transformer' model, not 'detr'"):
        DetrForObjectDetection.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"without a place in DetrForObjectDetection"):
        DetrForObjectDetection.from_pretrained(tmp_path, config=tiny_config())


def test_heads_of_a_refining_decoder_are_not_dropped(tmp_path):
    config = tiny_config(DeformableDetrConfig, with_box_refine=True)
    shake(DeformableDetrForObjectDetection(config)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"such as model\.decoder\.bbox_embed"):
        DeformableDetrForObjectDetection.from_pretrained(tmp_path, with_box_refine=False)
    _, info = DeformableDetrModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def test_a_two_stage_model_of_1203_classes_loads_from_its_decoders_heads_alone(tmp_path):
    model = FAMILIES["deformable_detr_two_stage"].detector(num_labels=1203)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    decoders = {name: t for name, t in tensors.items() if not name.startswith(HEADS)}
    save_file(decoders, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = DeformableDetrForObjectDetection.from_pretrained(tmp_path).eval()
    assert loaded.config.id2label[1202] == "LABEL_1202"
    assert_same_predictions(loaded, model)


def test_backbone_weights_are_never_fetched_for_a_checkpoint(tmp_path, monkeypatch):
    DetrForObjectDetection(tiny_config(**TIMM)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "use_pretrained_backbone": True}))
    asked = []
    real = timm.create_model

    def spy(*args, pretrained, **kwargs):
        asked.append(pretrained)
        return real(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(backbone_module.timm, "create_model", spy)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    assert set(asked) == {False}
    DetrForObjectDetection(loaded.config)
    assert asked[-1] is True


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("options", [{}, TIMM], ids=["resnet-config", "timm"])
def test_stem_and_first_stage_are_frozen(options, loaded, tmp_path):
    model = DetrForObjectDetection(tiny_config(**options))
    if loaded:
        model.save_pretrained(tmp_path)
        model = DetrForObjectDetection.from_pretrained(tmp_path)
    backbone = model.model.backbone.conv_encoder.model
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    early = ("conv1.", "layer1.", "embedder.", "encoder.stages.0.")
    assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(early)}
    assert frozen
    assert all("norm" not in name and "bn" not in name for name, _ in backbone.named_parameters())
    others = [p for name, p in model.named_parameters() if "conv_encoder" not in name]
    assert all(p.requires_grad for p in others)


def test_freeze_and_unfreeze_backbone():
    model = DetrModel(tiny_config())
    model.freeze_backbone()
    assert not any(p.requires_grad for p in model.backbone.parameters())
    model.unfreeze_backbone()
    assert all(p.requires_grad for p in model.backbone.parameters())


def test_a_new_model_is_initialised_as_the_original():
    torch.manual_seed(0)
    model = DetrForObjectDetection(tiny_config(d_model=64, encoder_ffn_dim=128, num_queries=200))
    layer = model.model.encoder.layers[0]
    # Xavier uniform of the packed (3 x 64, 64) projection, of (128, 64), and PyTorch's default for heads.
    for weight, bound in (
        (layer.self_attn.q_proj.weight, (6 / (4 * 64)) ** 0.5),
        (layer.self_attn.out_proj.weight, (6 / (2 * 64)) ** 0.5),
        (layer.fc1.weight, (6 / (64 + 128)) ** 0.5),
        (model.class_labels_classifier.weight, 64**-0.5),
        (model.bbox_predictor.layers[2].weight, 64**-0.5),
    ):
        assert bound * 0.97 < weight.abs().max() <= bound
    assert (layer.self_attn.q_proj.bias == 0).all()
    assert abs(model.model.query_position_embeddings.weight.std().item() - 1) < 0.05
    learned = DetrModel(tiny_config(position_embedding_type="learned")).backbone.position_embedding
    assert 0 <= learned.row_embeddings.weight.min() < 0.1
    assert 0.9 < learned.row_embeddings.weight.max() < 1


def test_a_new_model_keeps_what_timm_made_of_its_backbone(monkeypatch):
    made = []
    real = timm.create_model

    def spy(*args, **kwargs):
        made.append(real(*args, **kwargs))
        made.append({n: p.detach().clone() for n, p in made[0].named_parameters()})
        return made[0]

    monkeypatch.setattr(backbone_module.timm, "create_model", spy)
    model = DetrForObjectDetection(tiny_config(**TIMM))
    for name, parameter in model.model.backbone.conv_encoder.model.named_parameters():
        torch.testing.assert_close(parameter, made[1][name], atol=0, rtol=0)


def timm_to_transformers(name: str) -> str:
    """timm's name of a bottleneck ResNet's tensor in Transformers' layout."""
    name = name.replace("conv1.", "embedder.embedder.convolution.", 1) if name.startswith("conv1") else name
    name = name.replace("bn1.", "embedder.embedder.normalization.", 1) if name.startswith("bn1") else name
    for stage in range(1, 5):
        name = name.replace(f"layer{stage}.", f"encoder.stages.{stage - 1}.layers.")
    for k in range(1, 4):
        name = name.replace(f".conv{k}.", f".layer.{k - 1}.convolution.")
        name = name.replace(f".bn{k}.", f".layer.{k - 1}.normalization.")
    return name.replace("downsample.0.", "shortcut.convolution.").replace(
        "downsample.1.", "shortcut.normalization."
    )


def test_dilation_of_a_resnet_config_equals_that_of_timm():
    resnet = tiny_resnet(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=[2, 2, 2, 2],
        out_features=["stage3", "stage4"],
    )
    ours = DetrModel(tiny_config(backbone_config=resnet, dilation=True)).eval()
    reference = shake(DetrModel(tiny_config(**{**TIMM, "backbone": "resnet26"}, dilation=True))).eval()
    source = reference.backbone.conv_encoder.model.state_dict()
    plain_stem = {k: v for k, v in source.items() if not k.startswith(("conv1", "bn1"))}
    result = ours.backbone.conv_encoder.model.load_state_dict(
        {timm_to_transformers(k): v for k, v in plain_stem.items()}, strict=False
    )
    assert not result.unexpected_keys
    x = torch.randn(1, 64, 20, 24)
    theirs = reference.backbone.conv_encoder.model
    for stage in range(4):
        ours_stage = ours.backbone.conv_encoder.model.encoder.stages[stage]
        expected = theirs[f"layer{stage + 1}"](x)
        torch.testing.assert_close(ours_stage(x), expected, atol=1e-4, rtol=1e-4)
        x = expected
    assert x.shape[-2:] == (5, 6)  # the last stage kept its input's size


def test_dilation_of_a_backbone_without_stages_to_dilate_is_refused():
    from transformers import ConvNextConfig

    convnext = ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=["stage4"])
    with pytest.raises(ValueError, match="DC5"):
        DetrModel(tiny_config(backbone_config=convnext, dilation=True))


class TestConfig:
    def test_the_default_backbone_is_resnet50_of_timm(self):
        config = DetrConfig()
        assert (config.backbone, config.use_timm_backbone, config.backbone_config) == ("resnet50", True, None)

    def test_common_names_are_aliases(self):
        config = DetrConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=3)
        assert (config.d_model, config.encoder_attention_heads, config.encoder_layers) == (48, 6, 3)

    @pytest.mark.parametrize("kwargs", [None, {}, {"in_chans": 3}])
    @pytest.mark.parametrize("dilation", [None, False, True])
    def test_every_form_of_the_hub_is_read_and_written_so_that_transformers_reads_it(
        self, family, kwargs, dilation
    ):
        form = {
            "model_type": family.config_class.model_type, "backbone": "resnet50", "use_timm_backbone": True,
            "backbone_kwargs": kwargs and {**kwargs, "out_indices": list(family.stages)},
            "backbone_config": None, "dilation": dilation, "use_pretrained_backbone": None, "bbox_cost": 5.0,
            "num_hidden_layers": 6, "scale_embedding": False, "classifier_dropout": 0.0,
            "max_position_embeddings": 1024, "id2label": {str(i): f"c{i}" for i in range(91)},
        }  # fmt: skip
        config = family.config_class.from_dict(form)
        assert config.dilation is bool(dilation)
        assert config.num_labels == 91
        written = json.loads(config.to_json_string())
        theirs = family.transformers_config_class.from_dict(written)
        assert theirs.backbone_config.backbone == "resnet50"
        assert (getattr(theirs.backbone_config, "output_stride", None) == 16) is bool(dilation)
        again = family.config_class.from_dict(written)
        assert json.loads(again.to_json_string()) == written

    def test_the_nested_timm_form_of_transformers_5_becomes_the_one_of_the_hub(self, family):
        nested = family.transformers_config_class(backbone="resnet101", dilation=True).to_dict()
        config = family.config_class.from_dict(nested)
        assert (config.backbone, config.dilation, config.backbone_config) == ("resnet101", True, None)

    def test_missing_use_timm_backbone_with_a_resnet_config(self):
        form = tiny_config().to_dict()
        form.pop("use_timm_backbone")
        config = DetrConfig.from_dict(form)
        assert config.backbone_config.model_type == "resnet"
        assert config.use_timm_backbone is False

    def test_impossible_settings_are_refused(self):
        with pytest.raises(ValueError, match="not divisible by decoder_attention_heads=7"):
            DetrConfig(decoder_attention_heads=7)
        with pytest.raises(ValueError, match="'sine' or 'learned'"):
            DetrConfig(position_embedding_type="rotary")
        with pytest.raises(ValueError, match="unknown model_type: 'nonsense'"):
            DetrConfig(backbone_config={"model_type": "nonsense"})


def test_models_are_loaded_one_at_a_time(tiny_detr, monkeypatch):
    """Transformers replaces functions of PyTorch while it loads, for all threads: two spoil each other."""
    load = PreTrainedModel.from_pretrained.__func__
    inside, together = [], []

    def from_pretrained(cls, *args, **kwargs):
        inside.append(cls)
        time.sleep(0.02)
        together.append(len(inside))
        try:
            return load(cls, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(DetrForObjectDetection.from_pretrained, [tiny_detr] * 8))
    assert together == [1] * 8
    expected = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
