"""From an exported model's arrays to scored boxes, as ``processing.post_processing`` for tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

TOP_K = 100
"""Candidates of an image before any threshold where classes are scored by sigmoids: the originals' number."""


class ArrayCandidates(NamedTuple):
    """Scored boxes of a batch before any threshold.

    Attributes:
        scores: float32 (batch, candidates), probabilities.
        labels: int64 (batch, candidates).
        boxes: float32 (batch, candidates, 4), xyxy, normalised to the image.
        queries: int64 (batch, candidates), the object query behind each.
    """

    scores: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    queries: np.ndarray


def softmax_candidates(logits: np.ndarray, boxes: np.ndarray, k: int | None = None) -> ArrayCandidates:
    """One candidate a query, its best class under a softmax that ends with "no object".

    Args:
        logits: (batch, queries, classes + 1).
        boxes: (batch, queries, 4), cxcywh, normalised.
        k: Number of candidates; all queries in their order when None, or if there are fewer.
    """
    probabilities = softmax(logits)[..., :-1]
    scores, labels = probabilities.max(-1), probabilities.argmax(-1)
    if k is not None and k < scores.shape[1]:
        queries = _greatest(scores, k)
    else:
        queries = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    scores, labels = (np.take_along_axis(values, queries, 1) for values in (scores, labels))
    return ArrayCandidates(scores, labels, _corners(boxes, queries), queries)


def sigmoid_candidates(logits: np.ndarray, boxes: np.ndarray, k: int) -> ArrayCandidates:
    """The k best pairs of query and class under a sigmoid, from best to worst; all if there are fewer.

    Args:
        logits: (batch, queries, classes), without a "no object" class.
        boxes: (batch, queries, 4), cxcywh, normalised.
        k: Number of pairs.
    """
    classes = logits.shape[-1]
    probabilities = sigmoid(logits).reshape(len(logits), -1)
    pairs = _greatest(probabilities, min(k, probabilities.shape[1]))
    queries = pairs // classes
    scores = np.take_along_axis(probabilities, pairs, 1)
    return ArrayCandidates(scores, pairs % classes, _corners(boxes, queries), queries)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 over the last dimension."""
    logits = np.asarray(logits, np.float32)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities float32 of each number on its own."""
    with np.errstate(over="ignore"):  # the infinity makes a zero
        return 1 / (1 + np.exp(-np.asarray(logits, np.float32)))


def _greatest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices (batch, k) of the greatest values (batch, n), the first of equal ones first."""
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def _corners(boxes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Boxes (batch, n, 4), cxcywh, of queries (batch, k) as xyxy."""
    boxes = np.take_along_axis(np.asarray(boxes, np.float32), queries[..., None], 1)
    centres, half = boxes[..., :2], boxes[..., 2:] / 2
    return np.concatenate([centres - half, centres + half], -1)
