"""Outputs, options and gradients of every family on tiny models."""

import pytest
import torch
from transformers import ConvNextConfig, SwinConfig

from detrkit import DetrForObjectDetection
from tests.closeness import assert_same_numbers, assert_same_outputs
from tests.tiny import padded_batch, shake, some_labels, tiny_config, tiny_resnet


@pytest.fixture
def model(family):
    return family.detector()


@pytest.fixture
def dense_model(dense_family):
    return dense_family.detector()


def test_logits_are_of_the_classes_and_boxes_are_normalised(family, model):
    outputs = model(*padded_batch())
    assert outputs.logits.shape == (2, 12, family.outputs())
    assert outputs.pred_boxes.shape == (2, 12, 4)
    assert outputs.last_hidden_state.shape == (2, 12, 32)
    assert outputs.encoder_last_hidden_state.shape == (2, family.encoded, 32)
    assert (outputs.pred_boxes > 0).all()
    assert (outputs.pred_boxes < 1).all()


def test_attentions_and_hidden_states_come_in_number_shape_and_order(family, model):
    outputs = model(*padded_batch(), output_attentions=True, output_hidden_states=True)
    assert [a.shape for a in outputs.encoder_attentions] == [family.image_attention(4, family.encoded)] * 2
    assert [a.shape for a in outputs.decoder_attentions] == [(2, 8, 12, 12)] * 3
    assert [a.shape for a in outputs.cross_attentions] == [family.image_attention(8, 12)] * 3
    assert [h.shape for h in outputs.encoder_hidden_states] == [(2, family.encoded, 32)] * 3
    assert [h.shape for h in outputs.decoder_hidden_states] == [(2, 12, 32)] * 4
    last = outputs.encoder_hidden_states[-1]
    if model.config.normalize_before:
        last = model.model.encoder.layernorm(last)
    torch.testing.assert_close(last, outputs.encoder_last_hidden_state)
    torch.testing.assert_close(outputs.decoder_hidden_states[-1], outputs.last_hidden_state)
    assert list(outputs.keys()) == [
        "logits",
        "pred_boxes",
        "last_hidden_state",
        "decoder_hidden_states",
        "decoder_attentions",
        "cross_attentions",
        "encoder_last_hidden_state",
        "encoder_hidden_states",
        "encoder_attentions",
        *family.detector_fields,
    ]


def test_attention_weights_sum_to_one_and_leave_padding_out(dense_family, dense_model):
    pixels, mask = padded_batch()
    outputs = dense_model(pixels, mask, output_attentions=True)
    cross = outputs.cross_attentions[-1]
    torch.testing.assert_close(cross.sum(-1), torch.ones(2, 8, 12))
    padded = dense_family.padding(mask)
    assert padded[1].any()
    assert cross[1, :, :, padded[1]].max() == 0
    assert outputs.encoder_attentions[0][1, :, :, padded[1]].max() == 0


def test_tuple_output_holds_the_same_in_the_same_order(family, model):
    inputs = padded_batch()
    named, plain = (
        model(*inputs, output_attentions=True),
        model(*inputs, output_attentions=True, return_dict=False),
    )
    assert isinstance(plain, tuple)
    assert len(plain) == len(named.to_tuple()) == 7 + len(family.detector_fields)
    torch.testing.assert_close(plain[0], named.logits)
    torch.testing.assert_close(plain[1], named.pred_boxes)
    model.config.return_dict = False
    assert isinstance(model(*inputs), tuple)


def test_sdpa_and_eager_attention_agree(model):
    inputs = padded_batch()
    sdpa = model(*inputs)
    model.set_attn_implementation("eager")
    assert_same_outputs(sdpa, model(*inputs))


def test_a_detector_compiles_into_one_graph(model):
    inputs = padded_batch()
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
        assert_same_outputs(compiled, model(*inputs))


