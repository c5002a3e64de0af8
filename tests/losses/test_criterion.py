"""Matching and set criterion, against plain recomputation."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_convert, box_iou, generalized_box_iou, sigmoid_focal_loss

from detrkit import ConditionalDetrConfig, DetrConfig
from detrkit.common.boxes import cxcywh_to_xyxy, generalized_iou, iou, xyxy_to_cxcywh
from detrkit.losses import matcher
from detrkit.losses.criterion import detection_loss
from detrkit.losses.matcher import PackedTargets, match

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
def test_iou_of_all_pairs_is_torchvisions(a, b):
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    torch.testing.assert_close(iou(a[:, None], b[None]), box_iou(a, b), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b), atol=1e-5, rtol=1e-5
    )


def matches_by_image(logits, boxes, targets, *costs, focal=False):
    """For each layer and image the matched queries, ascending, and their targets."""
    matches = match(logits, boxes, PackedTargets(targets, logits.device), *costs, focal=focal)
    first = [sum(len(t["boxes"]) for t in targets[:i]) for i in range(len(targets))]
    result = []
    for query, target in zip(matches.query, matches.target):
        images = [(query[own], target[own]) for own in (matches.image == i for i in range(len(targets)))]
        result.append([(q.sort().values, t[q.argsort()] - f) for (q, t), f in zip(images, first)])
    return result


def random_predictions(batch=2, queries=5, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, queries, classes + 1, generator=generator)
    boxes = torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.3
    return logits, boxes


def layered_predictions(layers, **options):
    """Logits and boxes (layers, batch, queries, ...)."""
    several = [random_predictions(seed=seed, **options) for seed in range(layers)]
    return tuple(torch.stack(part) for part in zip(*several))


def loss_of(logits, boxes, targets, config):
    """The loss of a single layer."""
    return detection_loss(logits[None], boxes[None], targets, config)


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
    matches = matches_by_image(logits[None], boxes[None], targets, 2 if focal else 1, 5, 2, focal=focal)[0]
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
    both = matches_by_image(
        torch.stack([first[0], second[0]]), torch.stack([first[1], second[1]]), targets, 1, 5, 2
    )
    for layer, (logits, boxes) in enumerate((first, second)):
        alone = matches_by_image(logits[None], boxes[None], targets, 1, 5, 2)[0]
        for (q, t), (q2, t2) in zip(both[layer], alone):
            assert q.tolist() == q2.tolist()
            assert t.tolist() == t2.tolist()


@pytest.mark.parametrize("focal", [False, True], ids=["softmax", "focal"])
def test_matching_does_not_depend_on_how_many_pairs_are_computed_at_once(focal, monkeypatch):
    predictions = layered_predictions(3, batch=4)
    targets = PackedTargets(targets_of(3, 0, 7, 1), predictions[0].device)
    together = match(*predictions, targets, 2, 5, 2, focal=focal)
    monkeypatch.setattr(matcher, "_PAIRS_AT_ONCE", 30)  # two targets with five queries in three layers
    for ours, expected in zip(match(*predictions, targets, 2, 5, 2, focal=focal), together):
        assert ours.tolist() == expected.tolist()


def test_more_objects_than_queries_leaves_objects_unmatched():
    logits, boxes = random_predictions(batch=1)
    (query, picked), *_ = matches_by_image(logits[None], boxes[None], targets_of(9), 1, 5, 2)[0]
    assert len(query) == len(picked) == 5
    loss, _ = loss_of(logits, boxes, targets_of(9), CONFIG)
    assert torch.isfinite(loss)


def test_images_without_objects_give_a_classification_loss_only():
    logits, boxes = random_predictions()
    loss, terms = loss_of(logits, boxes, targets_of(0, 0), CONFIG)
    assert terms["loss_bbox"] == terms["loss_giou"] == 0
    nothing = torch.full((2, 5), 4)
    weight = torch.tensor([1.0, 1, 1, 1, 0.1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.transpose(1, 2), nothing, weight))


def test_terms_equal_a_plain_computation():
    logits, boxes = random_predictions()
    targets = targets_of(3, 2)
    _, terms = loss_of(logits, boxes, targets, CONFIG)
    matches = matches_by_image(logits[None], boxes[None], targets, 1, 5, 2)[0]
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
    logits = (10 * logits).requires_grad_()
    targets = targets_of(3, 2)
    config = ConditionalDetrConfig(num_labels=5, focal_alpha=alpha)
    _, terms = loss_of(logits, boxes, targets, config)
    wanted = torch.zeros_like(logits)
    for i, (query, picked) in enumerate(
        matches_by_image(logits[None], boxes[None], targets, 2, 5, 2, focal=True)[0]
    ):
        wanted[i, query, targets[i]["class_labels"][picked]] = 1
    assert wanted.sum() == 5
    expected = sigmoid_focal_loss(logits, wanted, alpha=alpha, reduction="sum") / 5
    torch.testing.assert_close(terms["loss_ce"], expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (terms["loss_ce"], expected)]
    torch.testing.assert_close(*gradients)


def test_other_class_targets_are_refused_rather_than_taken_for_one():
    with pytest.raises(ValueError, match="class_targets must be 'one' or 'iou', not 'IoU'"):
        ConditionalDetrConfig(class_targets="IoU")
    with pytest.raises(ValueError, match="class_targets must be 'one', not 'iou'"):  # a softmax has no such
        DetrConfig(class_targets="iou")


def test_with_iou_targets_scores_are_trained_to_be_how_well_the_box_fits():
    logits, boxes = random_predictions()
    logits.requires_grad_()
    targets = targets_of(3, 2)
    config = ConditionalDetrConfig(num_labels=5, class_targets="iou")
    _, terms = loss_of(logits, boxes, targets, config)
    wanted, weight = torch.zeros_like(logits), 0.75 * logits.sigmoid() ** 2
    for i, (query, picked) in enumerate(
        matches_by_image(logits[None], boxes[None], targets, 2, 5, 2, focal=True)[0]
    ):
        pair = [cxcywh_to_xyxy(part) for part in (boxes[i, query], targets[i]["boxes"][picked])]
        fit = box_iou(*pair).diagonal()
        place = (i, query, targets[i]["class_labels"][picked])
        wanted[place], weight[place] = fit, 0.5 * fit
    assert (wanted > 0).any()
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    expected = (weight * entropy).sum() / 5
    torch.testing.assert_close(terms["loss_ce"], expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (terms["loss_ce"], expected)]
    torch.testing.assert_close(*gradients)


def test_focal_loss_of_images_without_objects_counts_one_box():
    logits, boxes = random_predictions()
    loss, _ = loss_of(logits, boxes, targets_of(0, 0), FOCAL)
    nothing = torch.zeros_like(logits)
    torch.testing.assert_close(loss, 2 * sigmoid_focal_loss(logits, nothing, reduction="sum"))


@pytest.mark.parametrize("weight", [2, 0.5])
def test_the_focal_loss_has_the_configured_weight_in_every_layer(weight):
    config = ConditionalDetrConfig(num_labels=5, cls_loss_coefficient=weight)
    loss, terms = detection_loss(*layered_predictions(2), targets_of(3, 2), config)
    weights = {"loss_ce": weight, "loss_bbox": 5, "loss_giou": 2}
    expected = sum(w * (terms[name] + terms[f"{name}_0"]) for name, w in weights.items())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
def test_half_precision_predictions_are_matched_and_weighed_in_float32(config):
    logits, boxes = random_predictions()
    loss, _ = loss_of(logits.bfloat16(), boxes.bfloat16(), targets_of(3, 2), config)
    expected, _ = loss_of(logits.bfloat16().float(), boxes.bfloat16().float(), targets_of(3, 2), config)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
def test_autocast_changes_nothing(config, dtype):
    predictions, targets = layered_predictions(2), targets_of(3, 0)
    with torch.autocast("cpu", dtype):
        loss, terms = detection_loss(*predictions, targets, config)
    expected, expected_terms = detection_loss(*predictions, targets, config)
    assert loss == expected
    assert terms == expected_terms


@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
@pytest.mark.parametrize("counts", [(0, 0, 0), (2, 0, 3), (0, 4, 0), (1, 8, 0), (9, 9, 9)])
def test_layers_and_images_together_lose_what_they_lose_alone(config, counts):
    logits, boxes = layered_predictions(3, batch=3)
    targets = targets_of(*counts)
    total, terms = detection_loss(logits, boxes, targets, config)
    alone = [loss_of(logits[i], boxes[i], targets, config) for i in range(3)]
    torch.testing.assert_close(total, sum(loss for loss, _ in alone))
    for layer, suffix in enumerate(("_0", "_1", "")):
        for name, value in alone[layer][1].items():
            if name != "class_error" or not suffix:
                torch.testing.assert_close(terms[name + suffix], value)
    distance = 0.0
    for i in range(3):
        _, image_terms = loss_of(logits[-1, i : i + 1], boxes[-1, i : i + 1], targets[i : i + 1], config)
        distance += image_terms["loss_bbox"] * max(1, counts[i])
    torch.testing.assert_close(terms["loss_bbox"], distance / max(1, sum(counts)))


@pytest.mark.parametrize("counts", [(3, 2), (9, 7)], ids=["fewer targets than queries", "more"])
def test_mask_losses_are_of_the_last_layers_matches(counts):
    logits, boxes = layered_predictions(2)
    generator = torch.Generator().manual_seed(2)
    masks = torch.randn(2, 5, 4, 6, generator=generator)  # of the last layer's queries
    targets = targets_of(*counts)
    for target in targets:
        target["masks"] = torch.rand(len(target["boxes"]), 4, 6, generator=generator) > 0.5
    asked = []

    def predict_masks(image, query):
        asked.append(query)
        return masks[image, query]

    _, terms = detection_loss(logits, boxes, targets, CONFIG, predict_masks)
    _, alone = detection_loss(logits[1:], boxes[1:], targets, CONFIG, predict_masks)
    first = match(logits, boxes, PackedTargets(targets, logits.device), 1, 5, 2, focal=False).query[0]
    assert asked[0].tolist() == asked[1].tolist() != first.tolist()
    for name in ("loss_mask", "loss_dice"):
        torch.testing.assert_close(terms[name], alone[name])


def test_class_error_is_the_share_of_wrong_classes_among_matched_queries_of_the_last_layer():
    targets = targets_of(2, 2)
    boxes = torch.stack([t["boxes"] for t in targets])[None].repeat(2, 1, 1, 1)
    logits = F.one_hot(torch.stack([t["class_labels"] for t in targets]), 5)[None].repeat(2, 1, 1, 1) * 9.0
    logits[0] = -logits[0]  # an earlier layer does not count
    logits[1, 1, 0] = logits[1, 1, 0].roll(1)
    _, terms = detection_loss(logits, boxes, targets, CONFIG)
    assert terms["class_error"] == 25


def test_cardinality_error_counts_queries_whose_best_class_is_not_the_last():
    logits, boxes = torch.zeros(1, 2, 5, 5), layered_predictions(1)[1]
    logits[..., 4] = 1
    logits[0, 0, :4, 2] = 3  # 4 objects of 3
    logits[0, 1, 0, 1] = 3  # 1 of 4
    _, terms = detection_loss(logits, boxes, targets_of(3, 4), CONFIG)
    assert terms["cardinality_error"] == 2


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
@pytest.mark.parametrize(
    ("which", "place", "value", "fault"),
    [
        ("boxes", (0, 1, 0, 0), NAN, "loss_bbox and loss_giou of image_id 42 (predicted boxes)"),
        ("logits", (0, 0, 3, 1), NAN, "loss_ce of image 0 of the batch (predicted logits)"),
        ("logits", (1, 1, 2, 4), INFINITE, "loss_ce of image_id 42 (predicted logits)"),
        ("logits", (1, 2, 0, 0), -INFINITE, "loss_ce of image 2 of the batch (predicted logits)"),
        ("target", (1, 2), NAN, "loss_bbox and loss_giou of image_id 42 (boxes of the target)"),
    ],
)
def test_an_error_names_term_image_and_side_of_what_is_not_finite(config, which, place, value, fault):
    logits, boxes = layered_predictions(2, batch=3)
    targets = targets_of(3, 2, 0)
    targets[1]["image_id"] = torch.tensor([42])
    {"boxes": boxes, "logits": logits, "target": targets[1]["boxes"]}[which][place] = value
    with pytest.raises(FloatingPointError) as caught:
        detection_loss(logits, boxes, targets, config)
    assert str(caught.value).startswith(f"not finite: {fault}. Correct")


def test_boxes_that_both_lack_an_area_are_laid_to_the_target():
    logits, boxes = layered_predictions(1)
    targets = targets_of(3, 2)
    boxes[0, 1, 0, 2:] = targets[1]["boxes"][0, 2:] = 0
    targets[1]["boxes"][0, :2] = boxes[0, 1, 0, :2]
    with pytest.raises(FloatingPointError, match=r"loss_giou of image 1 .*without width or height"):
        detection_loss(logits, boxes, targets, CONFIG)


def test_a_diverged_run_names_a_few_images_only():
    logits, boxes = layered_predictions(1, batch=8)
    with pytest.raises(FloatingPointError, match=r"image 4 of the batch \(predicted logits\); and 3 more"):
        detection_loss(logits * NAN, boxes, targets_of(*[1] * 8), CONFIG)


def test_predicted_boxes_of_an_image_without_objects_do_not_count():
    logits, boxes = layered_predictions(1)
    boxes[0, 1] = NAN
    loss, _ = detection_loss(logits, boxes, targets_of(3, 0), CONFIG)
    assert torch.isfinite(loss)


class ValuesRead(TorchDispatchMode):
    """Notes the operations which wait for a device, as their result or its shape depends on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = [i for arg in args if isinstance(arg, (list, tuple)) for i in arg]
        by_mask = "aten.index" in str(function) and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices
        )
        if by_mask or any(
            name in str(function)
            for name in ("local_scalar", "nonzero", "masked_select", "repeat_interleave.Tensor")
        ):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
