import re

import pytest
import torch

from detrkit.conversion.original import check_fits, hub_state_dict, read_architecture
from detrkit.errors import CheckpointError
from tests.conversion.synthetic import conditional_detr_checkpoint, detr_checkpoint
from tests.golden import HUB, ORIGINALS

# Every kind of tensor, and what the layout on the Hub calls it; `encoder 3.` is short for layer 3 there.
PAIRS = {
    "detr": {
        "backbone.0.body.conv1.weight": "model.backbone.conv_encoder.model.conv1.weight",
        "backbone.0.body.layer3.5.bn2.bias": "model.backbone.conv_encoder.model.layer3.5.bn2.bias",
        "backbone.1.row_embed.weight": "model.backbone.position_embedding.row_embeddings.weight",
        "backbone.1.col_embed.weight": "model.backbone.position_embedding.column_embeddings.weight",
        "input_proj.bias": "model.input_projection.bias",
        "query_embed.weight": "model.query_position_embeddings.weight",
        "encoder 4.self_attn.out_proj.bias": "encoder 4.self_attn.out_proj.bias",
        "encoder 0.linear1.weight": "encoder 0.fc1.weight",
        "encoder 0.linear2.bias": "encoder 0.fc2.bias",
        "encoder 10.norm1.weight": "encoder 10.self_attn_layer_norm.weight",
        "encoder 1.norm2.bias": "encoder 1.final_layer_norm.bias",
        "decoder 2.multihead_attn.out_proj.weight": "decoder 2.encoder_attn.out_proj.weight",
        "decoder 2.norm1.weight": "decoder 2.self_attn_layer_norm.weight",
        "decoder 2.norm2.weight": "decoder 2.encoder_attn_layer_norm.weight",
        "decoder 2.norm3.weight": "decoder 2.final_layer_norm.weight",
        "transformer.decoder.norm.weight": "model.decoder.layernorm.weight",
        "class_embed.weight": "class_labels_classifier.weight",
        "bbox_embed.layers.2.bias": "bbox_predictor.layers.2.bias",
    },
    "conditional_detr": {
        "decoder 1.sa_kpos_proj.weight": "decoder 1.sa_kpos_proj.weight",
        "decoder 0.ca_qpos_proj.bias": "decoder 0.ca_qpos_proj.bias",
        "decoder 3.ca_qpos_sine_proj.bias": "decoder 3.ca_qpos_sine_proj.bias",
        "decoder 3.cross_attn.out_proj.bias": "decoder 3.encoder_attn.out_proj.bias",
        "decoder 3.norm2.bias": "decoder 3.encoder_attn_layer_norm.bias",
        "transformer.decoder.query_scale.layers.0.weight": "model.decoder.query_scale.layers.0.weight",
        "transformer.decoder.ref_point_head.layers.1.bias": "model.decoder.ref_point_head.layers.1.bias",
        "class_embed.bias": "class_labels_classifier.bias",
    },
    "deformable_detr": {
        "transformer.level_embed": "model.level_embed",
        "transformer.reference_points.weight": "model.reference_points.weight",
        "transformer.pos_trans_norm.bias": "model.pos_trans_norm.bias",
        "input_proj.3.1.weight": "model.input_proj.3.1.weight",
        "class_embed.5.bias": "class_embed.5.bias",
        "bbox_embed.5.layers.1.weight": "bbox_embed.5.layers.1.weight",
        "transformer.decoder.bbox_embed.6.layers.1.weight": "model.decoder.bbox_embed.6.layers.1.weight",
        "encoder 0.self_attn.sampling_offsets.bias": "encoder 0.self_attn.sampling_offsets.bias",
        "decoder 5.cross_attn.value_proj.bias": "decoder 5.encoder_attn.value_proj.bias",
        "decoder 5.norm1.bias": "decoder 5.encoder_attn_layer_norm.bias",
        "decoder 5.norm2.bias": "decoder 5.self_attn_layer_norm.bias",
        "decoder 5.norm3.bias": "decoder 5.final_layer_norm.bias",
    },
    "panoptic": {
        "detr.class_embed.weight": "detr.class_labels_classifier.weight",
        "detr.transformer.encoder.layers.0.norm2.bias": "detr.model.encoder.layers.0.final_layer_norm.bias",
        "detr.backbone.0.body.bn1.weight": "detr.model.backbone.conv_encoder.model.bn1.weight",
        "bbox_attention.q_linear.weight": "bbox_attention.q_linear.weight",
        "mask_head.adapter1.bias": "mask_head.adapter1.bias",
        "mask_head.out_lay.weight": "mask_head.out_lay.weight",
    },
}

