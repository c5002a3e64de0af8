"""Matching and set criterion, against plain recomputation and the original's numbers."""

import itertools
import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

import detrkit
from detrkit import ConditionalDetrConfig, DetrConfig
from detrkit.checkpoints.original import original_name, read_architecture
from detrkit.losses.boxes import cxcywh_to_xyxy, generalized_iou, xyxy_to_cxcywh
from detrkit.losses.criterion import detection_loss
from detrkit.losses.matcher import match
from tests.golden import GOLDEN, golden_batch, golden_case, golden_targets, golden_weights, needs_golden
from tests.models.test_golden import in_the_order_of

CONFIG = DetrConfig(num_labels=4)
FOCAL = ConditionalDetrConfig(num_labels=4)

unit = st.floats(0.0625, 0.875, width=32)
boxes_strategy = st.lists(st.tuples(unit, unit, unit, unit), min_size=1, max_size=6).map(torch.tensor)


@given(boxes_strategy)
def test_box_formats_convert_back_and_forth(boxes):
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-6, rtol=0)
    torch.testing.assert_close(cxcywh_to_xyxy(boxes), box_convert(boxes, "cxcywh", "xyxy"))


@given(boxes_strategy, boxes_strategy)
@settings(max_examples=50)
def test_generalized_iou_of_all_pairs_is_torchvisions(a, b):
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    torch.testing.assert_close(
        generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b), atol=1e-5, rtol=1e-5
    )


def random_predictions(batch=2, queries=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, queries, classes + 1, generator=generator)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.3
    return logits, boxes


def targets_of(*counts, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(4, (n,), generator=generator),
            "boxes": torch.rand(n, 4, generator=generator) * 0.4 + 0.3,
        }
        for n in counts
    ]


def focal_cost(logit):
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)


def total_cost(logits, boxes, target, query, picked, focal):
    cost = 0.0
    for q, t in zip(query, picked):
        label = target["class_labels"][t]
        cost += 2 * focal_cost(logits[q, label].item()) if focal else -logits[q].softmax(-1)[label].item()
        cost += 5 * (boxes[q] - target["boxes"][t]).abs().sum().item()
        a, b = cxcywh_to_xyxy(boxes[q])[None], cxcywh_to_xyxy(target["boxes"][t])[None]
        cost -= 2 * generalized_box_iou(a, b).item()
    return cost


@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
@pytest.mark.parametrize("seed", range(3))
def test_matching_has_the_least_cost_of_all_assignments(focal, seed):
    logits, boxes = random_predictions(seed=seed)
    logits = 3 * logits
    targets = targets_of(3, 2)
    matches = match(logits[None], boxes[None], targets, 2 if focal else 1, 5, 2, focal=focal)[0]
    for i, (query, picked) in enumerate(matches):
        ours = total_cost(logits[i], boxes[i], targets[i], query.tolist(), picked.tolist(), focal)
        count = len(targets[i]["boxes"])
        best = min(
            total_cost(logits[i], boxes[i], targets[i], queries, range(count), focal)
            for queries in itertools.permutations(range(5), count)
        )
        assert ours == pytest.approx(best, abs=1e-5)


def test_layers_are_matched_on_their_own():
    first, second = random_predictions(seed=0), random_predictions(seed=5)
    targets = targets_of(3, 2)
    both = match(torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]]), targets, 1, 5, 2)
    for layer, (logits, boxes) in enumerate((first, second)):
        alone = match(logits[None], boxes[None], targets, 1, 5, 2)[0]
        for (q, t), (q2, t2) in zip(both[layer], alone):
            assert q.tolist() == q2.tolist()
            assert t.tolist() == t2.tolist()


def test_more_objects_than_queries_leaves_objects_unmatched():
    logits, boxes = random_predictions(batch=1)
    (query, picked), *_ = match(logits[None], boxes[None], targets_of(9), 1, 5, 2)[0]
    assert len(query) == len(picked) == 5
    loss, _ = detection_loss(logits, boxes, targets_of(9), CONFIG)
    assert torch.isfinite(loss)


def test_images_without_objects_give_a_classification_loss_only():
    logits, boxes = random_predictions()
    loss, terms = detection_loss(logits, boxes, targets_of(0, 0), CONFIG)
    assert terms["loss_bbox"] == terms["loss_giou"] == 0
    nothing = torch.full((2, 5), 4)
    weight = torch.tensor([1.0, 1, 1, 1, 0.1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), nothing, weight))


def test_terms_equal_a_plain_computation():
    logits, boxes = random_predictions()
    targets = targets_of(3, 2)
    _, terms = detection_loss(logits, boxes, targets, CONFIG)
    matches = match(logits[None], boxes[None], targets, 1, 5, 2)[0]
    wanted = torch.full((2, 5), 4)
    distance = overlap = 0.0
    for i, (query, picked) in enumerate(matches):
        wanted[i, query] = targets[i]["class_labels"][picked]
        ours, theirs = boxes[i, query], targets[i]["boxes"][picked]
        distance += (ours - theirs).abs().sum()
        overlap += (1 - generalized_box_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(theirs)).diag()).sum()
    weight = torch.tensor([1.0, 1, 1, 1, 0.1])
    torch.testing.assert_close(terms["loss_ce"], F.cross_entropy(logits.transpose(1, 2), wanted, weight))
    torch.testing.assert_close(terms["loss_bbox"], distance / 5)
    torch.testing.assert_close(terms["loss_giou"], overlap / 5)


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_focal_loss_equals_torchvisions_summed_over_all_pairs_of_query_and_class(alpha):
    logits, boxes = random_predictions()
    targets = targets_of(3, 2)
    config = ConditionalDetrConfig(num_labels=5, focal_alpha=alpha)
    _, terms = detection_loss(logits, boxes, targets, config)
    wanted = torch.zeros_like(logits)
    for i, (query, picked) in enumerate(match(logits[None], boxes[None], targets, 2, 5, 2, focal=True)[0]):
        wanted[i, query, targets[i]["class_labels"][picked]] = 1
    assert wanted.sum() == 5
    expected = sigmoid_focal_loss(logits, wanted, alpha=alpha, reduction="sum") / 5
    torch.testing.assert_close(terms["loss_ce"], expected)


