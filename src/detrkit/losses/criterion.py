"""The set criterion: losses of matched predictions (section 3.1 of the DETR paper; ``models/detr.py``).

A configuration with ``focal_alpha`` (Conditional and Deformable DETR) gets the focal loss over a sigmoid for
each class, any other (DETR) the cross-entropy of a softmax whose last class is no-object. With
``class_targets="iou"`` in its configuration, which no original has, a sigmoid's score is trained to be how
well the box fits instead of 1 (the varifocal loss of Zhang et al., 2021), so that boxes rank by quality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from detrkit.common.boxes import cxcywh_to_xyxy, generalized_iou, iou
from detrkit.common.schema import Target
from detrkit.losses.matcher import PackedTargets, Targets, match, send

if TYPE_CHECKING:
    from detrkit.models.configuration import DetrFamilyConfig

FOCAL_GAMMA = 2  # the paper's exponent (Lin et al., 2017)
MASK_FOCAL_ALPHA = 0.25  # weight of a mask's pixels against the rest

# The mask logits (matches, height, width) of the last layer's queries, given the image and the query of each
# match, both (matches,) and sorted by image.
MatchedMasks: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def detection_loss(
    logits: Tensor,
    boxes: Tensor,
    targets: Targets,
    config: DetrFamilyConfig,
    predict_masks: MatchedMasks | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Classification, L1 and generalised IoU losses of all decoder layers.

    All layers are one computation, and the transfer of the matching's costs is the only wait for the device.

    Args:
        logits: (layers, batch, queries, classes), from first to last layer; for DETR the last class is
            no-object.
        boxes: (layers, batch, queries, 4) cxcywh, normalised.
        targets: One for each image, with boxes cxcywh, normalised.
        config: Gives the costs of the matching and the weights of the losses.
        predict_masks: Gives the masks of matched queries, for mask losses; targets then need ``masks``.

    Returns:
        The weighted total, and every term by the original's name, unweighted: ``loss_ce``, ``loss_bbox``,
        ``loss_giou``, with masks ``loss_mask`` and ``loss_dice``, and for logging ``class_error`` (percent)
        and ``cardinality_error``; those of layer i before the last end in ``_i``.

    Raises:
        ValueError: The number of targets is not the batch size, or targets do not fit together.
        FloatingPointError: A prediction or target is not finite; the error names the terms and images.
    """
    layers, batch = logits.shape[:2]
    if len(targets) != batch:
        raise ValueError(f"{batch} images but {len(targets)} labels; pass one dict per image")
    masks = [] if predict_masks is None else _target_masks(targets)
    logits, boxes = logits.float(), boxes.float()
    packed = PackedTargets(targets, logits.device)
    focal_alpha: float | None = getattr(config, "focal_alpha", None)
    costs = (config.class_cost, config.bbox_cost, config.giou_cost)
    matches = match(logits, boxes, packed, *costs, focal=focal_alpha is not None)
    # A matched query's place, by layer, and its target's class and box.
    place = (torch.arange(layers, device=logits.device)[:, None], matches.image, matches.query)
    labels, wanted = packed.labels[matches.target], packed.boxes[matches.target]
    count = mean_box_count(targets, logits.device)
    if focal_alpha is not None and getattr(config, "class_targets", None) == "iou":
        fit = iou(cxcywh_to_xyxy(boxes[place].detach()), cxcywh_to_xyxy(wanted))
        classification = _varifocal_loss(logits, (*place, labels), fit, count, focal_alpha)
    elif focal_alpha is not None:
        classification = _focal_loss(logits, (*place, labels), count, focal_alpha)
    else:
        classification = _softmax_loss(logits, place, labels, config.eos_coefficient)
    terms = {"loss_ce": classification, **_box_losses(boxes[place], wanted, count)}
    weights = _weights(config)
    total = sum(weights[name] * values.sum() for name, values in terms.items())
    terms["cardinality_error"] = _cardinality_error(logits, packed)
    loss_dict = {name: values[-1] for name, values in terms.items()}
    if predict_masks is not None:
        mask_logits = predict_masks(matches.image, matches.query[-1]).float()
        mask_targets = send(torch.cat(masks), logits.device)[matches.target[-1]].float()
        mask_terms = _mask_losses(mask_logits, mask_targets, count)
        total = total + sum(weights[name] * value for name, value in mask_terms.items())
        loss_dict.update(mask_terms)
    loss_dict["class_error"] = _class_error(logits[place][-1], labels[-1])
    for i in range(layers - 1):
        loss_dict.update({f"{name}_{i}": values[i] for name, values in terms.items()})
    return total, loss_dict


def _weights(config: DetrFamilyConfig) -> dict[str, float]:
    """The weight of each term."""
    focal = getattr(config, "focal_alpha", None) is not None
    return {
        "loss_ce": config.cls_loss_coefficient if focal else 1.0,
        "loss_bbox": config.bbox_loss_coefficient,
        "loss_giou": config.giou_loss_coefficient,
        "loss_mask": config.mask_loss_coefficient,
        "loss_dice": config.dice_loss_coefficient,
    }