def test_no_operation_waits_for_values_of_a_device(config):
    logits, boxes = (part.requires_grad_() for part in layered_predictions(3))
    with ValuesRead() as read:
        detection_loss(logits, boxes, targets_of(3, 2), config)[0].backward()
    assert read.found == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
def test_a_gpu_is_waited_for_once(config):
    logits, boxes = (part.cuda().requires_grad_() for part in layered_predictions(3))
    targets = targets_of(3, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss, _ = detection_loss(logits, boxes, targets, config)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1, [f"{w.filename}:{w.lineno}" for w in waits]
    expected, _ = detection_loss(logits.cpu(), boxes.cpu(), targets, config)
    torch.testing.assert_close(loss.cpu(), expected)


@pytest.mark.parametrize("config", [CONFIG, FOCAL], ids=["softmax", "focal"])
def test_a_compiled_loss_breaks_its_graph_at_the_assignment_only(config):
    predictions = [part.requires_grad_() for part in layered_predictions(2)]
    targets = targets_of(3, 0)

    def loss_of_logits(logits, boxes):
        return detection_loss(logits, boxes, targets, config)[0]

    torch._dynamo.reset()
    explained = torch._dynamo.explain(loss_of_logits)(*predictions)
    assert explained.break_reasons  # one for each function on the way to the assignment
    assert all("function _assign" in reason.reason for reason in explained.break_reasons)
    compiled = torch.compile(loss_of_logits, backend="aot_eager")
    results = []
    for function in (compiled, loss_of_logits):
        loss = function(*predictions)
        results.append((loss, *torch.autograd.grad(loss, predictions)))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected)


