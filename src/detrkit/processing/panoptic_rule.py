"""What decides about panoptic segments: things and stuff, the queries that stay, the pixels that count.

Source: ``PostProcessPanoptic`` in models/segmentation.py of facebookresearch/detr. The masks themselves are
tensors in :mod:`detrkit.processing.segmentation` and arrays in :mod:`detrkit.processing.array_segmentation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import PIL.Image

from detrkit.common.schema import Segment
from detrkit.processing.resize import Size

IsThingMap: TypeAlias = Mapping[int, bool] | Mapping[str, bool]
"""Whether a class is a thing (True) or stuff (False), by label; labels may be strings, as JSON has them."""

PANOPTIC_THRESHOLD = 0.85
"""The score of a query above which the original keeps its segment."""

# Segments of at most this many pixels are removed.
_TINY_AREA = 4
# Category ids of COCO up to this one are things, those above are stuff.
_LAST_COCO_THING = 90


def resolve_is_thing_map(*maps: IsThingMap | None) -> Callable[[int], bool]:
    """Whether a label is a thing: by the first map that is given, or else COCO's.

    Args:
        *maps: Maps by precedence, such as a call's, a processor's, a model's.

    Returns:
        A function from a label to whether it is a thing. COCO's things are the category ids up to 90; a label
        that a given map leaves out is a thing, so that its segments are never merged.

    Raises:
        ValueError: A map is no mapping from labels to booleans.
    """
    for candidate in maps:
        if candidate is not None:
            things = normalize_is_thing_map(candidate)
            return lambda label: things.get(label, True)
    return lambda label: label <= _LAST_COCO_THING


def normalize_is_thing_map(is_thing_map: IsThingMap) -> dict[int, bool]:
    """A map with int labels and bool values, from one that may have been read from JSON.

    Raises:
        ValueError: It is no mapping from labels to booleans.
    """
    try:
        return {int(label): bool(thing) for label, thing in is_thing_map.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            "is_thing_map must map labels to True (things) or False (stuff), such as {1: True, 92: False}"
        ) from error


@dataclass(frozen=True)
class PanopticRule:
    """What decides about panoptic segments beside their masks.

    Attributes:
        is_thing: Whether a label is a thing.
        is_merged: Whether a label has at most one segment in an image.
        mask_threshold: Probability above which a pixel belongs to a query's own mask.
        overlap_threshold: Share of its own mask that a segment has to win; no segment is measured by it when
            None.
    """

    is_thing: Callable[[int], bool]
    is_merged: Callable[[int], bool]
    mask_threshold: float = 0.5
    overlap_threshold: float | None = None

    @classmethod
    def of(cls, is_thing: Callable[[int], bool], fused: Collection[int] | None = None) -> PanopticRule:
        """The rule for these things; classes have at most one segment if they are stuff, or in ``fused``."""
        if fused is None:
            return cls(is_thing, is_merged=lambda label: not is_thing(label))
        return cls(is_thing, is_merged={int(label) for label in fused}.__contains__)


class Contest(Protocol):
    """Masks whose queries compete for the pixels of an image."""

    def areas(self, queries: list[int], merged: list[int] | None) -> list[int]:
        """How many pixels of the result each query wins, of all the masks.

        Args:
            queries: Those that compete; later calls have fewer.
            merged: For each query the one that gets its pixels; None for itself.
        """


def settle(labels: Sequence[int], rule: PanopticRule, contest: Contest) -> tuple[list[int], list[int]]:
    """The queries that keep a segment, and how many pixels each query wins.

    Of several queries of one merged (stuff) class the first stays and the others are removed; so are those
    that win four pixels or fewer. What a removed query had won goes to the best of the rest, again and again
    until nothing is removed. This is the original's rule; merging is no union of masks in it.
    """
    queries = list(range(len(labels)))  # those that are left
    first_of_class: dict[int, int] = {}
    merged = [
        first_of_class.setdefault(label, k) if rule.is_merged(label) else k for k, label in enumerate(labels)
    ]
    # Merging is for the first turn: by the second only one query of a merged class is left.
    merge = merged if len(set(merged)) < len(merged) else None
    areas: list[int] = [0] * len(labels)
    while queries:
        areas, merge = contest.areas(queries, merge), None
        kept = [query for query in queries if areas[query] > _TINY_AREA]
        if len(kept) == len(queries):
            break
        queries = kept
    return queries, areas


def list_segments(
    queries: Sequence[int],
    labels: Sequence[int],
    scores: Sequence[float],
    areas: Sequence[int],
    rule: PanopticRule,
) -> list[Segment]:
    """The segments of queries, in their order: ids from 1."""
    return [
        {
            "id": k,
            "category_id": labels[query],
            "isthing": rule.is_thing(labels[query]),
            "area": areas[query],
            "score": round(scores[query], 6),
        }
        for k, query in enumerate(queries, start=1)
    ]


def pixel_centres(length: int, target: int) -> np.ndarray:
    """Which of ``length`` pixels Pillow's nearest filter takes for each of ``target``: int64 (target,).

    Pillow adds up a step in double precision; asking it is the only way to have the same rounding.
    """
    line = PIL.Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.asarray(line.resize((target, 1), PIL.Image.Resampling.NEAREST))[0].astype(np.int64)


def pixel_corners(length: int, target: int) -> np.ndarray:
    """Which of ``length`` pixels PyTorch's nearest mode takes for each of ``target``: int64 (target,)."""
    step = np.float32(length) / np.float32(target)
    places = np.floor(np.arange(target, dtype=np.float32) * step).astype(np.int64)
    return np.minimum(places, length - 1)


