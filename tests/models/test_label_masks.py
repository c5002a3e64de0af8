"""Batches whose collate function dropped the pixel mask."""

import pytest
import torch

from detrkit.models import label_masks
from tests.closeness import assert_same_numbers
from tests.tiny import FAMILIES, padded_batch, some_labels


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(label_masks, "_warned", set())


def labels_of(sizes):
    return [{**label, "size": size} for label, size in zip(some_labels(), sizes)]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_mask_is_made_from_the_sizes_of_labels(family, training):
    pixels, mask = padded_batch()
    labels = labels_of([torch.tensor([128, 160]), torch.tensor([90, 100])])
    model = family.detector(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).train(training)
    with torch.no_grad():
        expected = model(pixels, mask, labels=labels)
        found = model(pixels, labels=labels)
        without = model(pixels, labels=some_labels())
    assert_same_numbers(found.loss, expected.loss)
    assert_same_numbers(found.pred_boxes, expected.pred_boxes)
    assert (without.pred_boxes - expected.pred_boxes).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_masks_of_segmentation_models_too(name):
    pixels, mask = padded_batch()
    labels = labels_of([[128, 160], [90, 100]])
    for label in labels:
        label["masks"] = torch.ones(len(label["boxes"]), 128, 160, dtype=torch.bool)
    model = FAMILIES[name].segmenter()
    with torch.no_grad():
        assert_same_numbers(model(pixels, labels=labels).loss, model(pixels, mask, labels=labels).loss)


def test_labels_of_the_padded_size_need_no_mask(caplog):
    # Transformers' processors scale boxes to the padded image and say so.
    assert label_masks.mask_from_labels(padded_batch()[0], labels_of([[128, 160]] * 2)) is None
    assert not caplog.records


@pytest.mark.parametrize(
    "labels", [some_labels(), labels_of([[128, 160], [300, 300]])], ids=["none", "beyond"]
)
def test_sizes_that_do_not_tell_are_warned_of_once(labels, caplog):
    for _ in range(2):
        assert label_masks.mask_from_labels(padded_batch()[0], labels) is None
    assert len(caplog.records) == 1
    assert "pixel_mask" in caplog.text


def test_images_without_padding_are_not_warned_of(caplog):
    assert label_masks.mask_from_labels(torch.randn(2, 3, 128, 160), some_labels()) is None
    assert not caplog.records
