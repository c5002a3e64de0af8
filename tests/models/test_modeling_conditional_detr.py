"""What Conditional DETR has of its own: reference points, its heads, its initialisation, its detections.

What it shares with the other families is tested with them in ``test_modeling.py`` and ``test_loading.py``.
"""

import math

import pytest
import torch

from detrkit import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    ConditionalDetrImageProcessor,
    ConditionalDetrModel,
)
from detrkit.models.layers.position_encoding import SinePositionEncoding, encode_points
from tests.closeness import assert_same_outputs
from tests.tiny import FAMILIES, padded_batch, shake, some_labels

TINY = FAMILIES["conditional_detr"]


@pytest.fixture
def model():
    return TINY.detector()


def test_defaults_are_the_originals():
    config = ConditionalDetrConfig()
    assert config.num_queries == 300
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    weights = (config.cls_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient)
    assert weights == (2, 5, 2)
    assert config.focal_alpha == 0.25


def test_a_point_is_encoded_like_the_feature_it_lies_on():
    height, width = 5, 7
    of_map = SinePositionEncoding(16)(torch.zeros(1, 1, height, width))[0]
    for row, column in ((0, 0), (2, 5), (4, 6)):
        # The map counts from 1 to the number of rows and columns.
        point = torch.tensor([(column + 1) / width, (row + 1) / height])
        torch.testing.assert_close(encode_points(point, 16), of_map[:, row, column], atol=1e-4, rtol=0)


def test_reference_points_are_those_of_transformers(tmp_path, model):
    model.save_pretrained(tmp_path)
    theirs = TINY.transformers_detector_class.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs.model(*padded_batch()).reference_points
        found = model.model(*padded_batch()).reference_points
    assert found.shape == (12, 2, 2)
    torch.testing.assert_close(found, expected)


def test_a_head_that_says_nothing_gives_boxes_on_the_reference_points(model):
    for parameter in model.bbox_predictor.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)
    points = model.model(*padded_batch()).reference_points
    boxes = model(*padded_batch()).pred_boxes
    torch.testing.assert_close(boxes[..., :2], points.transpose(0, 1))
    assert (boxes[..., 2:] == 0.5).all()


def test_reference_points_at_the_border_give_finite_boxes_and_gradients(model):
    torch.nn.init.constant_(model.model.decoder.ref_point_head.layers[-1].bias, 200.0)
    outputs = model(*padded_batch(), labels=some_labels())
    outputs.loss.backward()
    assert torch.isfinite(outputs.pred_boxes).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_only_the_first_layer_adds_positions_to_contents(model):
    layers = model.model.decoder.layers
    assert ["ca_qpos_proj" in dict(layer.named_children()) for layer in layers] == [True, False, False]


def test_the_first_layer_looks_from_unscaled_reference_points(model):
    single = TINY.detector(decoder_layers=1)
    before = single(*padded_batch())
    shake(single.model.decoder.query_scale, seed=7)
    assert_same_outputs(single(*padded_batch()), before)

    before = model(*padded_batch()).logits
    shake(model.model.decoder.query_scale, seed=7)
    assert (model(*padded_batch()).logits - before).abs().max() > 1e-3


def test_heads_read_only_the_last_layer_unless_all_are_asked_for(model):
    seen = []
    model.bbox_predictor.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    model(*padded_batch())
    model.config.auxiliary_loss = True
    model(*padded_batch())
    assert seen == [1, 3]


