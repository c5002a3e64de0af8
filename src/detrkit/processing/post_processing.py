"""From a detector's outputs to boxes in the image, shared by all families.

A family turns its logits into candidates, by :func:`softmax_detections` or :func:`sigmoid_top_k_detections`;
the rest is the same for all. Everything runs on the outputs' device and in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from transformers.utils import ModelOutput

from detrkit.common.boxes import cxcywh_to_xyxy

TargetSizes: TypeAlias = torch.Tensor | Sequence[Sequence[int]]
"""(batch, 2), or one (height, width) for each image, in pixels."""

Outputs: TypeAlias = ModelOutput | Mapping[str, torch.Tensor]
"""What a model returns, with its fields as attributes or entries."""


class Candidates(NamedTuple):
    """Scored boxes of a batch before any threshold.

    Attributes:
        scores: float32 (batch, candidates), probabilities.
        labels: int64 (batch, candidates).
        boxes: float32 (batch, candidates, 4), xyxy, normalised to the image.
        queries: int64 (batch, candidates), the object query behind each.
    """

    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    queries: torch.Tensor


def output(outputs: Outputs, name: str) -> torch.Tensor:
    """A field of a model's outputs."""
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name)


def softmax_detections(logits: torch.Tensor, boxes: torch.Tensor, k: int | None = None) -> Candidates:
    """DETR's reading: one candidate a query, its best class under a softmax that ends with "no object".

    Source: ``PostProcess`` in models/detr.py of facebookresearch/detr.

    Args:
        logits: (batch, queries, classes + 1).
        boxes: (batch, queries, 4), cxcywh, normalised.
        k: Number of candidates; all queries when None, or if there are fewer.

    Returns:
        All queries in their order, or the k best ones from best to worst.
    """
    check_classes(logits, least=2)
    scores, labels = logits.float().softmax(-1)[..., :-1].max(-1)
    scores, queries = best_queries(scores, k)
    corners = _rows(cxcywh_to_xyxy(boxes.float()), queries)
    return Candidates(scores, labels.gather(1, queries), corners, queries)


def best_queries(scores: torch.Tensor, k: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and queries (batch, k) of the k best queries, or all in their order; see softmax_detections."""
    if k is not None and k < scores.shape[1]:
        return torch.topk(scores, k, dim=1)
    return scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores)


def sigmoid_top_k_detections(logits: torch.Tensor, boxes: torch.Tensor, k: int) -> Candidates:
    """Conditional and Deformable DETR's reading: the k best pairs of query and class under a sigmoid.

    Source: ``PostProcess`` in models/deformable_detr.py of fundamentalvision/Deformable-DETR.

    Args:
        logits: (batch, queries, classes), without a "no object" class.
        boxes: (batch, queries, 4), cxcywh, normalised.
        k: Number of candidates; all pairs if there are fewer.

    Returns:
        The candidates from best to worst; a query can appear with several classes.
    """
    scores, queries, labels = best_pairs(logits, k)
    return Candidates(scores, labels, _rows(cxcywh_to_xyxy(boxes.float()), queries), queries)


def _rows(boxes: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """The boxes (batch, k, 4) of queries (batch, k)."""
    return boxes.gather(1, queries.unsqueeze(-1).expand(-1, -1, 4))


def check_classes(logits: torch.Tensor, least: int) -> None:
    """Raises a ValueError where logits lack the classes that every model has.

    Args:
        logits: (batch, queries, classes).
        least: 2 where the last class is "no object".
    """
    if logits.ndim != 3 or logits.shape[-1] < least:
        raise ValueError(
            f"logits must be (batch, queries, classes) with at least {least} classes, "
            f"not {tuple(logits.shape)}"
        )


def best_pairs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k best pairs of query and class under a sigmoid, from best to worst.

    Args:
        logits: (batch, queries, classes).
        k: Number of pairs; all if there are fewer.

    Returns:
        Scores float32, queries and classes int64, each (batch, k).
    """
    classes = logits.shape[-1]
    probabilities = logits.float().sigmoid().flatten(1)
    scores, pairs = probabilities.topk(min(k, probabilities.shape[1]), dim=1)
    return scores, pairs // classes, pairs % classes


def select_detections(
    candidates: Candidates, threshold: float | None = None, target_sizes: TargetSizes | None = None
) -> list[dict[str, torch.Tensor]]:
    """Keeps the candidates above a threshold and scales their boxes to the images.

    Args:
        candidates: Scored boxes of a batch.
        threshold: Candidates with a greater score are kept; all of them when None.
        target_sizes: Size of each image, which boxes are scaled to; they stay normalised when None.

    Returns:
        For each image ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), xyxy in pixels or normalised.

    Raises:
        ValueError: The number of sizes is not that of the images.
    """
    scores, labels, boxes, _ = candidates
    if target_sizes is not None:
        boxes = scale_boxes(boxes, target_sizes)
    results = []
    for image_scores, image_labels, image_boxes in zip(scores, labels, boxes):
        keep = slice(None) if threshold is None else image_scores > threshold
        results.append(
            {"scores": image_scores[keep], "labels": image_labels[keep], "boxes": image_boxes[keep]}
        )
    return results


def scale_boxes(boxes: torch.Tensor, target_sizes: TargetSizes) -> torch.Tensor:
    """Scales normalised boxes to pixels.

    Args:
        boxes: (batch, n, 4), normalised, xyxy or cxcywh.
        target_sizes: (height, width) of each image.

    Returns:
        (batch, n, 4) in pixels.

    Raises:
        ValueError: The number of sizes is not that of the images.
    """
    if len(target_sizes) != len(boxes):
        raise ValueError(
            f"target_sizes has {len(target_sizes)} entries for {len(boxes)} images; "
            "pass one (height, width) for each image"
        )
    if isinstance(target_sizes, torch.Tensor):
        sizes = target_sizes.to(device=boxes.device, dtype=boxes.dtype)
    else:
        pairs = [[float(length) for length in size] for size in target_sizes]
        sizes = torch.tensor(pairs, dtype=boxes.dtype, device=boxes.device).reshape(
            len(pairs), -1 if pairs else 2
        )
    if sizes.shape[1:] != (2,):
        raise ValueError("target_sizes must hold (height, width) for each image")
    heights, widths = sizes.unbind(1)
    return boxes * torch.stack([widths, heights, widths, heights], dim=1)[:, None]
