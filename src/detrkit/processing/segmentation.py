"""From the masks of a model's queries to masks and maps of one image, shared by all families.

Sources: ``PostProcessSegm`` and ``PostProcessPanoptic`` in models/segmentation.py of facebookresearch/detr.

Masks are logits at a stride of the batch, padding included. A :class:`MaskGrid` says how they become pixels
of an image. Everything runs on the masks' device and in float32; only a few masks are held at full size at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F

from detrkit.common.schema import Segment
from detrkit.processing.panoptic_rule import PanopticRule, list_segments, pixel_centres, settle
from detrkit.processing.resize import Size


class LabelledSegment(TypedDict, total=False):
    """A segment in the form of Transformers; see :class:`Segmentation`."""

    id: int
    label_id: int
    was_fused: bool
    score: float
    area: int
    isthing: int


class Segmentation(TypedDict):
    """The segments of one image in the form of Transformers 5.

    ``segmentation`` is int32 (height, width), the id of each pixel's segment or 0; or a list of the runs of
    each segment (start from 1, length, start, ...) along the rows. ``segments_info`` has for each segment
    ``id``, ``label_id``, ``was_fused`` (whether its class has at most one), ``score``, ``area`` in pixels
    and, of panoptic ones, ``isthing``.
    """

    segmentation: torch.Tensor | list[list[int]]
    segments_info: list[LabelledSegment]


class PanopticPng(TypedDict):
    """The segments of one image in the form of Transformers 4.

    ``png_string`` is a PNG file in which a pixel's colour is the id of its segment (see ``rgb_to_id``).
    ``segments_info`` has for each segment ``id``, ``isthing``, ``category_id`` and ``area`` in pixels.
    """

    png_string: bytes
    segments_info: list[Segment]


# Masks that are at full size at once: 130 MiB at 800 x 1333.
_MASKS_AT_ONCE = 32
# Logits this close can become equal probabilities when a softmax rounds them.
_ROUNDED_AWAY = 1e-6


@dataclass(frozen=True)
class MaskGrid:
    """How the masks of a batch become pixels of one image, see :class:`MaskSizes`.

    Attributes:
        nearest: Which pixels are the nearest ones, :func:`pixel_centres` or :func:`pixel_corners`.
    """

    padded: Size
    image: Size
    target: Size
    nearest: Callable[[int, int], np.ndarray] = pixel_centres

    def resize(self, masks: torch.Tensor) -> torch.Tensor:
        """Masks (n, h, w) as float32 (n, *image)."""
        # One channel each, as in the original: other layouts round differently.
        resized = F.interpolate(masks[:, None].float(), self.padded, mode="bilinear", align_corners=False)
        return resized[:, 0, : self.image[0], : self.image[1]]

    def resize_in_parts(self, masks: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Masks (n, h, w) as in :meth:`resize`, a few at a time, each part with the index of its first."""
        for start in range(0, len(masks), _MASKS_AT_ONCE):
            yield start, self.resize(masks[start : start + _MASKS_AT_ONCE])

    def sample(self, values: torch.Tensor) -> torch.Tensor:
        """Values (..., *image) at the image's nearest pixels: (..., *target)."""
        if self.image == self.target:
            return values
        rows, columns = (torch.from_numpy(self.nearest(*pair)) for pair in zip(self.image, self.target))
        return values[..., rows.to(values.device), :][..., columns.to(values.device)]


def panoptic_segments(
    scores: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor,
    grid: MaskGrid,
    rule: PanopticRule,
) -> tuple[torch.Tensor, list[Segment]]:
    """The panoptic segmentation of one image.

    Each pixel goes to the query whose mask has the greatest logit; :func:`settle` says which queries stay.

    Args:
        scores: (n,), of the queries above the threshold.
        labels: int64 (n,).
        masks: (n, h, w), logits.
        grid: How masks become pixels.
        rule: Things, stuff, and further thresholds that segments have to pass.

    Returns:
        Ids, int32 (height, width) at the target size, 0 where there is no segment; and for each segment, in
        the order of the queries, ``id`` (from 1), ``category_id``, ``isthing``, ``area`` in pixels and
        ``score``.
    """
    names = labels.tolist()
    contest = _Contest(masks, grid)
    queries, areas = settle(names, rule, contest)
    if not queries:
        return torch.zeros(grid.target, dtype=torch.int32, device=masks.device), []
    if rule.overlap_threshold is not None:
        own_areas = _own_areas(masks[queries], grid, rule.mask_threshold)
        queries = [
            query
            for query, own in zip(queries, own_areas)
            if own > 0 and areas[query] > rule.overlap_threshold * own
        ]
    ids = torch.zeros(len(names), dtype=torch.int32)
    ids[queries] = torch.arange(1, len(queries) + 1, dtype=torch.int32)
    return ids.to(masks.device)[contest.winners], list_segments(queries, names, scores.tolist(), areas, rule)