def test_half_precision_keeps_reference_points_and_boxes_in_float32(model):
    half = TINY.detector().bfloat16()
    pixels, mask = padded_batch()
    points = half.model(pixels.bfloat16(), mask).reference_points
    outputs = half(pixels.bfloat16(), mask)
    assert (points.dtype, outputs.pred_boxes.dtype, outputs.logits.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    # Not values that a bfloat16 could hold: they were not rounded on the way.
    assert (points != points.bfloat16().float()).any()


def test_a_new_model_is_initialised_as_the_original():
    torch.manual_seed(0)
    model = ConditionalDetrForObjectDetection(TINY.config(d_model=64, decoder_ffn_dim=128))
    decoder = model.model.decoder
    for weight, sizes in (
        (decoder.layers[0].sa_qcontent_proj.weight, (64, 64)),
        (decoder.layers[0].ca_qpos_proj.weight, (64, 64)),
        (decoder.layers[2].ca_qpos_sine_proj.weight, (64, 64)),
        (decoder.layers[1].self_attn.out_proj.weight, (64, 64)),
        (decoder.layers[1].fc1.weight, (64, 128)),
        (decoder.query_scale.layers[1].weight, (64, 64)),
        (decoder.ref_point_head.layers[0].weight, (64, 64)),
    ):
        bound = (6 / sum(sizes)) ** 0.5
        assert bound * 0.97 < weight.abs().max() <= bound
    assert (decoder.layers[0].encoder_attn.out_proj.bias == 0).all()
    # Projections outside the attention modules keep PyTorch's biases.
    assert decoder.layers[0].ca_v_proj.bias.abs().max() > 0.05
    assert 64**-0.5 * 0.97 < model.class_labels_classifier.weight.abs().max() <= 64**-0.5
    torch.testing.assert_close(model.class_labels_classifier.bias, torch.full((5,), -math.log(99)))
    assert all((p == 0).all() for p in model.bbox_predictor.layers[-1].parameters())


def test_a_new_class_head_begins_improbable_and_leaves_the_box_head_as_it_was_loaded(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = ConditionalDetrForObjectDetection.from_pretrained(
        tmp_path, num_labels=3, ignore_mismatched_sizes=True
    )
    torch.testing.assert_close(loaded.class_labels_classifier.bias, torch.full((3,), -math.log(99)))
    state, expected = loaded.state_dict(), model.state_dict()
    for name in expected.keys() - {"class_labels_classifier.weight", "class_labels_classifier.bias"}:
        torch.testing.assert_close(state[name], expected[name], atol=0, rtol=0, msg=name)


def test_a_bare_model_has_the_names_of_the_hub():
    names = set(ConditionalDetrModel(TINY.config()).state_dict())
    layer = {
        n.removeprefix("decoder.layers.0.").rpartition(".")[0] for n in names if "decoder.layers.0." in n
    }
    projections = {f"sa_{part}_proj" for part in ("qcontent", "qpos", "kcontent", "kpos", "v")}
    projections |= {f"ca_{part}_proj" for part in ("qcontent", "qpos", "kcontent", "kpos", "v", "qpos_sine")}
    others = {"self_attn.out_proj", "encoder_attn.out_proj", "fc1", "fc2"}
    norms = {f"{place}_layer_norm" for place in ("self_attn", "encoder_attn", "final")}
    assert layer == projections | others | norms
    for head in ("query_scale", "ref_point_head"):
        assert {f"decoder.{head}.layers.{i}.weight" for i in range(2)} <= names


class TestDetections:
    @pytest.fixture
    def outputs(self):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(2, 12, 20, generator=generator)
        return {"logits": logits, "pred_boxes": torch.rand(2, 12, 4, generator=generator)}

    def test_the_best_pairs_of_query_and_class_are_kept_in_order(self, outputs):
        found = ConditionalDetrImageProcessor().post_process_object_detection(outputs, threshold=0)
        for i, detections in enumerate(found):
            scores = outputs["logits"][i].sigmoid()
            best = scores.flatten().sort(descending=True)
            torch.testing.assert_close(detections["scores"], best.values[:100])
            assert detections["labels"].tolist() == (best.indices[:100] % 20).tolist()

    @pytest.mark.parametrize("top_k", [7, 230, 300])
    def test_the_number_of_candidates_is_a_choice(self, outputs, top_k):
        processor = ConditionalDetrImageProcessor()
        found = processor.post_process_object_detection(outputs, threshold=0, top_k=top_k)
        assert [len(detections["scores"]) for detections in found] == [min(top_k, 240)] * 2

    def test_results_are_those_of_transformers(self, outputs):
        import transformers
        from transformers.utils import ModelOutput

        options = {"threshold": 0.6, "target_sizes": [(480, 640), (300, 200)], "top_k": 150}
        outputs = ModelOutput(outputs)
        theirs = transformers.ConditionalDetrImageProcessor().post_process_object_detection(
            outputs, **options
        )
        ours = ConditionalDetrImageProcessor().post_process_object_detection(outputs, **options)
        for found, expected in zip(ours, theirs):
            assert len(found["scores"]) > 10
            for key in ("scores", "labels", "boxes"):
                torch.testing.assert_close(found[key], expected[key])

    def test_the_old_call_gives_a_hundred_without_a_threshold(self, outputs):
        outputs["logits"] = outputs["logits"] - 5
        found = ConditionalDetrImageProcessor().post_process(outputs, torch.tensor([[480, 640], [300, 200]]))
        assert [detections["boxes"].shape for detections in found] == [(100, 4)] * 2
        assert max(detections["scores"].max() for detections in found) < 0.5
