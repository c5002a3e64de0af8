"""The set criterion: losses of matched predictions (section 3.1 of the DETR paper; ``models/detr.py``).

A configuration with ``focal_alpha`` (Conditional and Deformable DETR) gets the focal loss over a sigmoid for
each class, any other (DETR) the cross-entropy of a softmax whose last class is no-object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from detrkit.losses.boxes import cxcywh_to_xyxy, generalized_iou
from detrkit.losses.matcher import Match, Targets, match

FOCAL_GAMMA = 2  # the paper's exponent (Lin et al., 2017)
MASK_FOCAL_ALPHA = 0.25  # weight of a mask's pixels against the rest

# The mask logits (matches, height, width) of the last layer's queries, given the image and the query of each
# match, both (matches,) and sorted by image.
MatchedMasks: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def detection_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    config: Any,
    auxiliary: list[dict[str, Tensor]] | None = None,
    predict_masks: MatchedMasks | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Classification, L1 and generalised IoU losses of the last layer and of the auxiliary ones.

    With ``predict_masks`` also the focal and dice losses of the last layer's masks.

    Args:
        logits: (batch, queries, classes), for DETR with the no-object class last.
        boxes: (batch, queries, 4) cxcywh, normalised.
        targets: An image each: ``class_labels`` (objects,) and ``boxes`` (objects, 4) cxcywh, normalised.
        config: Gives the costs of the matching, the weights of the losses, and ``focal_alpha`` or else
            ``eos_coefficient``.
        auxiliary: ``logits`` and ``pred_boxes`` of the earlier decoder layers, first layer first.
        predict_masks: Gives the masks of matched queries; the targets then need ``masks`` (objects, height,
            width), padded as the images are.

    Returns:
        The weighted total, and every term by the original's name, unweighted: ``loss_ce``, ``loss_bbox``,
        ``loss_giou`` and the logging terms ``class_error`` (percent) and ``cardinality_error``; those of
        auxiliary layer i end in ``_i``. ``loss_mask`` and ``loss_dice`` where there are masks.

    Raises:
        ValueError: The number of targets is not the batch size, or they have no masks.
        FloatingPointError: A prediction or target is not finite.
    """
    if len(targets) != logits.shape[0]:
        raise ValueError(f"{logits.shape[0]} images but {len(targets)} labels; give one dict an image")
    masks = [] if predict_masks is None else _target_masks(targets)
    auxiliary = auxiliary or []
    # Layers on the first axis, the last layer first: it keeps index 0 whatever else there is.
    all_logits = torch.stack([logits, *(a["logits"] for a in auxiliary)]).float()
    all_boxes = torch.stack([boxes, *(a["pred_boxes"] for a in auxiliary)]).float()
    targets = [{k: t[k].to(logits.device) for k in ("class_labels", "boxes")} for t in targets]
    focal_alpha: float | None = getattr(config, "focal_alpha", None)
    focal = focal_alpha is not None
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    matches = match(all_logits, all_boxes, targets, *costs, focal=focal)
    index = _MatchIndex(matches, targets, logits.device)

    count = mean_box_count(targets, logits.device)
    if focal_alpha is not None:
        classification = _focal_loss(all_logits, index, count, focal_alpha)
    else:
        classification = _softmax_loss(all_logits, index, config.eos_coefficient)
    terms = {"loss_ce": classification, **_box_losses(all_boxes, index, count)}
    weights = {
        "loss_ce": config.cls_loss_coefficient if focal else 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
    }
    total = sum(weights[name] * values.sum() for name, values in terms.items())
    with torch.no_grad():
        terms["cardinality_error"] = _cardinality_error(all_logits, targets)
        class_error = _class_error(all_logits[0], index)
    loss_dict = {name: values[0] for name, values in terms.items()}
    if predict_masks is not None:
        mask_terms = _mask_losses(predict_masks, masks, index, count)
        total = total + config.mask_loss_coefficient * mask_terms["loss_mask"]
        total = total + config.dice_loss_coefficient * mask_terms["loss_dice"]
        loss_dict.update(mask_terms)
    loss_dict["class_error"] = class_error
    for i in range(len(auxiliary)):
        loss_dict.update({f"{name}_{i}": values[i + 1] for name, values in terms.items()})
    return total, loss_dict