META = detr_checkpoint(device="meta")


def meta(shape):
    return torch.empty(shape, device="meta")


def conditional():
    """Enough of a Conditional DETR to read its architecture."""
    tensors = {name: tensor for name, tensor in META.items() if "multihead_attn" not in name}
    return tensors | {
        "transformer.decoder.layers.0.sa_qcontent_proj.weight": meta((32, 32)),
        "class_embed.weight": meta((91, 32)),
    }


def deformable(**changes):
    """Enough of a Deformable DETR to read its architecture."""
    tensors = {
        name: tensor
        for name, tensor in META.items()
        if not name.startswith(("class_embed", "bbox_embed")) and "multihead_attn" not in name
    }
    return tensors | {
        "transformer.level_embed": meta((4, 32)),
        "class_embed.0.weight": meta((91, 32)),
        "query_embed.weight": meta((300, 64)),
    }


def panoptic():
    tensors = {
        f"detr.{name}": tensor for name, tensor in detr_checkpoint(num_labels=250, device="meta").items()
    }
    return tensors | {"mask_head.lay1.weight": meta((40, 40, 3, 3))}


ARCHITECTURES = {
    "detr": lambda: read_architecture(META),
    "conditional_detr": lambda: read_architecture(conditional()),
    "deformable_detr": lambda: read_architecture(deformable()),
    "panoptic": lambda: read_architecture(panoptic()),
}


@pytest.mark.parametrize("family", PAIRS)
def test_every_kind_of_tensor_gets_its_hub_name(family):
    architecture = ARCHITECTURES[family]()
    for original, hub in PAIRS[family].items():
        tensors = {spelled_out(original, "transformer."): meta((6, 2))}
        assert list(hub_state_dict(tensors, architecture)) == [spelled_out(hub, "model.")]


def spelled_out(name, parent):
    return re.sub(r"^(encoder|decoder) ", rf"{parent}\1.layers.", name)


@pytest.mark.parametrize(
    ("original", "hub"),
    [
        ("transformer.encoder.layers.0.self_attn", "model.encoder.layers.0.self_attn"),
        ("transformer.decoder.layers.0.self_attn", "model.decoder.layers.0.self_attn"),
        ("transformer.decoder.layers.0.multihead_attn", "model.decoder.layers.0.encoder_attn"),
    ],
)
def test_a_packed_projection_is_cut_into_query_key_and_value(original, hub):
    packed = {"weight": torch.randn(96, 32), "bias": torch.randn(96)}
    converted = hub_state_dict(
        {f"{original}.in_proj_{leaf}": t for leaf, t in packed.items()}, read_architecture(META)
    )
    assert len(converted) == 6
    for leaf, tensor in packed.items():
        rejoined = torch.cat([converted[f"{hub}.{part}_proj.{leaf}"] for part in "qkv"])
        assert torch.equal(rejoined, tensor)


def on_the_hub(case):
    """The tensors of the file of the Hub that a case's original checkpoint has become."""
    (file,) = (file for file in HUB if file.name == f"{case.name}@main")
    return {key: spec["shape"] for key, spec in file.keys.items() if "num_batches_tracked" not in key}


CASES = [case for case in ORIGINALS if f"{case.name}@main" in {file.name for file in HUB}]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])
def test_original_names_and_shapes_are_exactly_those_on_the_hub(case):
    tensors = {key: meta(spec["shape"]) for key, spec in case.keys.items()}
    converted = hub_state_dict(tensors, read_architecture(tensors))
    shapes = {key: list(tensor.shape) for key, tensor in converted.items()}
    hub = on_the_hub(case)
    if case.settings["options"].get("pre_norm"):  # recorded with COCO's classes
        hub |= {key: shape for key, shape in shapes.items() if key.startswith("class_labels_classifier.")}
    assert {key: shape for key, shape in shapes.items() if key in hub} == hub
    # A two-stage checkpoint has second copies of its heads, which the file on the Hub leaves out.
    copies = shapes.keys() - hub.keys()
    assert case.proposes or not copies
    assert all(re.match(r"(class|bbox)_embed\.\d", name) for name in copies)
    assert {f"model.decoder.{name}" for name in copies} <= hub.keys()


