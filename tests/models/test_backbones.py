"""Backbones of any library, whatever the number, strides and layout of their feature maps."""

import pytest
import timm
import torch

from detrkit import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
)
from detrkit.errors import SettingError
from detrkit.models.layers.backbone import ConvEncoder, _deepest_levels
from tests.closeness import assert_same_numbers
from tests.tiny import tiny_config, tiny_resnet

# Swin's layout and windows, in a fraction of the time.
SMALL_SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4]}

of_any_size = pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="before 1.0.31, timm makes some of these backbones for one size of image",
)


def timm_config(name, config_class=DetrConfig, **options):
    return tiny_config(config_class, backbone_config=None, backbone=name, use_timm_backbone=True, **options)


def heights(config, size=(128, 160)):
    """Heights of the feature maps of an image; their channels must be those that are announced."""
    encoder = ConvEncoder(config).eval()
    with torch.no_grad():
        maps = encoder(torch.randn(1, config.num_channels, *size))
    assert [m.shape[1] for m in maps] == encoder.intermediate_channel_sizes
    return [m.shape[2] for m in maps]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (timm_config("resnet18"), [32, 16, 8, 4]),
        (timm_config("resnet18", dilation=True), [32, 16, 8, 8]),
        (timm_config("convnext_atto"), [32, 16, 8, 4]),
        (timm_config("convnext_atto", DeformableDetrConfig), [16, 8, 4]),
        (timm_config("convnext_atto", DeformableDetrConfig, num_feature_levels=1), [4]),
        pytest.param(timm_config("efficientvit_m0"), [8, 4, 2], marks=of_any_size),
        (timm_config("test_vit", DeformableDetrConfig), [8, 8, 8]),
        (timm_config("mambaout_femto", DeformableDetrConfig), [16, 8, 4]),
    ],
    ids=lambda value: value.backbone if hasattr(value, "backbone") else "",
)
def test_a_backbone_gives_the_maps_of_its_largest_strides(config, expected):
    assert heights(config) == expected


@pytest.mark.parametrize(
    ("strides", "count", "expected"),
    [
        ([2, 4, 8, 16, 32], 4, (1, 2, 3, 4)),
        ([1, 2, 4, 8, 16, 32], 3, (3, 4, 5)),
        ([8, 8, 16, 32, 64], 4, (1, 2, 3, 4)),
        ([8, 16, 16, 16], 3, (1, 2, 3)),
        ([16, 32], 4, (0, 1)),
    ],
)
def test_the_default_maps_follow_from_the_strides(strides, count, expected):
    assert _deepest_levels(strides, count, dilated=False) == expected


@of_any_size
def test_channels_last_maps_of_a_backbone_of_a_fixed_size_work_at_any_size(tmp_path):
    config = timm_config("swin_tiny_patch4_window7_224", DeformableDetrConfig, backbone_kwargs=SMALL_SWIN)
    model = DeformableDetrForObjectDetection(config).eval()
    pixels = torch.randn(1, 3, 101, 157)
    with torch.no_grad():
        maps = model.model.backbone(pixels)
        assert [tuple(m.shape[1:]) for m in maps] == [(48, 13, 20), (96, 7, 10), (192, 4, 5)]
        model.save_pretrained(tmp_path)
        loaded = DeformableDetrForObjectDetection.from_pretrained(tmp_path).eval()
        assert_same_numbers(loaded(pixels).logits, model(pixels).logits)


def test_indices_that_were_chosen_are_saved(tmp_path):
    model = DetrForObjectDetection(timm_config("convnext_atto")).eval()
    model.save_pretrained(tmp_path)
    assert DetrConfig.from_pretrained(tmp_path).backbone_kwargs == {"out_indices": [0, 1, 2, 3]}


