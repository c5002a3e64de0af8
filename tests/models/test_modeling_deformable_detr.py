"""What Deformable DETR has of its own: sampled attention, reference points, refinement, proposals, its heads.

What it shares with the other families is tested with them in ``test_modeling.py`` and ``test_loading.py``.
"""

import copy
import dataclasses
import io
import itertools
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from detrkit import DeformableDetrConfig, DeformableDetrForObjectDetection
from detrkit.models import outputs
from detrkit.models.layers.feature_levels import Surroundings
from tests.closeness import assert_same_numbers, assert_same_outputs
from tests.tiny import FAMILIES, padded_batch, shake, some_labels

TINY = FAMILIES["deformable_detr"]
REFINE = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 12}
VARIANTS = {"plain": {}, "refine": REFINE, "two-stage": TWO_STAGE}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def model():
    return TINY.detector()


@pytest.fixture
def refining():
    return TINY.detector(**REFINE)


@pytest.fixture
def proposing():
    return TINY.detector(**TWO_STAGE)


def inverse_sigmoid(x):
    return (x / (1 - x)).log()


class TestConfig:
    def test_defaults_are_the_originals(self):
        config = DeformableDetrConfig()
        assert (config.num_queries, config.num_feature_levels) == (300, 4)
        assert (config.encoder_n_points, config.decoder_n_points) == (4, 4)
        assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (1024, 1024)
        assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
        weights = (config.cls_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient)
        assert weights == (2, 5, 2)
        assert config.focal_alpha == 0.25

    def test_two_stages_without_refinement_are_refused(self):
        with pytest.raises(ValueError, match="needs with_box_refine=True"):
            DeformableDetrConfig(two_stage=True)


class TestSampling:
    def test_weights_sum_to_one_over_levels_and_points(self, model):
        outputs = model(*padded_batch(), output_attentions=True)
        for weights in (*outputs.encoder_attentions, *outputs.cross_attentions):
            assert weights.min() >= 0
            torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))

    def test_sampling_locations_are_points_of_every_weight(self, model):
        outputs = model(*padded_batch(), output_attentions=True)
        for weights, locations in (
            (outputs.encoder_attentions, outputs.encoder_sampling_locations),
            (outputs.cross_attentions, outputs.cross_sampling_locations),
        ):
            assert [place.shape for place in locations] == [(*weight.shape, 2) for weight in weights]
        assert model(*padded_batch()).cross_sampling_locations is None

    def test_a_layer_without_offsets_samples_its_reference_points(self, model):
        attention = model.model.decoder.layers[0].encoder_attn
        torch.nn.init.zeros_(attention.sampling_offsets.weight)
        torch.nn.init.zeros_(attention.sampling_offsets.bias)
        outputs = model(padded_batch()[0], output_attentions=True)
        points = outputs.init_reference_points[:, :, None, None, None]
        torch.testing.assert_close(
            outputs.cross_sampling_locations[0], points.expand_as(outputs.cross_sampling_locations[0])
        )

    def test_offsets_are_pixels_around_a_point(self, model):
        attention = model.model.decoder.layers[0].encoder_attn
        torch.nn.init.zeros_(attention.sampling_offsets.weight)
        torch.nn.init.ones_(attention.sampling_offsets.bias)
        outputs = model(padded_batch()[0], output_attentions=True)
        moved = outputs.cross_sampling_locations[0] - outputs.init_reference_points[:, :, None, None, None]
        for level, (height, width) in enumerate(TINY.levels):
            expected = torch.tensor([1 / width, 1 / height]).expand(2, 12, 8, 4, 2)
            torch.testing.assert_close(moved[:, :, :, level], expected, atol=1e-6, rtol=0)

    def test_offsets_are_half_sizes_of_a_box_shared_among_the_points(self, proposing):
        attention = proposing.model.decoder.layers[0].encoder_attn
        torch.nn.init.zeros_(attention.sampling_offsets.weight)
        torch.nn.init.ones_(attention.sampling_offsets.bias)
        outputs = proposing(padded_batch()[0], output_attentions=True)
        boxes = outputs.init_reference_points
        expected = boxes[..., :2] + boxes[..., 2:] / 8
        found = outputs.cross_sampling_locations[0]
        torch.testing.assert_close(found, expected[:, :, None, None, None].expand_as(found))

    def test_what_is_padded_is_not_read(self):
        """With a value of one everywhere, attention reads how much of its weight lies on real pixels."""
        attention = TINY.detector().model.encoder.layers[0].self_attn
        for projection in (attention.value_proj, attention.output_proj):
            torch.nn.init.eye_(projection.weight)
            torch.nn.init.zeros_(projection.bias)
        model = TINY.base()
        levels = model._feature_levels(*padded_batch())
        places = torch.zeros(2, 1, 1, 1, 1, 2)  # the upper left pixel, and what lies outside
        places[1] += 0.97  # deep in the padding of the second image
        torch.nn.init.zeros_(attention.sampling_offsets.weight)
        torch.nn.init.zeros_(attention.sampling_offsets.bias)
        ones = torch.ones_like(levels.pixels)
        found, _ = attention(torch.zeros(2, 1, 32), Surroundings(places, torch.ones(2)), ones, levels)
        torch.testing.assert_close(found[0], torch.full((1, 32), 0.25))  # a quarter of a pixel is inside
        assert (found[1] == 0).all()

    @pytest.mark.parametrize("points", [1, 3])
    def test_the_number_of_points_and_levels_is_a_choice(self, points):
        model = TINY.detector(encoder_n_points=points, decoder_n_points=points + 1, num_feature_levels=5)
        outputs = model(*padded_batch(), output_attentions=True)
        assert outputs.encoder_attentions[0].shape == (2, TINY.encoded + 1 * 2, 4, 5, points)
        assert outputs.cross_attentions[0].shape == (2, 12, 8, 5, points + 1)

    def test_a_single_level_is_the_backbones_last_map(self):
        model = TINY.detector(num_feature_levels=1)
        assert model(*padded_batch()).encoder_last_hidden_state.shape == (2, 4 * 5, 32)
        assert len(model.model.input_proj) == 1


