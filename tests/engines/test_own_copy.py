"""Whatever a user has added to a model's layers is part of what a detector runs."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers.models.resnet.modeling_resnet import ResNetBottleNeckLayer

from detrkit import Detector, DetrImageProcessor
from detrkit.engines.export import export_model
from detrkit.engines.torch_engine import prepare
from detrkit.errors import SettingError
from detrkit.models.layers.backbone import ConvEncoder, FrozenBatchNorm2d
from tests.closeness import assert_same_outputs, assert_same_weights
from tests.tiny import FAMILIES, padded_batch


def each(model, kind):
    return [module for module in model.modules() if type(module) is kind]


def replace(model, kind, make):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind:
                setattr(parent, name, make(child))
    return model


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5


class HalfLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0.5


def half_linear(linear):
    found = HalfLinear(linear.in_features, linear.out_features)
    found.load_state_dict(linear.state_dict())
    return found


def hooks_on(kind):
    def add(model):
        for module in each(model, kind):
            module.register_forward_hook(lambda module, inputs, output: output * 0.5)
        return model

    return add


def replaced_forwards(model):
    for linear in each(model, nn.Linear):
        linear.forward = lambda x, own=linear.forward: own(x) * 0.5
    return model


def parametrized(model):
    for module in [*each(model, nn.Linear), *each(model, nn.Conv2d)]:
        parametrize.register_parametrization(module, "weight", Half())
    return model


def pruned(model):
    for module in [*each(model, nn.Linear), *each(model, nn.Conv2d)]:
        prune.l1_unstructured(module, "weight", 0.3)
    return model


def quantized(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


CHANGES = {
    "hooks-on-linear-layers": hooks_on(nn.Linear),
    "hooks-on-convolutions": hooks_on(nn.Conv2d),
    "hooks-on-batch-norms": hooks_on(FrozenBatchNorm2d),
    "hooks-on-residual-blocks": hooks_on(ResNetBottleNeckLayer),
    "replaced-forwards": replaced_forwards,
    "subclasses": lambda model: replace(model, nn.Linear, half_linear),
    "parametrized": parametrized,
    "pruned": pruned,
    "other-norms": lambda model: replace(model, nn.LayerNorm, lambda norm: nn.RMSNorm(32)),
    "other-activations": lambda model: replace(model, nn.ReLU, lambda relu: nn.GELU()),
    "quantized": quantized,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_detector_runs_a_changed_model_as_it_is(change):
    model = change(FAMILIES["detr"].detector())
    with torch.no_grad():
        expected = model(*padded_batch())
        detector = Detector(model, DetrImageProcessor(), device="cpu")
        assert_same_outputs(detector.model(*padded_batch()), expected)
        assert_same_outputs(model(*padded_batch()), expected)


def test_the_callers_model_is_not_changed():
    model = FAMILIES["detr"].detector()
    before = copy.deepcopy(model)
    Detector(model, DetrImageProcessor(), device="cpu")
    assert_same_weights(model, before)
    assert all(
        parameter.requires_grad == was.requires_grad
        for parameter, was in zip(model.parameters(), before.parameters(), strict=True)
    )


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_model_is_taken_out_of_what_is_wrapped_around_it(wrap):
    model = FAMILIES["detr"].detector()
    detector = Detector(wrap(model), DetrImageProcessor(), device="cpu")
    with torch.no_grad():
        assert_same_outputs(detector.model(*padded_batch()), model(*padded_batch()))


def test_an_activation_whose_input_is_read_again_does_not_write_over_it():
    class ReadTwice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            x = x + 0
            return [self.relu(x) + x]

    model = FAMILIES["detr"].detector()
    encoder = next(m for m in model.modules() if isinstance(m, ConvEncoder))
    encoder.model = ReadTwice()
    encoder.register_parameter("weight", nn.Parameter(torch.ones(1)))
    prepare(model)
    assert not encoder.model.relu.inplace


def test_a_quantized_model_is_neither_converted_nor_exported(tmp_path):
    model = quantized(FAMILIES["detr"].detector())
    with pytest.raises(SettingError, match=r"quantised.*float32"):
        Detector(model, DetrImageProcessor(), device="cpu", dtype="bfloat16")
    with pytest.raises(SettingError, match="quantised"):
        export_model(model, tmp_path / "out", "onnx")