class MaskSizes(NamedTuple):
    """How the masks of a batch become pixels of one image: resized, cropped, sampled.

    Attributes:
        padded: (height, width) that masks are resized to, bilinearly: the batch's size with padding.
        image: What is cropped from the upper left of that: the image as the model saw it.
        target: What the image is resized to, by its nearest pixels.
    """

    padded: Size
    image: Size
    target: Size


def mask_sizes(
    masks: Any,
    processed_sizes: Any = None,
    target_sizes: Any = None,
    padded_size: Sequence[int] | None = None,
    *,
    crop: bool = True,
) -> list[MaskSizes]:
    """How the masks (batch, queries, h, w) become pixels of each image.

    Raises:
        ValueError: Sizes do not fit the batch.
    """
    targets = None if target_sizes is None else _sizes("target_sizes", target_sizes, len(masks))
    if processed_sizes is None:
        plain = targets or [(masks.shape[-2], masks.shape[-1])] * len(masks)
        return [MaskSizes(padded=size, image=size, target=size) for size in plain]
    images = _sizes("processed_sizes", processed_sizes, len(masks))
    if not crop:
        return [MaskSizes(image, image, target) for image, target in zip(images, targets or images)]
    largest = tuple(max(lengths) for lengths in zip(*images))
    padded = largest if padded_size is None else _sizes("padded_size", [padded_size], 1)[0]
    if any(length > limit for length, limit in zip(largest, padded)):
        raise ValueError(f"padded_size {padded} is smaller than an image of the batch, {largest}")
    return [MaskSizes(padded, image, target) for image, target in zip(images, targets or images)]


def _sizes(name: str, sizes: Any, count: int) -> list[Size]:
    """(height, width) of each image as ints."""
    entries = sizes.tolist() if hasattr(sizes, "tolist") else list(sizes)
    if len(entries) != count:
        raise ValueError(
            f"{name} has {len(entries)} entries for {count} images; pass one (height, width) for each image"
        )
    try:
        pairs = [tuple(int(length) for length in size) for size in entries]
    except TypeError as error:
        raise ValueError(f"{name} must hold (height, width) for each image") from error
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError(f"{name} must hold (height, width) for each image, both at least 1; got {pairs}")
    return [(height, width) for height, width in pairs]


def logits_and_masks(outputs: Any) -> tuple[Any, Any]:
    """The two fields of a model's outputs that segmentation needs, tensors or arrays, checked.

    Raises:
        ValueError: One is missing, or they do not fit each other.
    """

    def field(name: str) -> Any:
        return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)

    logits, masks = field("logits"), field("pred_masks")
    if logits is None or masks is None:
        missing = "logits" if logits is None else "pred_masks"
        raise ValueError(
            f"the outputs have no {missing}; segmentation needs those of a model with a mask head, "
            "such as DetrForSegmentation"
        )
    if logits.ndim != 3 or masks.ndim != 4 or logits.shape[:2] != masks.shape[:2]:
        raise ValueError(
            "logits must be (batch, queries, classes) and pred_masks (batch, queries, height, width), not "
            f"{tuple(logits.shape)} and {tuple(masks.shape)}"
        )
    return logits, masks


def check_thresholds(**thresholds: float | None) -> None:
    """Raises a ValueError for thresholds that are no probabilities."""
    for name, value in thresholds.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, not {value}")