def test_focal_loss_of_images_without_objects_counts_one_box():
    logits, boxes = random_predictions()
    loss, _ = detection_loss(logits, boxes, targets_of(0, 0), FOCAL)
    nothing = torch.zeros_like(logits)
    torch.testing.assert_close(loss, 2 * sigmoid_focal_loss(logits, nothing, reduction="sum"))


@pytest.mark.parametrize("weight", [2, 0.5])
def test_the_focal_loss_has_the_configured_weight_in_every_layer(weight):
    logits, boxes = random_predictions()
    earlier = dict(zip(("logits", "pred_boxes"), random_predictions(seed=4)))
    config = ConditionalDetrConfig(num_labels=5, cls_loss_coefficient=weight)
    loss, terms = detection_loss(logits, boxes, targets_of(3, 2), config, [earlier])
    weights = {"loss_ce": weight, "loss_bbox": 5, "loss_giou": 2}
    expected = sum(w * (terms[name] + terms[f"{name}_0"]) for name, w in weights.items())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
def test_half_precision_predictions_are_matched_and_weighed_in_float32(config):
    logits, boxes = random_predictions()
    loss, _ = detection_loss(logits.bfloat16(), boxes.bfloat16(), targets_of(3, 2), config)
    expected, _ = detection_loss(
        logits.bfloat16().float(), boxes.bfloat16().float(), targets_of(3, 2), config
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_values_that_are_not_finite_are_refused():
    logits, boxes = random_predictions()
    boxes[0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        detection_loss(logits, boxes, targets_of(3, 2), CONFIG)


def test_a_wrong_number_of_labels_is_named():
    logits, boxes = random_predictions()
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        detection_loss(logits, boxes, targets_of(3), CONFIG)


FAMILIES = {
    "detr-resnet": "DetrForObjectDetection",
    "conditional-": "ConditionalDetrForObjectDetection",
    "deformable-": "DeformableDetrForObjectDetection",
}
FAST = "deformable-detr-with-box-refine-two-stage"  # which has every term there is
ORIGINALS = [
    pytest.param(
        f.name,
        "DetrForSegmentation" if "panoptic" in f.name else task_class,
        marks=() if f.name == FAST else pytest.mark.slow,
    )
    for prefix, task_class in FAMILIES.items()
    for f in sorted((GOLDEN / "original").glob(f"{prefix}*"))
]


@needs_golden
@pytest.mark.parametrize(("name", "class_name"), ORIGINALS)
def test_matching_losses_and_gradients_equal_the_originals(name, class_name, tmp_path):
    from detrkit.checkpoints.conversion import convert_checkpoint

    case = golden_case(f"original/{name}")
    weights = golden_weights(case)
    torch.save({"model": weights}, tmp_path / "original.pth")
    convert_checkpoint(
        tmp_path / "original.pth", tmp_path / "out", name.removesuffix("-learned"), verify=False
    )
    model = getattr(detrkit, class_name).from_pretrained(tmp_path / "out", auxiliary_loss=True)
    targets = golden_targets()
    outputs = model(*golden_batch(), labels=targets)
    expected = case["losses"]
    for term, value in expected["terms"].items():
        assert outputs.loss_dict[term].item() == pytest.approx(value, rel=1e-4), term
    assert outputs.loss.item() == pytest.approx(expected["total"], rel=1e-4)
    config = model.config
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    focal = config.model_type != "detr"
    predictions = outputs
    if "two-stage" in name:
        predictions = in_the_order_of(outputs, torch.from_numpy(case["outputs"]["pred_boxes"]))
    logits, boxes = predictions["logits"][None], predictions["pred_boxes"][None]
    for i, (query, picked) in enumerate(match(logits, boxes, targets, *costs, focal=focal)[0]):
        assert query.tolist() == case["outputs"][f"match{i}_query"].tolist()
        assert picked.tolist() == case["outputs"][f"match{i}_target"].tolist()

    outputs.loss.backward()
    architecture = read_architecture(weights)
    squares = defaultdict(float)
    for ours, parameter in model.named_parameters():
        if parameter.grad is not None:
            theirs, _ = original_name(ours, architecture)
            squares[theirs] += parameter.grad.double().square().sum().item()
    norms = expected["grad_norms"]
    # Heads that layers share have the name of one of their places there.
    for theirs in squares.keys() - norms.keys():
        squares[f"transformer.decoder.{theirs}"] = squares.pop(theirs)
    assert squares.keys() == norms.keys()
    # The first layer's queries attend to zeros: gradients of its projections are zero but for rounding.
    rounding = 1e-7 * max(norms.values())
    for theirs, norm in norms.items():
        assert squares[theirs] ** 0.5 == pytest.approx(norm, rel=1e-3, abs=rounding), theirs
