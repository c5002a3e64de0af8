"""A model's ``loss_function`` can be set, as in Transformers; the original's criterion is the default."""

import pytest
import torch
from transformers.loss.loss_utils import LOSS_MAPPING

from detrkit.errors import SettingError
from tests.closeness import assert_same_numbers
from tests.tiny import padded_batch, some_labels


def seven(*arguments, **options):
    return torch.tensor(7.0), {"mine": torch.tensor(7.0)}, None


def labels_with_masks():
    labels = some_labels()
    for label in labels:
        label["masks"] = torch.ones(len(label["boxes"]), 128, 160, dtype=torch.bool)
    return labels


def models_and_labels(family):
    yield family.detector(), some_labels()
    if family.segmentation_class:
        yield family.segmenter(), labels_with_masks()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_loss_function_that_is_set_gives_the_loss(family, training):
    pixels, mask = padded_batch()
    for model, labels in models_and_labels(family):
        model.loss_function = seven
        with torch.no_grad():
            outputs = model.train(training)(pixels, mask, labels=labels)
        assert outputs.loss == 7
        assert outputs.loss_dict.keys() == {"mine"}


def test_a_loss_function_gets_the_predictions_of_all_queries(family):
    pixels, mask = padded_batch()
    for model, labels in models_and_labels(family):
        given = []

        def mine(*arguments, given=given):
            given.extend(arguments)
            return seven()

        model.loss_function = mine
        with torch.no_grad():
            outputs = model(pixels, mask, labels=labels)
        logits, received, _, boxes, *masks, config, all_logits, all_boxes = given
        assert received is labels
        assert config is model.config
        assert torch.equal(logits, outputs.logits)
        assert torch.equal(boxes, outputs.pred_boxes)
        assert torch.equal(all_logits[-1], logits)
        assert torch.equal(all_boxes[-1], boxes)
        assert [m is outputs.pred_masks for m in masks] == [True] * ("pred_masks" in outputs)


def test_the_default_loss_function_can_be_wrapped(one_stage_family):
    pixels, mask = padded_batch()
    for model, labels in models_and_labels(one_stage_family):
        with torch.no_grad():
            expected = model(pixels, mask, labels=labels)
            criterion = model.loss_function
            model.loss_function = lambda *arguments, criterion=criterion: criterion(*arguments)
            outputs = model(pixels, mask, labels=labels)
        assert outputs.loss_dict.keys() == expected.loss_dict.keys()
        assert_same_numbers(outputs.loss, expected.loss)


def test_none_restores_the_original_loss(family):
    model = family.detector()
    model.loss_function = seven
    model.loss_function = None
    with torch.no_grad():
        assert "loss_ce" in model(padded_batch()[0], labels=some_labels()).loss_dict


def test_a_loss_type_names_a_loss_of_transformers(family, monkeypatch):
    monkeypatch.setitem(LOSS_MAPPING, "Seven", seven)
    model = family.detector(loss_type="Seven")
    with torch.no_grad():
        assert model(padded_batch()[0], labels=some_labels()).loss == 7
    other = family.detector()
    other.loss_type = "Seven"
    assert other.loss_function is seven


def test_an_unknown_loss_type_is_refused_by_name(family):
    model = family.detector()
    model.loss_type = "Nonexistent"
    with pytest.raises(SettingError, match="Nonexistent"):
        model(padded_batch()[0], labels=some_labels())