def test_counters_of_batch_norms_are_dropped():
    tensors = META | {"backbone.0.body.layer1.0.downsample.1.num_batches_tracked": meta(())}
    architecture = read_architecture(tensors)
    assert hub_state_dict(tensors, architecture).keys() == hub_state_dict(META, architecture).keys()


def test_unknown_tensors_are_counted_and_the_first_few_named():
    tensors = META | {f"extra.{i}.weight": meta((1,)) for i in range(7)}
    with pytest.raises(CheckpointError) as raised:
        hub_state_dict(tensors, read_architecture(META))
    listed = ", ".join(f"extra.{i}.weight" for i in range(5))
    assert str(raised.value) == f"the checkpoint has 7 unknown tensors: {listed} and 2 more"


@pytest.mark.parametrize(
    "name",
    [
        "transformer.encoder.layers.x.norm1.weight",
        "transformer.encoder.layers.0.norm3.weight",
        "transformer.encoder.layers.0.norm1.weight.extra",
        "transformer.decoder.layers.0.cross_attn.out_proj.weight",
        "xclass_embed.weight",
        "class_embedding.weight",
    ],
)
def test_a_name_that_is_nearly_right_is_unknown(name):
    with pytest.raises(CheckpointError, match=re.escape(f"1 unknown tensor: {name}")):
        hub_state_dict({name: meta((3, 1))}, read_architecture(META))


@pytest.mark.parametrize("shape", [(), (0, 32), (95, 32)])
def test_a_packed_projection_that_has_no_thirds_is_named(shape):
    name = "transformer.encoder.layers.0.self_attn.in_proj_weight"
    with pytest.raises(CheckpointError, match=f"{name} of shape .* does not split"):
        hub_state_dict({name: meta(shape)}, read_architecture(META))


def test_differences_from_the_model_are_reported_under_original_names():
    architecture = read_architecture(META)
    expected = hub_state_dict(META, architecture)
    tensors = dict(META)
    del tensors["transformer.decoder.layers.0.multihead_attn.in_proj_weight"]
    tensors["backbone.0.body.layer1.3.conv1.weight"] = meta((1,))
    tensors["transformer.encoder.layers.0.self_attn.in_proj_bias"] = meta((48,))
    tensors["class_embed.bias"] = meta(())
    with pytest.raises(CheckpointError) as raised:
        check_fits(hub_state_dict(tensors, architecture), expected, architecture)
    message = str(raised.value)
    assert "; ".join(message.split(": ", 1)[1].split("; ")[:2]) == (
        "1 missing tensor: transformer.decoder.layers.0.multihead_attn.in_proj_weight; "
        "1 unexpected tensor: backbone.0.body.layer1.3.conv1.weight"
    )
    assert "2 tensors of the wrong shape: " in message
    assert "transformer.encoder.layers.0.self_attn.in_proj_bias (48 instead of 96)" in message
    assert "class_embed.bias (a single number instead of 92)" in message


def test_tensors_that_are_the_models_fit_it():
    architecture = read_architecture(META)
    converted = hub_state_dict(META, architecture)
    check_fits(converted, dict(converted), architecture)


def test_sizes_are_read_from_the_tensors():
    architecture = read_architecture(
        detr_checkpoint(
            num_labels=3,
            num_queries=25,
            d_model=64,
            encoder_layers=2,
            decoder_layers=12,
            encoder_ffn=40,
            decoder_ffn=56,
            device="meta",
        )
    )
    assert (architecture.family, architecture.task) == ("detr", "detection")
    assert (architecture.num_labels, architecture.num_queries, architecture.d_model) == (3, 25, 64)
    assert (architecture.encoder_layers, architecture.decoder_layers) == (2, 12)
    assert (architecture.encoder_ffn_dim, architecture.decoder_ffn_dim) == (40, 56)
    assert (architecture.position_embedding_type, architecture.attention_heads) == ("sine", 8)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_backbone_is_known_by_its_blocks(backbone):
    assert read_architecture(detr_checkpoint(backbone=backbone, device="meta")).backbone == backbone