def test_an_image_with_more_classes_than_boxes_is_named():
    targets = targets_of(3, 2)
    targets[1]["class_labels"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="image 1 of the batch has 4 class_labels but 2 boxes"):
        loss_of(*random_predictions(), targets, CONFIG)


def test_a_wrong_number_of_labels_is_named():
    logits, boxes = random_predictions()
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        loss_of(logits, boxes, targets_of(3), CONFIG)


@pytest.mark.parametrize("config", [DetrConfig(), ConditionalDetrConfig()], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("label", [-1, 4, 9])
def test_a_class_that_the_model_does_not_have_is_named(config, label):
    logits, boxes = layered_predictions(2, classes=3 + isinstance(config, DetrConfig))
    targets = targets_of(3, 2)
    targets[1]["class_labels"][1] = label
    message = f"image 1 of the batch has an object of class {label}, and the model has 4 classes, 0 to 3"
    with pytest.raises(ValueError, match=message):
        detection_loss(logits, boxes, targets, config)


def test_boxes_in_pixels_are_refused():
    logits, boxes = layered_predictions(1)
    targets = targets_of(3, 2)
    targets[1]["image_id"] = torch.tensor([42])
    targets[1]["boxes"] *= 640
    with pytest.raises(ValueError, match=r"image_id 42 has a box .* not in pixels"):
        detection_loss(logits, boxes, targets, CONFIG)
    targets[1]["boxes"] /= 160  # an object that is four times as large as the crop of its image
    assert detection_loss(logits, boxes, targets, CONFIG)[0].isfinite()