def proposal_loss(
    logits: Tensor, boxes: Tensor, targets: Targets, config: DetrFamilyConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a two-stage model's proposals, which only distinguish objects from background.

    Args:
        logits: (batch, proposals, classes), of which the first class stands for any object.
        boxes: (batch, proposals, 4) cxcywh, normalised.
        targets: As for :func:`detection_loss`; the classes do not count.
        config: As for :func:`detection_loss`.

    Returns:
        As :func:`detection_loss`; the names end in ``_enc``.
    """
    binary: list[Target] = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in targets]
    total, terms = detection_loss(logits[None], boxes[None], binary, config)
    # The original logs the class error of the decoder's last layer only.
    return total, {f"{name}_enc": value for name, value in terms.items() if name != "class_error"}


def mean_box_count(targets: Targets, device: torch.device) -> Tensor:
    """The number of targets that losses are divided by: the mean over processes, at least 1."""
    count = torch.full((), float(sum(len(t["class_labels"]) for t in targets)), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def _softmax_loss(
    logits: Tensor, place: tuple[Tensor, ...], labels: Tensor, no_object_weight: float
) -> Tensor:
    """Cross-entropy of each layer, queries without a match being no-object at a lower weight."""
    no_object = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=logits.device)
    wanted[place] = labels
    weight = torch.where(wanted == no_object, no_object_weight, 1.0)
    surprise = -logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
    return (weight * surprise).sum((1, 2)) / weight.sum((1, 2))


def _focal_loss(logits: Tensor, matched: tuple[Tensor, ...], count: Tensor, alpha: float) -> Tensor:
    """Focal loss of each layer, every class of every query on its own, divided by ``count``.

    ``matched`` is layer, image, query and class of what should be found, which has the weight ``alpha``.
    """
    rest = _UnwantedLogits.apply(logits, *matched)
    found = logits[matched]
    return ((1 - alpha) * rest + _focal(found, torch.ones_like(found), alpha).sum(1)) / count


def _varifocal_loss(
    logits: Tensor, matched: tuple[Tensor, ...], fit: Tensor, count: Tensor, alpha: float
) -> Tensor:
    """As :func:`_focal_loss`, but what should be found has the target ``fit`` and a weight in proportion.

    ``fit`` is the IoU of each match (layers, matches). The weight is at most 2 alpha: with alpha 1/4, it is
    1/2 beside 3/4 for the rest, which has been tried.
    """
    rest = _UnwantedLogits.apply(logits, *matched)
    found = F.binary_cross_entropy_with_logits(logits[matched], fit, reduction="none")
    return (2 * alpha * (fit * found).sum(1) + (1 - alpha) * rest) / count


class _UnwantedLogits(torch.autograd.Function):
    """Sum of the focal loss (exponent 2), without alpha, of all logits but the matched ones, by layer.

    A batch has millions of logits and each operation is a pass over them, so the derivative is computed along
    with the loss, in place where that can be, and is all that is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, *matched: Tensor) -> Tensor:
        probability = logits.sigmoid()
        # Makes both the loss and its derivative 0. A plain 0 would be copied to the device, which waits.
        probability.index_put_(matched, probability.new_zeros(()))
        surprise = F.softplus(logits)  # -log(1 - probability)
        # d/dx p^2 s = p^2 (2 (1 - p) s + p), as dp/dx = p (1 - p) and ds/dx = p
        derivative = torch.addcmul(surprise, surprise, probability, value=-1).mul_(2).add_(probability)
        squared = probability.square_()
        ctx.save_for_backward(derivative.mul_(squared))
        return surprise.mul_(squared).sum((1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return gradient[:, None, None, None] * derivative, None, None, None, None


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


def _mask_losses(logits: Tensor, wanted: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Focal and dice losses of matched masks (matches, height, width), summed over them, by ``count``."""
    logits = F.interpolate(logits[:, None], size=wanted.shape[-2:], mode="bilinear")[:, 0].flatten(1)
    wanted = wanted.flatten(1)
    probabilities = logits.sigmoid()
    overlap = (probabilities * wanted).sum(1)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(1) + wanted.sum(1) + 1)
    return {
        "loss_mask": _focal(logits, wanted, MASK_FOCAL_ALPHA).mean(1).sum() / count,
        "loss_dice": dice.sum() / count,
    }


def _box_losses(boxes: Tensor, wanted: Tensor, count: Tensor) -> dict[str, Tensor]:
    """L1 and generalised IoU losses of each layer's matched boxes (layers, matches, 4), by ``count``."""
    missed = 1 - generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return {"loss_bbox": (boxes - wanted).abs().sum((1, 2)) / count, "loss_giou": missed.sum(1) / count}


@torch.no_grad()
def _cardinality_error(logits: Tensor, targets: PackedTargets) -> Tensor:
    """Mean difference between the number of predicted objects and of targets, for each layer.

    The originals of all families count a query as an object unless its best class is the last one.
    """
    # The index of max rather than argmax, which takes twice as long on a CPU.
    predicted = (logits.max(-1).indices != logits.shape[-1] - 1).sum(-1)
    wanted = send(torch.tensor(targets.sizes), logits.device)
    return (predicted - wanted).abs().float().mean(-1)


@torch.no_grad()
def _class_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of matched queries, logits (matches, classes), whose class is wrong, in percent."""
    if len(labels) == 0:
        return logits.new_full((), 100.0)
    return 100 - 100 * (logits.argmax(-1) == labels).float().mean()
