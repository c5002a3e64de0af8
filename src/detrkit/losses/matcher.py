"""Bipartite matching of object queries to targets (equation 1 of the DETR paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detrkit.common.boxes import cxcywh_to_xyxy, generalized_iou
from detrkit.common.schema import Target

Targets: TypeAlias = Sequence[Target]

# Of the focal cost: the weight of a positive, and the exponent. The originals keep them fixed here, whatever
# the loss uses (``models/matcher.py`` of Conditional and Deformable DETR).
FOCAL_COST_ALPHA = 0.25
FOCAL_COST_GAMMA = 2

# Pairs of target and query that costs are computed of at once: caches are small, and two-stage models have
# thousands of queries.
_PAIRS_AT_ONCE = 2**18

# Fractions of an image: of an object that was cropped and not clipped they can exceed 1, but not by so much.
_LARGEST_COORDINATE = 10

_NAMED_FAULTS = 5  # that an error lists; when a run diverges, every image has some


class PackedTargets:
    """The targets of a batch in a row, so that costs and losses need no loop over images.

    Attributes:
        labels: (targets,) class of each.
        boxes: (targets, 4) float32, cxcywh, normalised.
        image: (targets,) the image of the batch that each belongs to.
        sizes: Number of targets of each image, which is known without asking the device.

    Raises:
        ValueError: The numbers of classes and boxes of an image differ.
    """

    def __init__(self, targets: Targets, device: torch.device) -> None:
        self._ids = [target.get("image_id") for target in targets]
        self.sizes = [len(target["class_labels"]) for target in targets]
        for image, target in enumerate(targets):
            if len(target["boxes"]) != self.sizes[image]:
                found = f"{self.sizes[image]} class_labels but {len(target['boxes'])} boxes"
                raise ValueError(f"{self.names[image]} has {found}")
        self.labels = torch.cat([send(target["class_labels"], device) for target in targets])
        self.boxes = torch.cat([send(target["boxes"], device) for target in targets]).float()
        images = [image for image, size in enumerate(self.sizes) for _ in range(size)]
        self.image = send(torch.tensor(images, dtype=torch.int64), device)

    @property
    def extremes(self) -> Tensor:
        """(3,) float32: the least and the greatest class, and the greatest coordinate."""
        if not len(self.labels):
            return self.boxes.new_zeros(3)
        labels = self.labels.float()
        return torch.stack([labels.min(), labels.max(), self.boxes.max()])

    def check(self, extremes: np.ndarray, classes: int) -> None:
        """Raises a ValueError where the extremes are none of targets for so many classes."""
        least, greatest, coordinate = extremes.tolist()
        if least < 0 or greatest >= classes:
            wrong = int(least if least < 0 else greatest)
            raise ValueError(
                f"{self._image_with(self.labels == wrong)} has an object of class {wrong}, and the model has "
                f"{classes} classes, 0 to {classes - 1}; class_labels count from 0"
            )
        if coordinate > _LARGEST_COORDINATE:
            raise ValueError(
                f"{self._image_with((self.boxes == coordinate).any(1))} has a box with the coordinate "
                f"{coordinate:g}: boxes are (centre x, centre y, width, height) in fractions of the image, "
                "not in pixels"
            )

    def _image_with(self, is_meant: Tensor) -> str:
        """The name of the image of the first target that is meant."""
        return self.names[int(self.image[is_meant][0])]

    @property
    def names(self) -> list[str]:
        """What errors call each image: its ``image_id`` where the targets have one, or else its place.

        Reading it waits for the device.
        """
        return [
            f"image {place} of the batch" if image_id is None else f"image_id {int(image_id)}"
            for place, image_id in enumerate(self._ids)
        ]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor without waiting for the device's work, as far as that is safe."""
    return tensor.to(device, non_blocking=device.type != "cpu")