def test_attn_implementation_is_taken_from_the_call_that_makes_the_model(family):
    model = family.detector_class._from_config(family.config(), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    assert family.detector_class(family.config()).config._attn_implementation == "sdpa"


def test_auxiliary_loss_changes_no_prediction(family, model):
    inputs = padded_batch()
    plain = model(*inputs)
    model.config.auxiliary_loss = True
    full = model(*inputs)
    assert_same_outputs(plain, full)
    assert plain.auxiliary_outputs is None
    assert [a["logits"].shape for a in full.auxiliary_outputs] == [(2, 12, family.outputs())] * 2


def test_auxiliary_outputs_are_what_a_shallower_decoder_predicts(model):
    model.config.auxiliary_loss = True
    inputs = padded_batch()
    auxiliary = model(*inputs).auxiliary_outputs[0]
    model.model.decoder.layers = model.model.decoder.layers[:1]
    model.config.decoder_layers = 1
    assert_same_outputs(auxiliary, model(*inputs))


def test_an_image_gets_the_same_detections_alone_and_beside_another(model):
    pixels, mask = padded_batch()
    together = model(pixels, mask)
    for i in range(2):
        alone = model(pixels[i : i + 1], mask[i : i + 1])
        assert_same_outputs({field: together[field][i : i + 1] for field in alone}, alone)


def test_what_lies_in_the_padded_features_does_not_matter(family, model):
    pixels, mask = padded_batch()
    base = model(pixels, mask)
    # Beyond the reach of the last real feature's receptive field borders, only masked features change.
    memory = base.encoder_last_hidden_state.clone()
    padded = family.padding(mask)
    assert padded.any()
    memory[padded] += 7.0
    again = model(pixels, mask, encoder_outputs=(memory,))
    assert_same_outputs(again, base)


def test_a_full_mask_is_the_same_as_none_and_builds_no_attention_mask(dense_family, dense_model, monkeypatch):
    pixels, mask = padded_batch()
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    full = dense_model(pixels, torch.ones_like(mask))
    assert seen
    assert all(m is None for m in seen)
    torch.testing.assert_close(full.logits, dense_model(pixels).logits)
    seen.clear()
    dense_model(pixels, mask)
    assert any(m is not None and m.shape == (2, 1, 1, dense_family.encoded) for m in seen)


def test_encoder_outputs_skip_the_encoder(model):
    pixels, mask = padded_batch()
    first = model(pixels, mask, output_hidden_states=True)
    again = model(
        pixels, mask, encoder_outputs=(first.encoder_last_hidden_state, first.encoder_hidden_states)
    )
    torch.testing.assert_close(first.logits, again.logits)
    assert len(again.encoder_hidden_states) == 3


def test_inputs_embeds_replace_the_image(dense_model):
    embeds = torch.randn(2, 16, 32)
    outputs = dense_model(inputs_embeds=embeds)
    assert outputs.logits.shape[:2] == (2, 12)
    assert (outputs.logits - dense_model(inputs_embeds=embeds.flip(1)).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="15 is not a square"):
        dense_model(inputs_embeds=embeds[:, :15])
    with pytest.raises(ValueError, match="pixel_values"):
        dense_model()


def test_decoder_inputs_embeds_and_query_mask_are_used(dense_model):
    pixels, _ = padded_batch()
    base = dense_model(pixels)
    zeros = torch.zeros(2, 12, 32)
    torch.testing.assert_close(dense_model(pixels, decoder_inputs_embeds=zeros).logits, base.logits)
    ramp = zeros + torch.linspace(-1, 1, 32)
    assert (dense_model(pixels, decoder_inputs_embeds=ramp).logits - base.logits).abs().max() > 1e-3
    keep = torch.ones(2, 12, dtype=torch.long)
    torch.testing.assert_close(dense_model(pixels, decoder_attention_mask=keep).logits, base.logits)
    keep[:, 6:] = 0
    hidden = dense_model(pixels, decoder_attention_mask=keep, output_attentions=True)
    assert hidden.decoder_attentions[0][..., 6:].max() == 0


def test_wrong_shapes_are_named(model):
    pixels, mask = padded_batch()
    with pytest.raises(ValueError, match="batch dimension"):
        model(pixels[0])
    with pytest.raises(ValueError, match=r"pixel_mask must be \(2, 128, 160\)"):
        model(pixels, mask[:, :100])


def test_bare_model_gives_states_only(one_stage_family):
    outputs = one_stage_family.base()(*padded_batch())
    assert tuple(outputs.keys()) == one_stage_family.model_fields


def test_loss_is_a_scalar_with_the_original_terms(family, model):
    outputs = model(*padded_batch(), labels=some_labels())
    assert outputs.loss.shape == ()
    common = {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"}
    assert set(outputs.loss_dict) == common | set(family.loss_terms)
    model.train()
    with_auxiliary = model(*padded_batch(), labels=some_labels())
    assert {"loss_ce_0", "loss_bbox_1"} <= set(with_auxiliary.loss_dict)
    assert "loss_ce_2" not in with_auxiliary.loss_dict
    assert with_auxiliary.auxiliary_outputs is None


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = family.detector(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).train()

    def gradients():
        model.zero_grad()
        model(*padded_batch(), labels=some_labels()).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert model.is_gradient_checkpointing
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        # Sums are taken in another order: as exact as the largest gradient of a tensor.
        tolerance = 1e-5 * float(plain[name].abs().max()) + 5e-5
        torch.testing.assert_close(plain[name], checkpointed[name], atol=tolerance, rtol=0, msg=name)


def test_every_trainable_parameter_gets_a_gradient(model):
    model.train()
    model(*padded_batch(), labels=some_labels()).loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    # A decoder that starts from zeros has nothing to learn in its first self-attention's values' weights,
    # but even those take part in the graph.
    assert without == []


def test_dropout_acts_in_training_only(model):
    inputs = padded_batch()
    assert_same_outputs(model(*inputs), model(*inputs))
    model.train()
    assert (model(*inputs).logits - model(*inputs).logits).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_with_positions_computed_in_float32(family, model, dtype):
    pixels, mask = padded_batch()
    positions = {}
    for name, net in (("full", model), ("half", family.detector().to(dtype))):
        feature_map = torch.zeros(2, 32, 40, 50, dtype=net.dtype)
        feature_mask = torch.ones(2, 40, 50, dtype=torch.bool)
        feature_mask[1, 31:] = False
        positions[name] = net.model.backbone.position_embedding(feature_map, feature_mask)
    assert_same_numbers(positions["half"], positions["full"])
    outputs = model.to(dtype)(pixels.to(dtype), mask)
    assert outputs.logits.dtype == dtype
    assert torch.isfinite(outputs.logits).all()
    loss = model(pixels.to(dtype), mask, labels=some_labels()).loss
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_activation_function_is_the_configured_one(name):
    model = DetrForObjectDetection(tiny_config(activation_function=name)).eval()
    x = torch.randn(3, 48)
    expected = getattr(torch.nn.functional, name)(x.clone())
    torch.testing.assert_close(model.model.encoder.layers[0].activation_fn(x.clone()), expected)


@pytest.mark.parametrize(
    "backbone",
    [
        tiny_resnet(layer_type="basic"),
        tiny_resnet(out_features=["stage4"]),
        SwinConfig(image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
                   out_features=["stage3", "stage4"]),
        ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=["stage2", "stage4"]),
    ],
    ids=["resnet-basic", "resnet-last-stage-only", "swin", "convnext"],
)  # fmt: skip
def test_transformers_backbones_run_and_survive_saving(backbone, tmp_path):
    model = shake(DetrForObjectDetection(tiny_config(backbone_config=backbone))).eval()
    inputs = padded_batch()
    expected = model(*inputs)
    model.save_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(*inputs).logits, expected.logits)


@pytest.mark.parametrize(
    ("name", "indices", "levels"),
    [
        ("resnet18", None, 4),
        ("tf_mobilenetv3_small_075", [2, 3, 4], 3),
        ("convnext_atto", [0, 1, 2, 3], 4),
        ("swin_s3_tiny_224", [1, 3], 2),
        ("resnest14d", None, 4),
    ],
)
def test_timm_backbones_run_and_survive_saving(name, indices, levels, tmp_path):
    options = {"backbone_kwargs": {"out_indices": indices}} if indices else {}
    config = tiny_config(backbone_config=None, backbone=name, use_timm_backbone=True, **options)
    model = DetrForObjectDetection(config).eval()
    size = 224 if "swin" in name else 96
    pixels = torch.randn(1, 3, size, size)
    expected = model(pixels)
    channels = model.model.backbone.intermediate_channel_sizes
    maps = model.model.backbone(pixels)
    assert len(maps) == len(channels) == levels
    assert [m.shape[1] for m in maps] == channels
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    model.save_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(pixels).logits, expected.logits)
