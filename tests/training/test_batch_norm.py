import copy

import pytest
import timm
import torch
from torch import nn

from detrkit import DetrForObjectDetection
from detrkit.models.layers.backbone import FrozenBatchNorm2d, freeze_batch_norm
from detrkit.training.batch_norm import LiveBatchNorm2d, refreeze_batch_norm, thaw_batch_norm
from tests.closeness import assert_same_numbers, assert_same_outputs
from tests.tiny import FAMILIES, padded_batch, shake


def frozen_norm():
    module = nn.Sequential(FrozenBatchNorm2d(3, eps=1e-3, activation=nn.ReLU()))
    return shake(module)


def test_a_live_batch_norm_begins_as_the_frozen_one():
    frozen = frozen_norm()
    live = thaw_batch_norm(copy.deepcopy(frozen)).eval()
    x = torch.randn(2, 3, 4, 4)
    assert_same_numbers(live(x), frozen(x))
    assert live.state_dict().keys() == frozen.state_dict().keys()


def test_in_training_it_normalises_by_the_batch_and_learns_its_statistics():
    live = thaw_batch_norm(frozen_norm()).train()
    norm = live[0]
    before = norm.running_mean.clone()
    x = torch.randn(8, 3, 4, 4) * 3 + 2
    reference = nn.BatchNorm2d(3, eps=1e-3)
    reference.load_state_dict(norm.state_dict(), strict=False)
    torch.testing.assert_close(live(x), reference(x).relu())
    torch.testing.assert_close(norm.running_mean, 0.9 * before + 0.1 * x.mean((0, 2, 3)))
    assert norm.weight.requires_grad
    assert norm.bias.requires_grad


def test_activations_of_timms_norms_are_kept():
    backbone = timm.create_model("efficientnet_lite0", features_only=True, out_indices=(1,))
    freeze_batch_norm(backbone)
    shake(backbone)
    x = torch.randn(1, 3, 64, 64)
    (expected,) = backbone.eval()(x)
    assert_same_numbers(thaw_batch_norm(backbone)(x)[0], expected)
    assert any(isinstance(module, LiveBatchNorm2d) for module in backbone.modules())


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
def test_what_was_learnt_is_saved_and_loaded_frozen(family, tmp_path):
    model = thaw_batch_norm(FAMILIES[family].detector()).train()
    pixels, mask = padded_batch()
    model(pixels, mask)  # moves the statistics
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    frozen = [m for m in loaded.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert frozen
    assert not any(isinstance(m, LiveBatchNorm2d) for m in loaded.modules())
    with torch.no_grad():
        expected, found = model(pixels, mask), loaded(pixels, mask)
        refrozen = refreeze_batch_norm(copy.deepcopy(model))(pixels, mask)
    assert_same_outputs(found, expected)
    assert_same_outputs(refrozen, expected)


def test_thawing_leaves_other_modules_alone():
    model = DetrForObjectDetection(FAMILIES["detr"].config())
    before = {name for name, _ in model.named_modules()}
    assert {name for name, _ in thaw_batch_norm(model).named_modules()} == before