class Matches(NamedTuple):
    """Which query of each layer has which target.

    An image has as many matches as it has targets, or as there are queries where those are fewer.

    Attributes:
        image: (matches,) ascending, the same in all layers.
        query: (layers, matches).
        target: (layers, matches) in the row of :class:`PackedTargets`, ascending.
    """

    image: Tensor
    query: Tensor
    target: Tensor


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    *,
    focal: bool,
) -> Matches:
    """Assigns one query to each target with the lowest total cost, separately for each layer and image.

    Costs are computed for all layers together, of each target and the queries of its own image, in float32
    whatever the predictions' type, and reach the CPU in one transfer.

    Args:
        logits: (layers, batch, queries, classes), for DETR with the no-object class last.
        boxes: (layers, batch, queries, 4) cxcywh, normalised.
        targets: Those of the batch.
        class_cost: Weight of the cost of the target's class: its negative probability, or the focal cost.
        bbox_cost: Weight of the L1 distance.
        giou_cost: Weight of the (negative) generalised IoU.
        focal: Read the logits by a sigmoid each and use the focal cost, as Conditional and Deformable DETR
            do, instead of one softmax.

    Returns:
        The matches, on the predictions' device. Where an image has more targets than queries, some targets
        stay without.

    Raises:
        FloatingPointError: A logit, or the cost of a match, is not finite.
        ValueError: A target has a class that the model does not have, or its boxes are in pixels.
    """
    logits, boxes = logits.float(), boxes.float()
    classes = logits.shape[-1] - (not focal)
    # A class that the model does not have is looked up as another one, until the transfer shows it.
    known = targets.labels.clamp(0, classes - 1)
    scores = logits if focal else logits.softmax(-1)
    corners = cxcywh_to_xyxy(boxes)
    some = max(1, _PAIRS_AT_ONCE // (logits.shape[0] * logits.shape[2]))
    row = zip(*(part.split(some) for part in (targets.image, known, targets.boxes)))
    # (layers, targets, queries): in this order the solver needs no copy.
    costs = torch.cat(
        [
            _class_costs(scores, image, labels, focal).mul_(class_cost)
            + _distances(boxes, image, wanted).mul_(bbox_cost)
            - _overlaps(corners, image, wanted).mul_(giou_cost)
            for image, labels, wanted in row
        ],
        dim=1,
    )
    # Not all logits have a part in the costs, so a sum of each image's goes with them.
    transferred = torch.cat([costs.flatten(), logits.sum((0, 2, 3)), targets.extremes]).cpu()
    query, target = send(_assign(transferred, logits, boxes, targets, classes), boxes.device)
    return Matches(targets.image[target[0]], query, target)


def _class_costs(scores: Tensor, image: Tensor, labels: Tensor, focal: bool) -> Tensor:
    """The cost of some targets' classes, of logits (focal) or probabilities: (layers, targets, queries)."""
    every_query = torch.arange(scores.shape[2], device=scores.device)
    score = scores[:, image[:, None], every_query, labels[:, None]]
    if not focal:
        return score.neg_()
    # How much the focal loss grows when a class of this probability becomes right instead of wrong.
    probability = score.sigmoid_()
    missing = 1 - probability
    as_positive = FOCAL_COST_ALPHA * missing**FOCAL_COST_GAMMA * (probability + 1e-8).log_()
    as_negative = (1 - FOCAL_COST_ALPHA) * probability**FOCAL_COST_GAMMA * (missing + 1e-8).log_()
    return as_negative.sub_(as_positive)


def _distances(boxes: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
    """L1 distances of some targets' boxes: (layers, targets, queries)."""
    ours = _planes(boxes, image)
    total = torch.zeros_like(ours[..., 0])
    for coordinate, values in enumerate(ours.unbind(-1)):
        total += (values - wanted[:, None, coordinate]).abs_()
    return total


def _overlaps(corners: Tensor, image: Tensor, wanted: Tensor) -> Tensor:
    """Generalised IoU with some targets' boxes (cxcywh): (layers, targets, queries)."""
    return generalized_iou(_planes(corners, image), cxcywh_to_xyxy(wanted)[:, None])


def _planes(boxes: Tensor, image: Tensor) -> Tensor:
    """The boxes (layers, batch, queries, 4) of some images: (layers, images, queries, 4).

    In memory the values of a coordinate are contiguous, which is several times as fast to compute with.
    """
    return boxes.movedim(-1, 0).contiguous().index_select(2, image).movedim(0, -1)


@torch.compiler.disable
def _assign(
    transferred: Tensor, logits: Tensor, boxes: Tensor, targets: PackedTargets, classes: int
) -> Tensor:
    """Solves what was transferred: (2, layers, matches) indices of queries and targets."""
    table, extremes = np.split(transferred.numpy(), [-3])
    targets.check(extremes, classes)
    layers, batch, queries = logits.shape[:3]
    if not np.isfinite(table).all():
        raise FloatingPointError(_name_faults(logits, boxes, targets))
    costs = table[:-batch].reshape(layers, len(targets.boxes), queries)
    ends = np.cumsum(targets.sizes)
    pairs = np.empty((2, layers, sum(min(size, queries) for size in targets.sizes)), dtype=np.int64)
    for layer in range(layers):
        start = 0
        for end, size in zip(ends, targets.sizes):
            target, query = linear_sum_assignment(costs[layer, end - size : end])
            stop = start + len(query)
            pairs[:, layer, start:stop] = query, target + end - size
            start = stop
    return torch.from_numpy(pairs)


def _name_faults(logits: Tensor, boxes: Tensor, targets: PackedTargets) -> str:
    """The message once something is known not to be finite: what, in which images, for which loss terms."""
    faults = []
    own_boxes = targets.boxes.split(targets.sizes)
    for image, name in enumerate(targets.names):
        if not own_boxes[image].isfinite().all():
            faults.append(f"loss_bbox and loss_giou of {name} (boxes of the target)")
        if not logits[:, image].isfinite().all():
            faults.append(f"loss_ce of {name} (predicted logits)")
        if targets.sizes[image] and not boxes[:, image].isfinite().all():
            faults.append(f"loss_bbox and loss_giou of {name} (predicted boxes)")
    if not faults:
        flat = [name for name, own in zip(targets.names, own_boxes) if (own[:, 2:] <= 0).any()]
        faults = [f"loss_giou of {name} (boxes of the target without width or height)" for name in flat]
    more = f"; and {len(faults) - _NAMED_FAULTS} more" if len(faults) > _NAMED_FAULTS else ""
    return (
        f"not finite: {'; '.join(faults[:_NAMED_FAULTS])}{more}. Correct the boxes of targets; where "
        "predictions are at fault, lower the learning rate or train in float32"
    )
