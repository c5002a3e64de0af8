from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from detrkit.checkpoints.model_card import model_card
from detrkit.checkpoints.original import Architecture
from detrkit.checkpoints.registry import REGISTRY


def released_architecture(entry):
    return Architecture(
        family=entry.family,
        task=entry.task,
        backbone=entry.backbone,
        num_labels=entry.num_labels,
        num_queries=None if entry.two_stage else entry.num_queries,
        d_model=256,
        encoder_layers=6,
        decoder_layers=6,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        num_feature_levels=entry.num_feature_levels,
        with_box_refine=entry.with_box_refine,
        two_stage=entry.two_stage,
    )


@pytest.mark.parametrize("name", REGISTRY)
def test_the_card_of_a_released_checkpoint_tells_where_it_is_from_and_what_was_published(name):
    entry = REGISTRY[name]
    card = ModelCard(model_card(entry, released_architecture(entry), title=f"my-{name}", source="file.pth"))
    panoptic = entry.task == "panoptic"
    assert card.data.library_name == "detrkit"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == ("image-segmentation" if panoptic else "object-detection")
    assert f"# my-{name}\n" in card.text
    assert f"{entry.num_labels} categories and {entry.num_queries} object queries" in card.text
    assert all(text in card.text for text in ("`file.pth`", entry.repository, entry.url))
    assert f"box AP {entry.ap:.1f}" in card.text
    assert "published, not re-measured" in card.text
    assert (f"PQ {entry.pq}" in card.text) == panoptic
    assert (f"small objects {entry.ap_small}" in card.text) != panoptic
    assert "None" not in card.text
    assert ("(DC5)" in card.text) == ("dc5" in name)


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 4},
        {"num_queries": 50},
        {"position_embedding_type": "learned"},
        {"d_model": 128},
        {"decoder_layers": 3},
    ],
)
def test_numbers_are_not_claimed_for_tensors_that_cannot_be_the_released_ones(change):
    entry = REGISTRY["detr-resnet-50"]
    text = model_card(entry, replace(released_architecture(entry), **change), title="mine", source="file.pth")
    assert "AP" not in text
    assert "42.0" not in text
