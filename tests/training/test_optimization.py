import math

import pytest
import torch
from torch import nn

from detrkit.training.optimization import (
    AveragedWeights,
    decay_after,
    learning_rate_factor,
    parameter_groups,
)
from tests.tiny import FAMILIES


def names_of(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_is_in_one_group(family):
    model = FAMILIES[family].detector()
    groups = names_of(model, parameter_groups(model, 1e-4, 1e-5))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for names in groups.values() for name in names) == sorted(trained)
    assert groups["backbone"] == {name for name in trained if "backbone.conv_encoder" in name}
    assert ("sampling" in groups) == family.startswith("deformable")


def test_sampling_offsets_and_reference_points_learn_at_a_tenth():
    model = FAMILIES["deformable_detr"].detector()
    groups = parameter_groups(model, 2e-4, 2e-5)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(
        {"transformer": 2e-4, "backbone": 2e-5, "sampling": 2e-5}
    )
    sampling = names_of(model, groups)["sampling"]
    assert "model.reference_points.weight" in sampling
    # Weight and bias of two encoder and three decoder layers, and of the reference points.
    assert len(sampling) == 2 * (2 + 3) + 2


def test_what_is_frozen_is_in_no_group():
    model = FAMILIES["detr"].detector()
    model.model.freeze_backbone()
    assert [group["name"] for group in parameter_groups(model, 1.0, 1.0)] == ["transformer"]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", {2: 1, 99: 1}),
        ("step", {2: 1, 79: 1, 80: 0.1, 99: 0.1}),
        ("cosine", {2: 1, 51: 0.5, 100: 0}),
    ],
)
def test_schedules_after_the_warm_up(schedule, factors):
    factor = learning_rate_factor(schedule, 100, 2)
    assert [factor(0), factor(1)] == pytest.approx([1 / 3, 2 / 3])
    assert {step: factor(step) for step in factors} == pytest.approx(factors)


def test_without_warm_up_the_rate_is_whole_at_once():
    assert learning_rate_factor("cosine", 10, 0)(0) == 1


def test_averaged_weights_by_hand():
    model = nn.BatchNorm1d(1)
    averaged = AveragedWeights(model, 0.9)
    expected = None
    for update, value in enumerate([1.0, 2.0, 4.0, 8.0, 16.0]):
        with torch.no_grad():
            model.weight.fill_(value)
            model.running_mean.fill_(-value)
            model.num_batches_tracked.fill_(update)
        averaged.update_parameters(model)
        decay = (1 + update) / (10 + update)
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert averaged.module.weight.item() == pytest.approx(expected)
        assert averaged.module.running_mean.item() == pytest.approx(-expected)
    assert averaged.module.num_batches_tracked == 4
    assert not averaged.module.training
    assert model.training


def test_the_decay_rises_to_the_one_asked_for():
    assert decay_after(0, 0.999) == 0.1
    assert decay_after(100_000, 0.999) == 0.999
    assert all(decay_after(n, 0.99) <= decay_after(n + 1, 0.99) for n in range(2000))


def test_a_cosine_never_rises():
    factor = learning_rate_factor("cosine", 37, 3)
    values = [factor(step) for step in range(3, 37)]
    assert values == sorted(values, reverse=True)
    assert math.isclose(factor(1000), 0, abs_tol=1e-12)