class TestImages:
    @variants
    def test_a_full_mask_is_the_same_as_none(self, options):
        model = TINY.detector(**options)
        pixels, mask = padded_batch()
        assert_same_outputs(model(pixels, torch.ones_like(mask)), model(pixels))

    def test_a_full_mask_that_is_respected_is_the_same_as_none(self, model, monkeypatch):
        """A graph respects every mask, as it must not look at values: valid ratios of one change nothing."""
        from detrkit.models.layers import backbone

        pixels, mask = padded_batch()
        expected = model(pixels)
        monkeypatch.setattr(backbone, "padding_mask", lambda mask, pixels: mask)
        assert_same_outputs(model(pixels, torch.ones_like(mask)), expected)

    @pytest.mark.parametrize(("height", "width"), [(90, 100), (128, 32), (33, 160)])
    def test_valid_ratios_are_counted_pixel_by_pixel(self, height, width):
        pixels, mask = padded_batch()
        mask[1] = 0
        mask[1, :height, :width] = 1
        levels = TINY.base()._feature_levels(pixels, mask)
        for level, (rows, columns) in enumerate(TINY.levels):
            # A pixel of a map takes the value of the mask where its upper left corner lies.
            real_columns = sum(column * 160 // columns < width for column in range(columns))
            real_rows = sum(row * 128 // rows < height for row in range(rows))
            expected = torch.tensor([real_columns / columns, real_rows / rows])
            torch.testing.assert_close(levels.valid_ratios[1, level], expected)
        assert (levels.valid_ratios[0] == 1).all()

    def test_pixel_centres_are_relative_to_the_real_image(self):
        levels = TINY.base()._feature_levels(*padded_batch())
        centres = levels.pixel_centres()
        expected = []
        for level, (height, width) in enumerate(TINY.levels):
            x_ratio, y_ratio = levels.valid_ratios[1, level].tolist()
            for y in range(height):
                for x in range(width):
                    expected.append([(x + 0.5) / (width * x_ratio), (y + 0.5) / (height * y_ratio)])
        torch.testing.assert_close(centres[1], torch.tensor(expected))
        assert (centres[0] < 1).all()
        assert (centres[1] > 1).any()  # in the padding

    def test_points_are_scaled_to_each_level_with_its_padding_and_measure_in_its_pixels(self):
        levels = TINY.base()._feature_levels(*padded_batch())
        reference = torch.rand(2, 6, 2)
        centre, unit = levels.surroundings(reference, points=4)
        assert centre.shape == (2, 6, 1, 4, 1, 2)
        for image, (level, (height, width)) in itertools.product(range(2), enumerate(TINY.levels)):
            ratio = levels.valid_ratios[image, level]
            torch.testing.assert_close(centre[image, :, 0, level, 0], reference[image] * ratio)
            torch.testing.assert_close(unit[level, 0], torch.tensor([1 / width, 1 / height]))

    def test_boxes_are_scaled_to_each_level_with_its_padding_and_share_half_their_size(self):
        levels = TINY.base()._feature_levels(*padded_batch())
        reference = torch.rand(2, 6, 4)
        centre, unit = levels.surroundings(reference, points=4)
        for image, level in itertools.product(range(2), range(4)):
            ratio = levels.valid_ratios[image, level]
            torch.testing.assert_close(centre[image, :, 0, level, 0], reference[image, :, :2] * ratio)
            torch.testing.assert_close(unit[image, :, 0, level, 0], reference[image, :, 2:] * ratio / 8)

    @pytest.mark.parametrize("padded", [False, True])
    def test_surroundings_written_out_are_the_same(self, padded):
        pixels, mask = padded_batch()
        levels = TINY.base()._feature_levels(pixels, mask if padded else None)
        around = levels.surroundings(levels.pixel_centres(), points=3)
        for found, wanted in zip(around.spread(heads=2, points=3), around):
            assert found.is_contiguous()
            assert torch.equal(found, wanted.expand(found.shape))

    def test_an_image_whose_last_map_has_one_pixel_is_computed_as_in_a_batch(self, model):
        pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        together, alone = model(pixels), model(pixels[:1])
        assert_same_numbers(alone.logits, together.logits[:1])

    def test_no_image_is_refused(self, model):
        with pytest.raises(ValueError, match="does not take inputs_embeds"):
            model(inputs_embeds=torch.zeros(2, 16, 32))
        with pytest.raises(ValueError, match="pixel_values"):
            model()

    def test_decoder_inputs_embeds_replace_the_content_of_the_queries(self, model):
        pixels, _ = padded_batch()
        base = model(pixels)
        content = model.model.query_position_embeddings.weight[:, 32:].expand(2, -1, -1)
        assert_same_outputs(model(pixels, decoder_inputs_embeds=content), base)
        other = model(pixels, decoder_inputs_embeds=content + 1)
        assert (other.logits - base.logits).abs().max() > 1e-3

    def test_queries_that_are_masked_are_not_attended_to(self, model):
        pixels, _ = padded_batch()
        keep = torch.ones(2, 12, dtype=torch.long)
        assert_same_outputs(model(pixels, decoder_attention_mask=keep), model(pixels))
        keep[:, 6:] = 0
        hidden = model(pixels, decoder_attention_mask=keep, output_attentions=True)
        assert hidden.decoder_attentions[0][..., 6:].max() == 0


class TestHalfPrecision:
    @variants
    def test_references_and_boxes_stay_in_float32(self, options):
        model = TINY.detector(**options).bfloat16()
        pixels, mask = padded_batch()
        outputs = model(pixels.bfloat16(), mask)
        references = outputs.init_reference_points
        assert (references.dtype, outputs.pred_boxes.dtype) == (torch.float32, torch.float32)
        assert outputs.logits.dtype == torch.bfloat16
        # Not values that a bfloat16 could hold: they were not rounded on the way.
        for values in (references, outputs.pred_boxes):
            assert (values != values.bfloat16().float()).any()

    def test_centres_ratios_and_anchors_equal_those_of_float32(self):
        from detrkit.models.layers.feature_levels import proposal_anchors

        pixels, mask = padded_batch()
        full = TINY.base()._feature_levels(pixels, mask)
        half = TINY.base().bfloat16()._feature_levels(pixels.bfloat16(), mask)
        for compute in (
            lambda levels: levels.valid_ratios,
            lambda levels: levels.pixel_centres(),
            lambda levels: levels.surroundings(levels.pixel_centres(), 4).centre,
            lambda levels: proposal_anchors(levels)[0],
        ):
            assert_same_numbers(compute(half), compute(full))

    def test_sampling_locations_are_computed_in_float32(self, model):
        pixels, mask = padded_batch()
        locations = model.bfloat16()(
            pixels.bfloat16(), mask, output_attentions=True
        ).encoder_sampling_locations[0]
        assert locations.dtype == torch.float32
        assert (locations != locations.bfloat16().float()).any()


def test_outputs_have_transformers_fields_in_its_order_and_meaning():
    import transformers

    theirs = transformers.models.deformable_detr.modeling_deformable_detr
    for ours, expected in (
        (outputs.DeformableDetrModelOutput, theirs.DeformableDetrModelOutput),
        (outputs.DeformableDetrObjectDetectionOutput, theirs.DeformableDetrObjectDetectionOutput),
    ):
        names = [field.name for field in dataclasses.fields(expected)]
        assert [field.name for field in dataclasses.fields(ours)][: len(names)] == names
    model = FAMILIES["deformable_detr"].detector(with_box_refine=True)
    with torch.no_grad():
        found = model(*padded_batch())
        model.config.auxiliary_loss = True
        earlier = [layer["pred_boxes"] for layer in model(*padded_batch()).auxiliary_outputs]
    assert found.init_reference_points.shape == (2, 12, 2)
    assert found.intermediate_hidden_states.shape == (2, 3, 12, 32)
    torch.testing.assert_close(found.intermediate_hidden_states[:, -1], found.last_hidden_state)
    refined = torch.stack([*earlier, found.pred_boxes], dim=1)
    torch.testing.assert_close(found.intermediate_reference_points, refined)


class TestProposals:
    @pytest.mark.parametrize("error", [-1e-8, 0.0, 1e-8])
    def test_the_outermost_of_fifty_pixels_are_unused_however_their_centres_are_rounded(
        self, monkeypatch, error
    ):
        from detrkit.models.deformable_detr import modeling_deformable_detr as modeling

        empty = torch.empty(1, 2500, 0)
        levels = modeling.FeatureLevels(empty, empty, [(50, 50)], None, None)
        centres = levels.pixel_centres()
        centres = torch.where(centres < 0.5, centres + error, centres - 10 * error)
        monkeypatch.setattr(modeling.FeatureLevels, "pixel_centres", lambda self: centres)
        usable = modeling.proposal_anchors(levels)[1].view(50, 50)
        assert usable[1:-1, 1:-1].all()
        assert usable.sum() == 48 * 48

    def test_padded_and_border_pixels_propose_nothing(self, proposing):
        pixels, mask = padded_batch()
        boxes = proposing(pixels, mask).enc_outputs_coord_logits
        finite = boxes.isfinite().all(-1)
        padded = TINY.padding(mask)
        assert padded[1].any()
        assert not finite[padded].any()
        centres = proposing.model._feature_levels(pixels, mask).pixel_centres()
        inside = ((centres > 0.01) & (centres < 0.99)).all(-1) & ~padded
        torch.testing.assert_close(finite, inside)
        assert boxes[~finite].sigmoid().eq(1).all()

    def test_a_box_head_that_says_nothing_proposes_boxes_around_pixels_larger_in_coarse_levels(
        self, proposing
    ):
        for parameter in proposing.bbox_embed[-1].layers[-1].parameters():
            torch.nn.init.zeros_(parameter)
        pixels, mask = padded_batch()
        boxes = proposing(pixels, mask).enc_outputs_coord_logits.sigmoid()
        centres = proposing.model._feature_levels(pixels, mask).pixel_centres()
        start = 0
        for level, (height, width) in enumerate(TINY.levels):
            rows = slice(start, start + height * width)
            real = (boxes[:, rows] < 1).all(-1)
            assert real.any()
            torch.testing.assert_close(boxes[:, rows, :2][real], centres[:, rows][real])
            side = torch.full((int(real.sum()), 2), 0.05 * 2**level)
            torch.testing.assert_close(boxes[:, rows, 2:][real], side)
            start += height * width

    def test_queries_start_from_the_boxes_of_the_best_pixels(self, proposing):
        outputs = proposing(*padded_batch())
        for image in range(2):
            best = outputs.enc_outputs_class[image, :, 0].argsort(descending=True)[:12]
            expected = outputs.enc_outputs_coord_logits[image, best].sigmoid()
            torch.testing.assert_close(outputs.init_reference_points[image], expected)

    def test_a_two_stage_model_has_no_learned_queries(self, proposing):
        names = [name for name, _ in proposing.named_parameters()]
        assert not any("query_position_embeddings" in n or "reference_points" in n for n in names)

    @pytest.mark.parametrize("count", [1, 30, 426])
    def test_the_number_of_proposals_is_the_number_of_queries(self, count):
        model = TINY.detector(**{**TWO_STAGE, "two_stage_num_proposals": count})
        assert model(*padded_batch()).logits.shape == (2, count, 5)

    def test_fewer_pixels_than_proposals_are_all_proposed(self):
        model = TINY.detector(**{**TWO_STAGE, "two_stage_num_proposals": 300})
        outputs = model(torch.randn(1, 3, 96, 96))
        assert outputs.logits.shape == (1, 12 * 12 + 6 * 6 + 3 * 3 + 2 * 2, 5)
        assert outputs.logits.isfinite().all()

    def test_the_proposal_loss_reaches_the_heads_that_propose(self, proposing):
        outputs = proposing.train()(*padded_batch(), labels=some_labels())
        sum(
            v for name, v in outputs.loss_dict.items() if name.endswith("_enc") and v.requires_grad
        ).backward()
        for module in (
            proposing.model.enc_output,
            proposing.model.enc_output_norm,
            proposing.class_embed[-1],
            proposing.bbox_embed[-1],
        ):
            for name, parameter in module.named_parameters():
                assert parameter.grad.abs().max() > 0, name
        assert proposing.class_embed[0].weight.grad is None
        assert proposing.model.pos_trans.weight.grad is None

    def test_the_total_contains_the_weighted_proposal_terms(self, proposing):
        outputs = proposing(*padded_batch(), labels=some_labels())
        weights = {"loss_ce": 2, "loss_bbox": 5, "loss_giou": 2}
        terms = outputs.loss_dict
        expected = sum(w * (terms[n] + terms[f"{n}_enc"]) for n, w in weights.items())
        torch.testing.assert_close(outputs.loss, expected)

    def test_a_bare_model_says_that_it_cannot_propose(self):
        with pytest.raises(ValueError, match="use DeformableDetrForObjectDetection"):
            TINY.base(**TWO_STAGE)(*padded_batch())


class TestHeads:
    def test_without_refinement_one_pair_serves_all_layers(self, model):
        assert (len(model.class_embed), len(model.bbox_embed)) == (1, 1)

    @pytest.mark.parametrize(("options", "count"), [(REFINE, 3), (TWO_STAGE, 4)])
    def test_with_refinement_each_layer_has_its_own_and_all_start_alike(self, options, count):
        model = DeformableDetrForObjectDetection(TINY.config(**options))
        for heads in (model.class_embed, model.bbox_embed):
            assert len(heads) == count
            states = [head.state_dict() for head in heads]
            assert len({id(p) for head in heads for p in head.parameters()}) == count * len(states[0])
            for name in states[0]:
                for state in states[1:]:
                    if name == "layers.2.bias":  # the first layer begins with smaller boxes
                        torch.testing.assert_close(state[name][:2], states[0][name][:2])
                    else:
                        torch.testing.assert_close(state[name], states[0][name], atol=0, rtol=0)

    @pytest.mark.parametrize("options", [{}, REFINE, TWO_STAGE], ids=VARIANTS)
    def test_classes_are_read_off_the_last_layer_only_unless_all_are_asked_for(self, options):
        model = TINY.detector(**options)
        layers = range(model.config.decoder_layers)
        seen = []
        for index in layers:
            head = model.class_embed[index if options else 0]
            head.register_forward_hook(lambda *_, index=index: seen.append(index))
            if not options:
                break
        last = [2] if options else [0]
        model(*padded_batch())
        assert seen == last
        seen.clear()
        model.config.auxiliary_loss = True
        model(*padded_batch())
        assert seen == ([0, 1, 2] if options else [0, 0, 0])

    def test_boxes_are_head_plus_logit_of_the_reference_point(self, model):
        for parameter in model.bbox_embed[0].layers[-1].parameters():
            torch.nn.init.zeros_(parameter)
        outputs = model(*padded_batch())
        torch.testing.assert_close(outputs.pred_boxes[..., :2], outputs.init_reference_points)
        assert (outputs.pred_boxes[..., 2:] == 0.5).all()

    def test_each_layer_refines_the_boxes_of_the_one_before(self, refining):
        refining.config.auxiliary_loss = True
        seen = [[] for _ in range(3)]
        for index, head in enumerate(refining.bbox_embed):
            head.register_forward_hook(lambda *io, index=index: seen[index].append(io[2]))
        outputs = refining(*padded_batch())
        points = outputs.init_reference_points
        boxes = torch.nn.functional.pad(inverse_sigmoid(points), (0, 2))
        all_boxes = [*(a["pred_boxes"] for a in outputs.auxiliary_outputs), outputs.pred_boxes]
        for updates, expected in zip(seen, all_boxes):
            boxes = boxes + updates[-1]
            torch.testing.assert_close(boxes.sigmoid(), expected)

    def test_refined_boxes_pass_no_gradient_to_the_layer_before(self, refining):
        """Each head learns from its own layer's boxes: the reference is where the next layer starts."""
        outputs = refining.train()(*padded_batch())
        outputs.pred_boxes.sum().backward()
        for index in range(2):
            assert all(p.grad is None or (p.grad == 0).all() for p in refining.bbox_embed[index].parameters())
        assert refining.bbox_embed[2].layers[0].weight.grad.abs().max() > 0

    def test_references_at_the_border_give_finite_boxes_and_gradients(self, refining):
        torch.nn.init.constant_(refining.model.reference_points.bias, 200.0)
        outputs = refining(*padded_batch(), labels=some_labels())
        outputs.loss.backward()
        assert outputs.pred_boxes.isfinite().all()
        assert all(p.grad.isfinite().all() for p in refining.parameters() if p.grad is not None)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("options", [REFINE, TWO_STAGE], ids=["refine", "two-stage"])
    def test_a_copy_of_a_model_uses_heads_of_its_own(self, how, options):
        model = TINY.detector(**options)
        expected = model(*padded_batch())
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert twin.model.heads[0] is twin.class_embed
        assert twin.model.heads[1] is twin.bbox_embed
        assert twin.model.heads[1] is not model.bbox_embed
        assert_same_outputs(twin(*padded_batch()), expected)
        shake(twin.bbox_embed, seed=9)
        assert (twin(*padded_batch()).logits - expected.logits).abs().max() > 1e-3
        assert_same_outputs(model(*padded_batch()), expected)

    def test_heads_belong_to_the_detector_and_are_named_once(self, refining):
        names = set(refining.state_dict())
        assert {f"bbox_embed.{i}.layers.0.weight" for i in range(3)} <= names
        assert not any("decoder.bbox_embed" in name or "heads" in name for name in names)

    def test_heads_that_are_put_in_place_of_others_are_the_ones_that_refine(self, refining):
        before = refining(*padded_batch()).logits
        refining.bbox_embed = shake(copy.deepcopy(refining.bbox_embed), seed=9)
        assert (refining(*padded_batch()).logits - before).abs().max() > 1e-3


class TestTraining:
    @variants
    def test_every_trainable_parameter_gets_a_gradient(self, options):
        model = TINY.detector(**options).train()
        model(*padded_batch(), labels=some_labels()).loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_checkpointing_gives_the_same_gradients_with_refinement(self):
        model = TINY.detector(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, **REFINE).train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(*padded_batch(), labels=some_labels()).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


class TestInitialisation:
    @variants
    def test_classes_begin_improbable_and_boxes_at_their_references(self, options):
        model = DeformableDetrForObjectDetection(TINY.config(**options))
        for head in model.class_embed:
            torch.testing.assert_close(head.bias, torch.full((5,), -math.log(99)))
        sizes = []
        for head in model.bbox_embed:
            assert (head.layers[-1].weight == 0).all()
            assert (head.layers[-1].bias[:2] == 0).all()
            sizes.append(head.layers[-1].bias[2:].tolist())
        smaller = not options.get("two_stage", False)
        assert sizes[0] == ([-2, -2] if smaller else [0, 0])
        assert all(size == [0, 0] for size in sizes[1:])

    def test_each_head_samples_along_a_direction_of_its_own(self):
        model = DeformableDetrForObjectDetection(TINY.config())
        attention = model.model.encoder.layers[1].self_attn
        assert (attention.sampling_offsets.weight == 0).all()
        # Four heads, four levels, four points at the distances 1 to 4.
        offsets = attention.sampling_offsets.bias.view(4, 4, 4, 2)
        for head, direction in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
            for point in range(4):
                expected = torch.tensor(direction) * (point + 1.0)
                torch.testing.assert_close(offsets[head, :, point], expected.expand(4, 2), atol=1e-5, rtol=0)
        of_decoder = model.model.decoder.layers[0].encoder_attn.sampling_offsets.bias.view(8, 4, 4, 2)
        torch.testing.assert_close(of_decoder[1, 0, 2], torch.tensor([3.0, 3.0]))  # on the square's border
        assert (attention.attention_weights.weight == 0).all()
        assert (attention.attention_weights.bias == 0).all()

    def test_projections_are_xavier_uniform_with_zero_biases(self):
        torch.manual_seed(0)
        options = {**TWO_STAGE, "d_model": 64}
        model = DeformableDetrForObjectDetection(TINY.config(**options)).model
        attention = model.encoder.layers[0].self_attn
        for weight, sizes in (
            (attention.value_proj.weight, (64, 64)),
            (attention.output_proj.weight, (64, 64)),
            (model.enc_output.weight, (64, 64)),
            (model.pos_trans.weight, (128, 128)),
            (model.input_proj[0][0].weight, (12, 64)),
            (model.input_proj[3][0].weight, (20 * 9, 64 * 9)),
        ):
            bound = (6 / sum(sizes)) ** 0.5
            assert bound * 0.95 < weight.abs().max() <= bound
        for bias in (attention.value_proj.bias, attention.output_proj.bias, model.input_proj[0][0].bias):
            assert (bias == 0).all()
        assert 0.8 < model.level_embed.std() < 1.2
        plain = DeformableDetrForObjectDetection(TINY.config()).model
        assert (plain.reference_points.bias == 0).all()

    @variants
    def test_a_new_class_head_begins_improbable_and_leaves_the_rest_as_it_was_loaded(self, options, tmp_path):
        model = TINY.detector(**options)
        model.save_pretrained(tmp_path)
        loaded = DeformableDetrForObjectDetection.from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True
        )
        for head in loaded.class_embed:
            torch.testing.assert_close(head.bias, torch.full((3,), -math.log(99)))
        state, expected = loaded.state_dict(), model.state_dict()
        for name in expected:
            if not name.startswith("class_embed"):
                torch.testing.assert_close(state[name], expected[name], atol=0, rtol=0, msg=name)


def without(tensors, *prefixes):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def only_copy(index):
    """Keeps one of the copies of the heads that all layers share."""
    return lambda tensors: without(
        tensors, *(f"{head}.{i}." for head in ("class_embed", "bbox_embed") for i in range(3) if i != index)
    )


def only_of_decoder(tensors):
    """Leaves out every head that the decoder has under its own name."""
    doubled = {name.removeprefix("model.decoder.") for name in tensors if name.startswith("model.decoder.")}
    return {name: tensor for name, tensor in tensors.items() if name not in doubled}


def only_of_model(tensors):
    return without(tensors, "model.decoder.class_embed", "model.decoder.bbox_embed")


class TestFiles:
    @pytest.mark.parametrize(
        ("options", "keep", "heads"),
        [
            pytest.param({}, dict, 3 + 3, id="plain-all"),
            *(pytest.param({}, only_copy(i), 1 + 1, id=f"plain-copy-{i}") for i in range(3)),
            pytest.param(REFINE, dict, 3 + 3 + 3, id="refine-both"),
            pytest.param(REFINE, only_of_decoder, 3 + 3, id="refine-decoder"),
            pytest.param(REFINE, only_of_model, 3 + 3, id="refine-model"),
            pytest.param(TWO_STAGE, dict, 4 * 4, id="two-stage-both"),
            pytest.param(TWO_STAGE, only_of_decoder, 4 + 4, id="two-stage-decoder"),
            pytest.param(TWO_STAGE, only_of_model, 4 + 4, id="two-stage-model"),
        ],
    )
    def test_heads_load_from_whichever_of_their_copies_a_file_has(self, options, keep, heads, tmp_path):
        model = TINY.detector(**options)
        model.save_pretrained(tmp_path)
        tensors = keep(load_file(tmp_path / "model.safetensors"))
        weights = {name.rpartition(".layers.")[0] or name for name in tensors if name.endswith(".weight")}
        assert sum("_embed." in name for name in weights) == heads
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = DeformableDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same_outputs(loaded(*padded_batch()), model(*padded_batch()))

    def test_a_missing_head_is_reported_and_begins_as_the_first_one(self, refining, tmp_path):
        refining.save_pretrained(tmp_path)
        tensors = without(
            load_file(tmp_path / "model.safetensors"), "class_embed.2.", "bbox_embed.", "model.decoder.bbox"
        )
        tensors |= {n: t for n, t in refining.state_dict().items() if n.startswith("bbox_embed.")}
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = DeformableDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == {"class_embed.2.weight", "class_embed.2.bias"}
        for index, wanted in enumerate((0, 1, 0)):
            found = loaded.class_embed[index]
            for key, value in refining.class_embed[wanted].state_dict().items():
                torch.testing.assert_close(found.state_dict()[key], value, atol=0, rtol=0)

    @pytest.mark.parametrize("options", [REFINE, TWO_STAGE], ids=["refine", "two-stage"])
    def test_heads_that_differ_survive_a_round_trip_through_transformers(self, options, tmp_path):
        model = TINY.detector(**options)
        expected = model(*padded_batch())
        model.save_pretrained(tmp_path / "ours")
        theirs = TINY.transformers_detector_class.from_pretrained(tmp_path / "ours")
        with torch.no_grad():
            assert_same_outputs(theirs(*padded_batch()), expected)
        theirs.save_pretrained(tmp_path / "theirs")
        theirs.config.save_pretrained(tmp_path / "dump")
        torch.save(theirs.state_dict(), tmp_path / "dump" / "pytorch_model.bin")
        for folder in ("theirs", "dump"):
            loaded = DeformableDetrForObjectDetection.from_pretrained(tmp_path / folder)
            assert_same_outputs(loaded(*padded_batch()), expected)

    @pytest.mark.parametrize("options", [REFINE, TWO_STAGE], ids=["refine", "two-stage"])
    def test_heads_that_transformers_shares_are_loaded_for_every_layer(self, options, tmp_path):
        """A model made by Transformers has one head under all names, and saves it once."""
        theirs = TINY.transformers_detector(**options)
        theirs.save_pretrained(tmp_path / "saved")
        theirs.config.save_pretrained(tmp_path / "dump")
        torch.save(theirs.state_dict(), tmp_path / "dump" / "pytorch_model.bin")
        for folder in ("saved", "dump"):
            loaded, info = DeformableDetrForObjectDetection.from_pretrained(
                tmp_path / folder, output_loading_info=True
            )
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            with torch.no_grad():
                assert_same_outputs(loaded(*padded_batch()), theirs(*padded_batch()))

    @variants
    def test_what_is_saved_is_loaded_by_load_state_dict(self, options, tmp_path):
        model = TINY.detector(**options)
        model.save_pretrained(tmp_path)
        other = DeformableDetrForObjectDetection(TINY.config(**options)).eval()
        result = other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        assert not result.missing_keys
        assert_same_outputs(other(*padded_batch()), model(*padded_batch()))

    @pytest.mark.parametrize("options", [{}, {"dilation": True}], ids=["single-scale", "dc5"])
    def test_a_single_level_gives_what_transformers_gives(self, options, tmp_path):
        backbone = {"backbone_config": None, "use_timm_backbone": True, "backbone": "resnet18"}
        model = TINY.detector(num_feature_levels=1, **backbone, **options)
        model.save_pretrained(tmp_path)
        theirs = TINY.transformers_detector_class.from_pretrained(tmp_path)
        with torch.no_grad():
            assert_same_outputs(model(*padded_batch()), theirs(*padded_batch()))
