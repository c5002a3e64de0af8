"""Bipartite matching of object queries to targets (equation 1 of the DETR paper)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrkit.losses.boxes import cxcywh_to_xyxy, generalized_iou

Targets = Sequence[dict[str, Tensor]]
Match = tuple[Tensor, Tensor]

# Of the focal cost: the weight of a positive, and the exponent. The originals keep them fixed here, whatever
# the loss uses (``models/matcher.py`` of Conditional and Deformable DETR).
FOCAL_COST_ALPHA = 0.25
FOCAL_COST_GAMMA = 2


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    focal: bool = False,
) -> list[list[Match]]:
    """Assigns each target one query at the least total cost, for each layer and image on its own.

    The costs of all layers are one computation an image, in float32 whatever the predictions' type, and
    reach the CPU in one transfer.

    Args:
        logits: (layers, batch, queries, classes), for DETR with the no-object class last.
        boxes: (layers, batch, queries, 4) cxcywh, normalised.
        targets: An image each: ``class_labels`` (objects,) and ``boxes`` (objects, 4) cxcywh, normalised.
        class_cost: Weight of the cost of the target's class: its negative probability, or the focal cost.
        bbox_cost: Weight of the L1 distance.
        giou_cost: Weight of the (negative) generalised IoU.
        focal: Read the logits by a sigmoid each and use the focal cost, as Conditional and Deformable DETR
            do, instead of one softmax.

    Returns:
        ``result[layer][image]``: indices of queries (ascending) and of their targets, both int64 on the CPU.

    Raises:
        FloatingPointError: A prediction or target is not finite.
    """
    layers, batch, queries = logits.shape[:3]
    probabilities = logits.float().sigmoid() if focal else logits.float().softmax(-1)
    boxes = boxes.float()
    costs = []
    for image, target in enumerate(targets):
        wanted = target["boxes"].float()
        ours = boxes[:, image, :, None]
        probability = probabilities[:, image, :, target["class_labels"]]
        by_class = _focal_cost(probability) if focal else -probability
        by_distance = (ours - wanted).abs().sum(-1)
        by_overlap = -generalized_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(wanted))
        costs.append((bbox_cost * by_distance + class_cost * by_class + giou_cost * by_overlap).flatten())
    table = torch.cat(costs).cpu()
    if not torch.isfinite(table).all():
        raise FloatingPointError(
            "matching met a value that is not finite: check the boxes of the targets (width and height above "
            "zero) and the learning rate"
        )
    sizes = [len(target["boxes"]) for target in targets]
    per_image = [
        part.view(layers, queries, size).numpy()
        for part, size in zip(table.split([layers * queries * size for size in sizes]), sizes)
    ]
    return [[_assign(per_image[image][layer]) for image in range(batch)] for layer in range(layers)]


def _focal_cost(probability: Tensor) -> Tensor:
    """How much the focal loss grows when a class of this probability becomes right instead of wrong."""
    as_positive = -FOCAL_COST_ALPHA * (1 - probability) ** FOCAL_COST_GAMMA * (probability + 1e-8).log()
    as_negative = -(1 - FOCAL_COST_ALPHA) * probability**FOCAL_COST_GAMMA * (1 - probability + 1e-8).log()
    return as_positive - as_negative


def _assign(cost: object) -> Match:
    query, target = linear_sum_assignment(cost)
    return torch.as_tensor(query, dtype=torch.int64), torch.as_tensor(target, dtype=torch.int64)