def proposal_loss(
    logits: Tensor, boxes: Tensor, targets: Targets, config: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a two-stage model's proposals, which only tell objects from background.

    Args:
        logits: (batch, proposals, classes), of which the first class stands for any object.
        boxes: (batch, proposals, 4) cxcywh, normalised.
        targets: As for :func:`detection_loss`; the classes do not count.
        config: As for :func:`detection_loss`.

    Returns:
        As :func:`detection_loss`; the names end in ``_enc``.
    """
    binary = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in targets]
    total, terms = detection_loss(logits, boxes, binary, config)
    # The original logs the class error of the decoder's last layer only.
    return total, {f"{name}_enc": value for name, value in terms.items() if name != "class_error"}


def mean_box_count(targets: Targets, device: torch.device) -> Tensor:
    """The number of targets that losses are divided by: the mean over processes, at least 1."""
    count = torch.tensor(float(sum(len(t["class_labels"]) for t in targets)), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


class _MatchIndex:
    """The matches of all layers and images as flat indices, so that losses need no loops.

    Attributes:
        layer: (matches,) layer of each match; ``image`` and ``query`` likewise, and ``target``, which counts
            on from image to image.
        labels: (matches,) class of the matched target.
        boxes: (matches, 4) box of the matched target, cxcywh, normalised.
    """

    def __init__(self, matches: list[list[Match]], targets: Targets, device: torch.device) -> None:
        places = []
        offsets = [0]
        for target in targets:
            offsets.append(offsets[-1] + len(target["class_labels"]))
        for layer, images in enumerate(matches):
            for image, (query, target_index) in enumerate(images):
                fixed = torch.tensor([[layer], [image]]).expand(2, len(query))
                places.append(torch.cat([fixed, query[None], target_index[None] + offsets[image]]))
        self.layer, self.image, self.query, self.target = torch.cat(places, dim=1).to(device)
        self.labels = torch.cat([t["class_labels"] for t in targets])[self.target]
        self.boxes = torch.cat([t["boxes"].float() for t in targets])[self.target]


def _softmax_loss(logits: Tensor, index: _MatchIndex, no_object_weight: float) -> Tensor:
    """Cross-entropy of each layer, queries without a match being no-object at a lower weight."""
    no_object = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=logits.device)
    wanted[index.layer, index.image, index.query] = index.labels
    weight = torch.where(wanted == no_object, no_object_weight, 1.0)
    surprise = -logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return (weight * surprise).sum((1, 2)) / weight.sum((1, 2))


def _focal_loss(logits: Tensor, index: _MatchIndex, count: Tensor, alpha: float) -> Tensor:
    """Focal loss of each layer, every class of every query on its own, divided by ``count``.

    Queries without a match should find no class.
    """
    wanted = torch.zeros_like(logits)
    wanted[index.layer, index.image, index.query, index.labels] = 1
    return _focal(logits, wanted, alpha).sum((1, 2, 3)) / count


def _focal(logits: Tensor, wanted: Tensor, alpha: float) -> Tensor:
    """The focal loss of each element; ``wanted`` is 0 or 1."""
    surprise = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    missed = logits.sigmoid() - wanted
    balance = alpha * wanted + (1 - alpha) * (1 - wanted)
    return balance * missed.abs() ** FOCAL_GAMMA * surprise


def _target_masks(targets: Targets) -> list[Tensor]:
    """The masks of all images in one size, zeros where an image has less: (objects, height, width) each."""
    if any("masks" not in target for target in targets):
        raise ValueError(
            "labels of a segmentation model need masks (objects, height, width), which the image processor "
            "makes with return_segmentation_masks=True"
        )
    masks = [target["masks"] for target in targets]
    height, width = (max(m.shape[d] for m in masks) for d in (-2, -1))
    return [F.pad(m, (0, width - m.shape[-1], 0, height - m.shape[-2])) for m in masks]


def _mask_losses(
    predict: MatchedMasks, targets: list[Tensor], index: _MatchIndex, count: Tensor
) -> dict[str, Tensor]:
    """Focal and dice losses of the last layer's matched masks, summed over them and divided by ``count``."""
    last = index.layer == 0
    logits = predict(index.image[last], index.query[last]).float()
    wanted = torch.cat(targets).to(logits.device)[index.target[last]].float()
    logits = F.interpolate(logits[:, None], size=wanted.shape[-2:], mode="bilinear")[:, 0].flatten(1)
    wanted = wanted.flatten(1)
    probabilities = logits.sigmoid()
    overlap = (probabilities * wanted).sum(1)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(1) + wanted.sum(1) + 1)
    return {
        "loss_mask": _focal(logits, wanted, MASK_FOCAL_ALPHA).mean(1).sum() / count,
        "loss_dice": dice.sum() / count,
    }


def _box_losses(boxes: Tensor, index: _MatchIndex, count: Tensor) -> dict[str, Tensor]:
    """L1 and generalised IoU losses of each layer, summed over matches and divided by ``count``."""
    ours = boxes[index.layer, index.image, index.query]
    distance = (ours - index.boxes).abs().sum(-1)
    missed = 1 - generalized_iou(cxcywh_to_xyxy(ours), cxcywh_to_xyxy(index.boxes))
    zeros = boxes.new_zeros(boxes.shape[0])
    return {
        "loss_bbox": zeros.index_add(0, index.layer, distance) / count,
        "loss_giou": zeros.index_add(0, index.layer, missed) / count,
    }


def _cardinality_error(logits: Tensor, targets: Targets) -> Tensor:
    """Mean difference between the number of predicted objects and of targets, for each layer.

    The originals of all three families count a query as an object unless its best class is the last one.
    """
    predicted = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    wanted = torch.tensor([len(t["class_labels"]) for t in targets], device=logits.device)
    return (predicted - wanted).abs().float().mean(-1)


def _class_error(logits: Tensor, index: _MatchIndex) -> Tensor:
    """Share of the last layer's matched queries whose class is wrong, in percent."""
    last = index.layer == 0
    if not bool(last.any()):
        return logits.new_tensor(100.0)
    right = logits[index.image[last], index.query[last]].argmax(-1) == index.labels[last]
    return 100 - 100 * right.float().mean()
