"""Segmentation models: masks beside a detector's outputs, with bounded work."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from detrkit import DetrForSegmentation
from detrkit.engines.torch_engine import prepare
from detrkit.losses.matcher import PackedTargets, match
from detrkit.models.layers import mask_head
from detrkit.models.layers.mask_head import AttentionMap
from tests.closeness import assert_same_numbers
from tests.tiny import FAMILIES, padded_batch, shake, some_labels, tiny_resnet

CLASSES = {name: family.segmentation_class for name, family in FAMILIES.items() if family.segmentation_class}
TIMM = {"backbone": "resnet18", "use_timm_backbone": True, "backbone_config": None}
BOXES = ("logits", "pred_boxes")


@pytest.fixture(params=CLASSES)
def name(request):
    return request.param


def tiny(name, **options):
    return FAMILIES[name].segmenter(**options)


def labels_with_masks(batch=2):
    labels = some_labels(batch)
    generator = torch.Generator().manual_seed(3)
    for target in labels:
        target["masks"] = torch.rand(len(target["class_labels"]), 128, 160, generator=generator) > 0.6
    return labels


def test_every_query_has_a_mask_at_the_stride_of_the_finest_map(name):
    outputs = tiny(name)(*padded_batch())
    assert outputs.pred_masks.shape == (2, 12, 32, 40)
    assert outputs.query_indices is None
    as_tuple = tiny(name)(*padded_batch(), return_dict=False)
    assert_same_numbers(as_tuple[len(outputs.to_tuple()) - 1], outputs.pred_masks)


def test_detections_are_those_of_the_detector_alone(name):
    model = tiny(name)
    outputs, alone = model(*padded_batch()), model.detector(*padded_batch())
    for field in (*BOXES, "encoder_last_hidden_state"):
        assert_same_numbers(outputs[field], alone[field])


def test_masks_equal_those_of_transformers(name):
    ours = tiny(name)
    theirs_class = getattr(transformers, CLASSES[name].__name__)
    theirs_config = getattr(transformers, type(ours.config).__name__)(**ours.config.to_dict())
    theirs = shake(theirs_class(theirs_config)).eval()
    ours.load_state_dict(_hub_names(theirs))
    expected, outputs = theirs(*padded_batch()), ours(*padded_batch())
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)


def _hub_names(model):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {k: v.clone() for k, v in load_file(f"{folder}/model.safetensors").items()}


@pytest.mark.parametrize("options", [{}, TIMM], ids=["transformers_backbone", "timm"])
def test_saved_models_load_in_transformers_and_the_other_way_round(name, options, tmp_path):
    ours = tiny(name, **options)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = getattr(transformers, CLASSES[name].__name__).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = theirs.eval()(*padded_batch())
    torch.testing.assert_close(ours(*padded_batch()).pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again, info = CLASSES[name].from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(again(*padded_batch()).pred_masks, ours(*padded_batch()).pred_masks)


def test_state_dicts_with_the_names_of_transformers_5_are_loaded(name, tmp_path):
    ours = tiny(name)
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, CLASSES[name].__name__).from_pretrained(tmp_path).eval()
    theirs.config.save_pretrained(tmp_path / "v5")
    torch.save(theirs.state_dict(), tmp_path / "v5" / "pytorch_model.bin")
    assert any("fpn_stages" in key for key in theirs.state_dict())
    loaded, info = CLASSES[name].from_pretrained(tmp_path / "v5", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(*padded_batch()).pred_masks, ours(*padded_batch()).pred_masks)


def test_a_mask_head_is_added_to_a_trained_detector(name, tmp_path):
    family = FAMILIES[name]
    detector = family.detector(encoder_attention_heads=8)
    detector.save_pretrained(tmp_path)
    model, info = CLASSES[name].from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith(("mask_head.", "bbox_attention.")) for key in info["missing_keys"])
    assert len(info["missing_keys"]) == 32
    torch.testing.assert_close(model(*padded_batch()).logits, detector(*padded_batch()).logits)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("image", [0, 1])
def test_segment_gives_what_forward_gives_above_the_threshold(name, threshold, image):
    model = tiny(name)
    pixels, mask = (tensor[image : image + 1] for tensor in padded_batch())
    everything = model(pixels, mask)
    scores = model.object_scores(everything.logits)[0]
    keep = scores > threshold
    found = model.segment(pixels, mask, threshold=threshold)
    assert found.query_indices[0].tolist() == keep.nonzero()[:, 0].tolist()
    for field in (*BOXES, "pred_masks"):
        assert found[field].shape[1] == keep.sum()
        torch.testing.assert_close(found[field][0], everything[field][0, keep], atol=1e-5, rtol=1e-5)


def test_segment_of_a_batch_fills_up_with_queries_below_the_threshold(name):
    model = tiny(name)
    everything = model(*padded_batch())
    scores = model.object_scores(everything.logits)
    threshold = scores.flatten().sort().values[-6].item()  # five survivors
    counts = (scores > threshold).sum(1)
    found = model.segment(*padded_batch(), threshold=threshold)
    assert found.logits.shape[1] == counts.max()
    for i in range(2):
        survivors = (scores[i] > threshold).nonzero()[:, 0].tolist()
        assert set(survivors) <= set(found.query_indices[i].tolist())
        expected = everything.pred_masks[i, found.query_indices[i]]
        torch.testing.assert_close(found.pred_masks[i], expected, atol=1e-5, rtol=1e-5)


def test_segment_finds_nothing_without_running_the_mask_head(name, monkeypatch):
    model = tiny(name)
    monkeypatch.setattr(model.mask_head, "_decode", None)
    found = model.segment(*padded_batch(), threshold=1.0)
    assert found.logits.shape[:2] == (2, 0)
    assert found.pred_masks.shape == (2, 0, 32, 40)


def test_masks_do_not_depend_on_the_size_of_the_chunks(name, monkeypatch):
    model = tiny(name)
    whole = model(*padded_batch()).pred_masks
    seen = []
    decode = model.mask_head._decode

    def note(base, adapted, attention):
        seen.append(attention.shape[1])
        return decode(base, adapted, attention)

    monkeypatch.setattr(model.mask_head, "_decode", note)
    monkeypatch.setitem(mask_head._CHUNK_ELEMENTS, "cpu", 5 * 2 * 4 * 32 * 40)
    torch.testing.assert_close(model(*padded_batch()).pred_masks, whole, atol=1e-5, rtol=1e-5)
    assert seen == [5, 5, 2]


def test_attention_ignores_padding_and_sums_to_one_over_all_heads():
    config = FAMILIES["detr"].config(encoder_attention_heads=8)
    attention = shake(AttentionMap(config))
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    mask[..., 12:] = False
    weights = attention(torch.randn(1, 3, 32), torch.randn(1, 20, 32), mask)
    assert weights.shape == (1, 3, 8, 20)
    assert weights[..., 12:].eq(0).all()
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(1, 3))


def test_mask_losses_equal_a_plain_computation(name):
    model, labels = tiny(name), labels_with_masks()
    outputs = model(*padded_batch(), labels=labels)
    config = model.config
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    focal = name == "conditional_detr"
    targets = PackedTargets(labels, outputs.logits.device)
    matches = match(outputs.logits[None], outputs.pred_boxes[None], targets, *costs, focal=focal)
    query, picked = matches.query[0], matches.target[0]  # all of the first image, as the second has none
    logits = F.interpolate(outputs.pred_masks[0, query][None], size=(128, 160), mode="bilinear")[0].flatten(1)
    wanted = labels[0]["masks"][picked].float().flatten(1)
    count = len(query)
    focal_loss = sigmoid_focal_loss(logits, wanted, alpha=0.25, reduction="none").mean(1).sum() / count
    p = logits.sigmoid()
    dice = (1 - (2 * (p * wanted).sum(1) + 1) / (p.sum(1) + wanted.sum(1) + 1)).sum() / count
    torch.testing.assert_close(outputs.loss_dict["loss_mask"], focal_loss)
    torch.testing.assert_close(outputs.loss_dict["loss_dice"], dice)
    without = model.detector(*padded_batch(), labels=labels)
    torch.testing.assert_close(outputs.loss, without.loss + focal_loss + dice)


def test_a_training_step_has_the_gradients_of_all_masks_for_less_work(name):
    model, labels = (
        tiny(name, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
        labels_with_masks(),
    )
    model.config.auxiliary_loss = True
    loss = model(*padded_batch(), labels=labels).loss
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.train()
    outputs = model(*padded_batch(), labels=labels)
    assert outputs.pred_masks is None
    torch.testing.assert_close(outputs.loss, loss)
    outputs.loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5, rtol=1e-3, msg=key)


def test_images_without_objects_still_reach_the_mask_head(name):
    # Otherwise processes that train together would disagree on which gradients there are.
    model = tiny(name).train()
    labels = [{**t, "masks": t["masks"][:0]} for t in labels_with_masks()]
    labels = [{**t, "class_labels": t["class_labels"][:0], "boxes": t["boxes"][:0]} for t in labels]
    outputs = model(*padded_batch(), labels=labels)
    assert outputs.loss_dict["loss_mask"] == outputs.loss_dict["loss_dice"] == 0
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.mask_head.parameters())


def test_freezing_the_detector_leaves_the_mask_head_to_train(name):
    model = tiny(name)
    model.freeze_detector()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith(("mask_head.", "bbox_attention.")) for n in trained)
    model(*padded_batch(), labels=labels_with_masks()).loss.backward()


def test_labels_without_masks_are_named(name):
    with pytest.raises(ValueError, match="need masks"):
        tiny(name)(*padded_batch(), labels=some_labels())


def test_a_sequence_instead_of_an_image_is_refused(name):
    with pytest.raises(ValueError, match="does not take inputs_embeds"):
        tiny(name)(None, inputs_embeds=torch.zeros(1, 4, 32))


def test_channels_that_group_norm_cannot_split_are_named():
    with pytest.raises(ValueError, match="multiple of 8"):
        DetrForSegmentation(FAMILIES["detr"].config(encoder_attention_heads=4))


@pytest.mark.parametrize(
    "options",
    [
        {"backbone_config": tiny_resnet(out_features=["stage4"])},
        {**TIMM, "backbone_kwargs": {"out_indices": [4]}},
    ],
    ids=["transformers_backbone", "timm"],
)
def test_a_backbone_asked_for_its_last_stage_only_gives_the_others_too(options, tmp_path):
    model = tiny("detr", **options)
    assert model(*padded_batch()).pred_masks.shape == (2, 12, 32, 40)
    model.save_pretrained(tmp_path)
    assert DetrForSegmentation.from_pretrained(tmp_path)(*padded_batch()).pred_masks.shape == (2, 12, 32, 40)


def test_dilation_keeps_the_masks_size():
    plain, dilated = (tiny("detr", dilation=d)(*padded_batch()) for d in (False, True))
    assert plain.pred_masks.shape == dilated.pred_masks.shape
    assert dilated.encoder_last_hidden_state.shape[1] == 4 * plain.encoder_last_hidden_state.shape[1]


def test_a_prepared_model_gives_the_same_masks(name):
    model = tiny(name, **TIMM)
    with torch.inference_mode():
        expected = model(*padded_batch())
        outputs = prepare(model)(*padded_batch())
        found = model.segment(*padded_batch(), threshold=0.3)
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
    rows = found.query_indices[..., None, None].expand_as(found.pred_masks)
    torch.testing.assert_close(found.pred_masks, expected.pred_masks.gather(1, rows), atol=1e-4, rtol=1e-4)


def test_new_mask_heads_begin_as_the_originals():
    model = DetrForSegmentation(FAMILIES["detr"].config(encoder_attention_heads=8))
    weight = model.mask_head.lay2.weight
    bound = (3 / weight[0].numel()) ** 0.5
    assert bound * 0.9 < weight.abs().max() <= bound
    assert not model.mask_head.lay2.bias.any()
    assert model.mask_head.gn2.weight.eq(1).all()
    assert not model.bbox_attention.q_linear.bias.any()
    assert model.bbox_attention.q_linear.weight.abs().max() <= (6 / 64) ** 0.5


def test_a_panoptic_file_is_still_a_detectors(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [CLASSES[name].__name__]
    detector, info = FAMILIES[name].detector_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(detector(*padded_batch()).logits, model(*padded_batch()).logits)


def test_no_image_gives_no_masks(name):
    model = tiny(name)
    pixels, mask = (part[:0] for part in padded_batch())
    with torch.no_grad():
        whole = model(pixels, mask)
        assert whole.logits.shape[:2] == whole.pred_boxes.shape[:2] == whole.pred_masks.shape[:2] == (0, 12)
        assert model.segment(pixels, mask).pred_masks.shape[0] == 0
