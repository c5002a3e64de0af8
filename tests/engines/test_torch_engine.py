"""Preparing a model for inference changes its speed and nothing else."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import detrkit
from detrkit import DetrForObjectDetection
from detrkit.engines import fused
from detrkit.engines.torch_engine import fold_batch_norm, prepare
from detrkit.errors import DetrkitError, SettingError
from detrkit.models.layers.backbone import ConvEncoder, FrozenBatchNorm2d
from tests.closeness import assert_same_numbers, assert_same_outputs
from tests.tiny import FAMILIES, padded_batch, shake, tiny_config, tiny_resnet


def indices(*stages: int) -> dict:
    return {"backbone_kwargs": {"out_indices": list(stages)}}


TIMM = {"backbone_config": None, "use_timm_backbone": True}
BACKBONES = {
    "transformers-bottleneck": {},
    "transformers-basic": {"backbone_config": tiny_resnet(layer_type="basic")},
    "transformers-dilated": {"dilation": True},
    "timm-basic": {**TIMM, "backbone": "resnet18"},
    "timm-dilated": {**TIMM, "backbone": "resnet18", "dilation": True},
    "timm-bottleneck-deep-stem": {**TIMM, "backbone": "resnet26d"},
    "timm-channel-attention": {**TIMM, "backbone": "ecaresnet26t"},
    "timm-inverted-residual": {**TIMM, "backbone": "tf_mobilenetv3_small_075", **indices(2, 4)},
    "timm-without-batch-norm": {**TIMM, "backbone": "convnext_atto", **indices(1, 3)},
}  # fmt: skip


@pytest.mark.parametrize("options", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "not-fused"])
def test_predictions_stay_the_same(options, fuse, monkeypatch):
    monkeypatch.setattr(fused, "available", lambda dtype: fuse)
    model = shake(DetrForObjectDetection(tiny_config(**options))).eval()
    pixels, mask = padded_batch()
    with torch.inference_mode():
        expected = model(pixels, mask)
        prepared = prepare(model)
        outputs = prepared(pixels, mask)
    assert prepared is model
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.modules())
    assert any(isinstance(m, fused.FusedLinear) for m in model.modules()) is fuse
    assert_same_outputs(outputs, expected)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "not-padded"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_predictions_of_every_family_stay_the_same(family, padded):
    model = family.detector()
    pixels, mask = padded_batch()
    mask = mask if padded else None
    with torch.inference_mode():
        expected = model(pixels, mask)
        outputs = prepare(model)(pixels, mask)
    # No linear layer escapes the engine, whatever the family calls it.
    assert any(type(m) is nn.Linear for m in model.modules()) is not fused.available(torch.float32)
    assert_same_outputs(outputs, expected)


@pytest.mark.parametrize(
    "name", ["transformers-bottleneck", "transformers-basic", "timm-basic", "timm-dilated"]
)
def test_all_residual_blocks_of_a_plain_resnet_are_fused(name):
    encoder = ConvEncoder(tiny_config(**BACKBONES[name])).eval()
    fold_batch_norm(encoder)
    assert fused.fuse_backbone(encoder) == (8 if name.startswith("timm") else 6)


def test_blocks_with_anything_special_are_left_alone():
    encoder = ConvEncoder(tiny_config(**{**TIMM, "backbone": "ecaresnet26t"})).eval()
    fold_batch_norm(encoder)
    assert fused.fuse_backbone(encoder) == 0


class ConvUsedTwice(nn.Module):
    """A convolution whose output goes both through a norm and around it: it cannot be folded."""

    num_channels = 3
    native_size = None

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = FrozenBatchNorm2d(4)
        shake(self)

    def forward(self, x):
        y = self.conv(x)
        return [self.norm(y) + y]


def test_a_norm_that_cannot_be_folded_is_put_back():
    module = ConvUsedTwice()
    x = torch.rand(1, 3, 8, 8)
    expected = module(x)[0].detach()
    assert fold_batch_norm(module) == 0
    assert isinstance(module.norm, FrozenBatchNorm2d)
    assert_same_numbers(module(x)[0], expected)


def test_a_backbone_that_wants_another_size_is_left_alone():
    class OnlyLarge(ConvUsedTwice):
        def forward(self, x):
            assert x.shape[-1] == 224
            return super().forward(x)

    assert fold_batch_norm(OnlyLarge()) == 0


def test_half_precision_is_prepared_too():
    model = shake(DetrForObjectDetection(tiny_config())).eval()
    pixels, mask = padded_batch()
    with torch.inference_mode():
        expected = model(pixels, mask).pred_boxes
        outputs = prepare(model, dtype=torch.bfloat16)(pixels.bfloat16(), mask)
    assert outputs.logits.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.pred_boxes.float(), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fused_where_the_operators_take_it(dtype):
    model = prepare(DetrForObjectDetection(tiny_config()), dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, fused.PackedWeight) and m.weight is not None]
    assert bool(layers) is fused.available(dtype)
    assert all(layer.packed for layer in layers)


def test_a_model_can_change_its_type_after_it_was_prepared():
    model = DetrForObjectDetection(tiny_config()).eval()
    pixels, mask = padded_batch()
    with torch.inference_mode():
        expected = prepare(copy.deepcopy(model), dtype=torch.bfloat16)(pixels.bfloat16(), mask).logits
        changed = prepare(model).bfloat16()(pixels.bfloat16(), mask).logits
    torch.testing.assert_close(changed, expected, atol=1e-2, rtol=1e-2)


def test_a_prepared_model_needs_no_gradients():
    model = prepare(DetrForObjectDetection(tiny_config()))
    assert not any(p.requires_grad for p in model.parameters())
    assert model(*padded_batch()).logits.grad_fn is None


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_prepared_model_can_be_copied_and_pickled(family, copied):
    prepared = prepare(family.detector())
    pixels, mask = padded_batch()
    with torch.inference_mode():
        expected = prepared(pixels, mask)
        assert_same_outputs(copied(prepared)(pixels, mask), expected)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_prepared_model_can_be_converted_by_hand(family):
    prepared = prepare(family.detector())
    pixels, mask = padded_batch()
    with torch.inference_mode():
        expected = prepared(pixels, mask)
        for dtype in (torch.bfloat16, torch.float16):
            found = prepared.to(dtype)(pixels.to(dtype), mask)
            assert found.logits.dtype == dtype
            assert found.logits.isfinite().all()
        half = prepared.float()(pixels, mask)  # weights of half precision in single precision again
        torch.testing.assert_close(half.pred_boxes, expected.pred_boxes, atol=0.05, rtol=0)
        doubled = prepared.double()(pixels.double(), mask)
    torch.testing.assert_close(doubled.pred_boxes.float(), half.pred_boxes, atol=1e-4, rtol=0)


def test_a_copy_is_prepared_and_the_model_stays_as_it_was(tmp_path):
    model = FAMILIES["detr"].detector()
    pixels, mask = padded_batch()
    with torch.inference_mode():
        expected = model(pixels, mask)
        prepared = detrkit.prepare(model)
        assert_same_outputs(prepared(pixels, mask), expected)
        assert_same_outputs(model(pixels, mask), expected)
    assert any(isinstance(m, fused.FusedLinear) for m in prepared.modules())
    assert not any(isinstance(m, fused.FusedLinear) for m in model.modules())
    for refused in (prepared.train, lambda: prepared.save_pretrained(tmp_path)):
        with pytest.raises(DetrkitError, match="a model that was prepared for inference cannot be"):
            refused()
    with pytest.raises(SettingError, match="engine='onnx'"):
        detrkit.prepare(model, engine="onnx")


ALLOCATOR = """
import ctypes, sys
calls = []
class Library:
    def mallopt(self, *arguments):
        calls.append(arguments)
        return 1
ctypes.CDLL = lambda name, *a, _real=ctypes.CDLL, **k: Library() if name is None else _real(name, *a, **k)
"""


def run_python(code: str, **environment: str) -> str:
    import os

    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    result = subprocess.run(
        [sys.executable, "-c", ALLOCATOR + code], env={**plain, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_does_not_touch_the_allocator():
    assert run_python("import detrkit.engines.torch_engine, detrkit.inference.detector; print(calls)") == "[]"


def test_the_user_s_own_allocator_settings_win():
    code = "from detrkit.engines.allocator import keep_memory; print(keep_memory(), len(calls))"
    assert run_python(code, MALLOC_TRIM_THRESHOLD_="1000") == "False 0"
    assert run_python(code, GLIBC_TUNABLES="glibc.malloc.check=0") == "False 0"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_is_kept_when_a_program_asks_for_it():
    code = "from detrkit.engines.allocator import keep_memory; print(keep_memory(), len(calls))"
    assert run_python(code) == "True 2"