def instance_masks(masks: torch.Tensor, grid: MaskGrid, mask_threshold: float = 0.5) -> torch.Tensor:
    """Masks of objects at the target size; they may overlap.

    Args:
        masks: (n, h, w), logits.
        grid: How masks become pixels.
        mask_threshold: Probability above which a pixel belongs to a mask.

    Returns:
        bool (n, height, width).
    """
    found = torch.empty(len(masks), *grid.target, dtype=torch.bool, device=masks.device)
    for start, logits in grid.resize_in_parts(masks):
        found[start : start + len(logits)] = grid.sample(logits.sigmoid_() > mask_threshold)
    return found


def instance_segments(
    scores: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor,
    grid: MaskGrid,
    mask_threshold: float,
    overlap_threshold: float,
) -> tuple[torch.Tensor, list[LabelledSegment]]:
    """Objects of one image as one map, in which they do not overlap.

    Where masks overlap, a pixel goes to the query whose probability times score is greatest. A query that
    wins no more than ``overlap_threshold`` of its own mask is left out, and its pixels belong to no object.

    Args:
        scores: (n,), of the queries above the threshold.
        labels: int64 (n,).
        masks: (n, h, w), logits.
        grid: How masks become pixels.
        mask_threshold: Probability above which a pixel belongs to a mask.
        overlap_threshold: Share of its own mask that an object has to win.

    Returns:
        Ids, int32 (height, width) at the target size, 0 where there is no object; and for each object ``id``
        (from 1), ``label_id``, ``was_fused`` (False), ``score`` and ``area`` in pixels.
    """
    count = len(labels)
    # Index ``count`` stands for no object.
    best = torch.zeros(grid.image, device=masks.device)
    winners = torch.full(grid.image, count, device=masks.device)
    own_areas: list[int] = []
    for start, logits in grid.resize_in_parts(masks):
        probabilities = logits.sigmoid()
        inside = probabilities > mask_threshold
        own_areas += grid.sample(inside).sum((1, 2)).tolist()
        weighted = probabilities * scores[start : start + len(logits), None, None]
        # A pixel outside a mask is not its object's, even where no other object claims it.
        value, index = weighted.masked_fill_(~inside, -1).max(0)
        winners = torch.where(value > best, index + start, winners)
        best = torch.maximum(best, value)
    winners = grid.sample(winners)
    areas = _areas(winners, count + 1)
    segments: list[LabelledSegment] = []
    ids = [0] * (count + 1)
    for k, (label, score) in enumerate(zip(labels.tolist(), scores.tolist())):
        if areas[k] > overlap_threshold * own_areas[k]:
            ids[k] = len(segments) + 1
            segments.append(
                {
                    "id": ids[k],
                    "label_id": label,
                    "was_fused": False,
                    "score": round(score, 6),
                    "area": areas[k],
                }
            )
    return torch.tensor(ids, dtype=torch.int32, device=masks.device)[winners], segments


def semantic_scores(probabilities: torch.Tensor, masks: torch.Tensor, grid: MaskGrid) -> torch.Tensor:
    """The scores that :func:`semantic_map` compares, of its arguments: float32 (classes, height, width)."""
    return torch.cat(
        [grid.sample(part) for _, part in grid.resize_in_parts(_class_maps(probabilities, masks))]
    )