def test_a_backbone_of_no_known_depth_is_reported():
    tensors = {name: tensor for name, tensor in META.items() if ".layer3.5." not in name}
    with pytest.raises(
        CheckpointError, match="no known backbone has stages of 3/4/5/3 blocks of three convolutions"
    ):
        read_architecture(tensors)


def test_learned_positions_are_recognised():
    assert (
        read_architecture(detr_checkpoint(learned=True, device="meta")).position_embedding_type == "learned"
    )


def test_families_and_tasks_are_told_apart():
    found = {name: read() for name, read in ARCHITECTURES.items()}
    assert {name: (a.family, a.task) for name, a in found.items()} == {
        "detr": ("detr", "detection"),
        "conditional_detr": ("conditional_detr", "detection"),
        "deformable_detr": ("deformable_detr", "detection"),
        "panoptic": ("detr", "panoptic"),
    }
    assert {name: a.num_labels for name, a in found.items()} == {
        "detr": 91,
        "conditional_detr": 91,
        "deformable_detr": 91,
        "panoptic": 250,
    }
    assert {name: a.num_feature_levels for name, a in found.items()} == {
        "detr": 1,
        "conditional_detr": 1,
        "deformable_detr": 4,
        "panoptic": 1,
    }


def test_variants_of_deformable_detr_are_told_apart():
    plain = deformable()
    refined = plain | {"transformer.decoder.bbox_embed.0.layers.0.weight": meta((32, 32))}
    two_stage = refined | {"transformer.enc_output.weight": meta((32, 32))}
    del two_stage["query_embed.weight"]
    found = [read_architecture(tensors) for tensors in (plain, refined, two_stage)]
    assert [(a.with_box_refine, a.two_stage, a.num_queries) for a in found] == [
        (False, False, 300),
        (True, False, 300),
        (True, True, None),
    ]


NORM = {"transformer.encoder.norm.weight": meta((32,))}


def test_a_family_with_post_norm_layers_only_refuses_a_norm_after_the_encoder():
    with pytest.raises(CheckpointError, match=r"pre_norm.* not supported"):
        read_architecture(conditional_detr_checkpoint(device="meta") | NORM)


@pytest.mark.parametrize(
    ("tensors", "preferred", "family"),
    [
        (META, None, "table-transformer"),
        (META, "detr", "detr"),
        (META, "conditional_detr", "table-transformer"),
        (panoptic(), None, "detr"),
    ],
)
def test_pre_norm_layers_are_told_by_the_norm_after_the_encoder(tensors, preferred, family):
    prefix = "detr." if "mask_head.lay1.weight" in tensors else ""
    found = read_architecture(tensors | {f"{prefix}{name}": t for name, t in NORM.items()}, preferred)
    assert (found.family, found.normalize_before) == (family, True)
    assert not read_architecture(tensors).normalize_before


def test_a_checkpoint_of_another_network_is_refused_by_what_it_holds():
    with pytest.raises(CheckpointError, match=r"not an original checkpoint of DETR, .*1 tensor: fc\.weight"):
        read_architecture({"fc.weight": meta((1, 1))})


def test_a_checkpoint_with_hub_names_is_sent_to_from_pretrained():
    with pytest.raises(CheckpointError, match="has the Hub's tensor names already; from_pretrained"):
        read_architecture({"model.backbone.conv_encoder.model.conv1.weight": meta((1,))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_embed.weight": None}, r"lacks the tensor query_embed\.weight"),
        ({"class_embed.weight": None}, r"lacks the tensor class_embed\.weight"),
        ({"class_embed.weight": (92,)}, r"class_embed\.weight has too few dimensions: 92"),
        ({"class_embed.weight": (1, 32)}, r"class_embed\.weight leaves no category"),
        ({"class_embed.weight": (92, 30)}, r"class_embed\.weight has 30 channels"),
        (
            {"transformer.encoder.layers.0.linear1.weight": None},
            r"lacks the tensor transformer\.encoder\.layers\.0\.linear1",
        ),
    ],
)
def test_a_tensor_that_tells_the_architecture_must_be_there_and_make_sense(change, message):
    tensors = META | {name: meta(shape) for name, shape in change.items() if shape is not None}
    tensors = {name: tensor for name, tensor in tensors.items() if change.get(name, ()) is not None}
    with pytest.raises(CheckpointError, match=message):
        read_architecture(tensors)