def test_indices_that_were_given_are_kept():
    config = timm_config("csatv2", backbone_kwargs={"out_indices": [1, 2, 3, 4]})
    assert config.backbone_kwargs == {"out_indices": [1, 2, 3, 4]}
    assert heights(timm_config("convnext_atto", backbone_kwargs={"out_indices": 2})) == [8, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"name": "convnext_atto", "backbone_kwargs": {"out_indices": [1, 2, 3, 4]}},
            ["out_indices", "strides 4, 8, 16, 32"],
        ),
        ({"name": "convnext_atto", "backbone_kwargs": {"no_option": 1}}, ["convnext_atto", "no_option"]),
        ({"name": "convnext_atom"}, ["convnext_atom", "did you mean"]),
        ({"name": "gmlp_ti16_224", "dilation": True}, ["gmlp_ti16_224", "dilation"]),
    ],
)
def test_a_backbone_that_cannot_be_made_is_named_with_the_remedy(options, words):
    with pytest.raises(SettingError) as raised:
        ConvEncoder(timm_config(**options))
    assert all(word in str(raised.value) for word in words)


def test_a_backbone_that_takes_one_size_only_says_which():
    encoder = ConvEncoder(timm_config("pit_ti_224")).eval()
    with torch.no_grad():
        assert len(encoder(torch.randn(1, 3, 224, 224))) == 3
        with pytest.raises(SettingError, match=r"96x128.*224x224.*size="):
            encoder(torch.randn(1, 3, 96, 128))


def test_masks_need_four_feature_maps():
    with pytest.raises(SettingError, match=r"4 feature maps.*efficientvit_m0"):
        DetrForSegmentation(timm_config("efficientvit_m0", encoder_attention_heads=8))


def test_channels_of_a_backbones_configuration_are_the_models():
    assert tiny_config(backbone_config=tiny_resnet(num_channels=1)).num_channels == 1
    with pytest.raises(ValueError, match="num_channels is 4"):
        tiny_config(num_channels=4)


SMALL_CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "out_indices": [0, 1, 2, 3]}
THIN = [(1, 1), (3, 160), (100, 5), (31, 33)]


@pytest.mark.parametrize(
    ("config", "sides"),
    [
        (timm_config("resnet18"), (1, 1)),
        (timm_config("ese_vovnet19b_slim"), (1, 29)),
        (timm_config("convnext_atto", backbone_kwargs=SMALL_CONVNEXT), (1, 32)),
        (timm_config("dla34"), (32, 1)),
    ],
    ids=lambda value: value.backbone if hasattr(value, "backbone") else "",
)
def test_what_the_sides_of_images_need_belongs_to_the_backbone(config, sides):
    encoder = ConvEncoder(config)
    seen = []
    encoder.model.register_forward_hook(lambda *_: seen.append(1))
    assert encoder.find_sides() == sides
    assert not seen, "a user's hook saw the trials"
    assert encoder.training


@pytest.mark.parametrize("model_class", [DetrForObjectDetection, DetrForSegmentation])
def test_thin_images_are_padded_as_in_a_batch_and_leave_no_trace(model_class):
    options = {"backbone_kwargs": SMALL_CONVNEXT, "encoder_attention_heads": 8}
    model = model_class(timm_config("convnext_atto", **options)).eval()
    pixels = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        before = model(pixels)
        for height, width in THIN:
            thin = torch.randn(1, 3, height, width)
            padded = torch.zeros(1, 3, max(height, 32), max(width, 32))
            mask = torch.zeros(padded[:, 0].shape, dtype=torch.long)
            padded[..., :height, :width], mask[:, :height, :width] = thin, 1
            found, expected = model(thin), model(padded, mask)
            assert_same_numbers(found.logits, expected.logits)
            assert_same_numbers(found.pred_boxes, expected.pred_boxes)
            if model_class is DetrForSegmentation:
                rows, columns = -(-height // 4), -(-width // 4)
                assert_same_numbers(found.pred_masks, expected.pred_masks[..., :rows, :columns])
        assert_same_numbers(model(pixels).logits, before.logits)


def test_thin_images_can_be_trained_on():
    model = DetrForObjectDetection(timm_config("convnext_atto", backbone_kwargs=SMALL_CONVNEXT)).train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    loss = model(torch.randn(2, 3, 4, 150), labels=labels).loss
    loss.backward()
    assert loss.isfinite()