def _class_maps(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qc,qhw->chw", probabilities.float(), masks.float().sigmoid())


def semantic_map(probabilities: torch.Tensor, masks: torch.Tensor, grid: MaskGrid) -> torch.Tensor:
    """The likeliest class of each pixel: the sum over queries of class probability times mask probability.

    Args:
        probabilities: (n, classes), without "no object".
        masks: (n, h, w), logits.
        grid: How masks become pixels.

    Returns:
        int64 (height, width) at the target size.
    """
    class_maps = _class_maps(probabilities, masks)
    best = torch.full(grid.image, -1.0, device=masks.device)
    classes = torch.zeros(grid.image, dtype=torch.int64, device=masks.device)
    for start, values in grid.resize_in_parts(class_maps):
        value, index = values.max(0)
        classes = torch.where(value > best, index + start, classes)
        best = torch.maximum(best, value)
    return grid.sample(classes)


def run_lengths(mask: torch.Tensor) -> list[int]:
    """Run lengths in the form of Transformers: start (from 1) and length of each run, along the rows."""
    pixels = F.pad(mask.flatten().to(torch.int8), (1, 1))
    edges = (pixels.diff() != 0).nonzero()[:, 0] + 1
    starts, ends = edges[::2], edges[1::2]
    return torch.stack([starts, ends - starts], dim=1).flatten().tolist()


class _Contest:
    """Which query wins each pixel of an image: under a softmax over the masks of those that are left.

    A softmax keeps the order of logits, so that it need not be computed, except where rounding makes equal
    probabilities of different logits and the first of them wins.
    """

    def __init__(self, masks: torch.Tensor, grid: MaskGrid) -> None:
        self._masks, self._grid = masks, grid
        # Few masks stay at full size, so that a further turn looks only at the pixels that have to change.
        self._maps = grid.resize(masks) if 0 < len(masks) <= _MASKS_AT_ONCE else None
        self._best: torch.Tensor | None = None
        self._close: torch.Tensor | None = None
        # The query that wins each pixel, int64 at the target size.
        self.winners = torch.zeros(grid.target, dtype=torch.int64, device=masks.device)

    def areas(self, queries: list[int], merged: list[int] | None) -> list[int]:
        """See :class:`detrkit.processing.panoptic_rule.Contest`."""
        winners = self._winners(queries)
        if merged is not None:
            winners = torch.tensor(merged, device=winners.device)[winners]
        self.winners = self._grid.sample(winners)
        return _areas(self.winners, len(self._masks))

    def _winners(self, queries: list[int]) -> torch.Tensor:
        """The winner of each pixel among ``queries``, of which later calls have fewer: int64 (*image)."""
        left = torch.tensor(queries, device=self._masks.device)
        if self._maps is None:
            return left[_best_in_parts(self._masks[left], self._grid)]
        if self._best is None or self._close is None:
            self._best, self._close = _best(self._maps)
        else:
            lost = torch.ones(len(self._masks), dtype=torch.bool, device=left.device)
            lost[left] = False
            stale = lost[self._best] | self._close
            self._best[stale] = left[_best(self._maps[:, stale][left])[0]]
        return self._best


def _best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the greatest probability over the first dimension, and where others come close to it."""
    value, index = logits.max(0)
    close = (logits >= value - _ROUNDED_AWAY).sum(0, dtype=torch.uint8) > 1
    if close.any():
        index[close] = logits[:, close].T.softmax(-1).argmax(-1)
    return index, close


def _best_in_parts(masks: torch.Tensor, grid: MaskGrid) -> torch.Tensor:
    """As :func:`_best` for masks of which only a few are at full size at once."""
    best = torch.full(grid.image, -torch.inf, device=masks.device)
    winners = torch.zeros(grid.image, dtype=torch.int64, device=masks.device)
    close = torch.zeros(grid.image, dtype=torch.bool, device=masks.device)
    for start, logits in grid.resize_in_parts(masks):
        value, index = logits.max(0)
        near = (logits >= value - _ROUNDED_AWAY).sum(0, dtype=torch.uint8) > 1
        close = torch.where(value > best + _ROUNDED_AWAY, near, close | (value >= best - _ROUNDED_AWAY))
        winners = torch.where(value > best, index + start, winners)
        best = torch.maximum(best, value)
    if close.any():
        logits = torch.cat([part[:, close] for _, part in grid.resize_in_parts(masks)])
        winners[close] = logits.T.softmax(-1).argmax(-1)
    return winners


def _areas(winners: torch.Tensor, count: int) -> list[int]:
    """How many pixels each of ``count`` indices has."""
    return torch.bincount(winners.flatten(), minlength=count).tolist()


def _own_areas(masks: torch.Tensor, grid: MaskGrid, mask_threshold: float) -> list[int]:
    """How many pixels at the target size each mask has by itself."""
    areas: list[int] = []
    for _, logits in grid.resize_in_parts(masks):
        areas += grid.sample(logits.sigmoid_() > mask_threshold).sum((1, 2)).tolist()
    return areas
