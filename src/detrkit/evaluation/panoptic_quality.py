"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), counted as panopticapi counts it.

Example:
    ```python
    from detrkit.evaluation import PanopticQuality

    quality = PanopticQuality(categories)
    for prediction, truth in pairs:
        quality.update(prediction.ids, prediction.segments, truth.ids, truth.segments)
    result = quality.result()
    print(result.all.pq, result.things.pq, result.stuff.pq)
    ```

Source: ``panopticapi/evaluation.py`` of cocodataset/panopticapi.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Category, Segment
from detrkit.common.terminal import make_table
from detrkit.common.text import percent
from detrkit.data.documents import category_name, field

if TYPE_CHECKING:
    from rich.table import Table

VOID = 0
"""Id of the pixels that belong to no segment."""

# Columns of the counts: the sum of the matched segments' IoU, and how many segments of each kind.
_IOU, _TRUE_POSITIVES, _FALSE_POSITIVES, _FALSE_NEGATIVES = range(4)


@dataclass(frozen=True)
class PanopticScores:
    """Averages over categories, each in [0, 1]; not a number where no category counts.

    Attributes:
        pq: Panoptic quality.
        sq: Segmentation quality.
        rq: Recognition quality.
        n: How many categories the averages are over: those with a segment, be it true or predicted.
    """

    pq: float
    sq: float
    rq: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """The averages, with None for those that are not a number."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class CategoryQuality:
    """The panoptic quality of one category, in [0, 1]; 0 where there are no segments, as in panopticapi.

    Attributes:
        id: Category id of the data set.
        name: Its name.
        isthing: Whether it is a thing rather than stuff.
        pq: Panoptic quality.
        sq: Segmentation quality: mean IoU of the matched segments.
        rq: Recognition quality: F1 of the segments.
        true_positives: Segments that were found.
        false_positives: Predicted segments without a true one.
        false_negatives: True segments that were not found.
    """

    id: int
    name: str
    isthing: bool
    pq: float
    sq: float
    rq: float
    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def counts(self) -> bool:
        """Whether the category takes part in the averages."""
        return self.true_positives + self.false_positives + self.false_negatives > 0

    def to_dict(self) -> dict[str, str | float]:
        """All of it, with panopticapi's short names for the numbers of segments."""
        scores = {"pq": self.pq, "sq": self.sq, "rq": self.rq}
        counts = {"tp": self.true_positives, "fp": self.false_positives, "fn": self.false_negatives}
        return {"name": self.name, "isthing": int(self.isthing), **scores, **counts}


@dataclass(frozen=True)
class PanopticResult:
    """The panoptic quality of a model on a data set.

    Attributes:
        all: Averages over all categories.
        things: Averages over the things.
        stuff: Averages over the stuff.
        categories: One entry for each category of the data set.
        images: Number of images.
    """

    all: PanopticScores
    things: PanopticScores
    stuff: PanopticScores
    categories: tuple[CategoryQuality, ...]
    images: int

    def to_dict(self) -> dict[str, object]:
        """As panopticapi gives it (``All``, ``Things``, ``Stuff``, ``per_class`` by id), ready for JSON.

        Scores are fractions; panopticapi prints them times 100.
        """
        return {
            "All": self.all.to_dict(),
            "Things": self.things.to_dict(),
            "Stuff": self.stuff.to_dict(),
            "per_class": {str(category.id): category.to_dict() for category in self.categories},
            "images": self.images,
        }

    def table(self) -> Table:
        """The averages in percent, as papers give them."""
        table = make_table([""], ["PQ", "SQ", "RQ", "categories"])
        for name, scores in (("all", self.all), ("things", self.things), ("stuff", self.stuff)):
            table.add_row(name, *map(percent, (scores.pq, scores.sq, scores.rq)), str(scores.n))
        return table

    def category_table(self) -> Table:
        """A row for each category that has segments, in percent."""
        from rich.text import Text

        table = make_table(["category", "kind"], ["PQ", "SQ", "RQ", "found", "missed", "false"])
        for category in self.categories:
            if category.counts:
                scores = (category.pq, category.sq, category.rq)
                counted = (category.true_positives, category.false_negatives, category.false_positives)
                kind = "thing" if category.isthing else "stuff"
                table.add_row(Text(category.name), kind, *map(percent, scores), *map(str, counted))
        return table


class PanopticQuality:
    """Compares predicted with true segments, image by image.

    A predicted and a true segment of one category match when their IoU is above 0.5, void pixels (id 0) left
    out of the predicted one. Matched pairs are true positives, other true segments false negatives unless
    they are crowds, and other predicted segments false positives unless more than half of their pixels are
    void or of a crowd of their category.
    """

    def __init__(self, categories: Iterable[Category]) -> None:
        """Starts at zero images.

        Args:
            categories: The data set's, with ``id``, ``isthing`` and, for the tables, ``name``.

        Raises:
            AnnotationError: There are none, one lacks a key, or two share an id.
        """
        self.categories = list(categories)
        if not self.categories:
            raise AnnotationError("panoptic quality needs at least one category")
        ids = [field(category, "id", "a category") for category in self.categories]
        for category in self.categories:
            field(category, "isthing", f"category {category['id']}")
        self._row_of_category = {category_id: row for row, category_id in enumerate(ids)}
        if len(self._row_of_category) < len(ids):
            raise AnnotationError("two of the categories have the same id")
        self._counts = np.zeros((len(ids), 4))
        self.images = 0

    def update(
        self,
        predicted_ids: np.ndarray,
        predicted_segments: Sequence[Segment],
        true_ids: np.ndarray,
        true_segments: Sequence[Segment],
        *,
        image_id: object = None,
    ) -> None:
        """Adds one image.

        Args:
            predicted_ids: (height, width) integers, the id of each pixel's segment. Pixels of id 0 are void
                unless a segment of id 0 is listed: the original DETR counts its segments from 0.
            predicted_segments: ``id`` and ``category_id`` of each segment.
            true_ids: The same of the ground truth; 0 is void.
            true_segments: ``id``, ``category_id`` and, where they are known, ``iscrowd`` (else 0) and
                ``area`` in pixels (else counted).
            image_id: Names the image in errors.

        Raises:
            AnnotationError: Maps of different size, a predicted segment that only the map or only the list
                has, an unknown category, or an id that is listed twice.
        """
        image = "this image" if image_id is None else f"image {image_id}"
        self.add(self.count(predicted_ids, predicted_segments, true_ids, true_segments, image))

    def result(self) -> PanopticResult:
        """The quality over the images so far."""
        categories = tuple(
            _category_quality(category, counts) for category, counts in zip(self.categories, self._counts)
        )
        return PanopticResult(
            all=_average(categories),
            things=_average([category for category in categories if category.isthing]),
            stuff=_average([category for category in categories if not category.isthing]),
            categories=categories,
            images=self.images,
        )

    def add(self, counts: np.ndarray) -> None:
        """Adds the counts of one image, from :meth:`count`."""
        self._counts += counts
        self.images += 1

    def count(
        self,
        predicted_ids: np.ndarray,
        predicted_segments: Sequence[Segment],
        true_ids: np.ndarray,
        true_segments: Sequence[Segment],
        image: str,
    ) -> np.ndarray:
        """The counts of one image, (categories, 4), without adding them; arguments as of :meth:`update`."""
        predicted_ids = _checked_map(predicted_ids, f"{image}: the predicted map")
        true_ids = _checked_map(true_ids, f"{image}: the true map")
        if predicted_ids.shape != true_ids.shape:
            raise AnnotationError(
                f"{image}: the predicted map has {_size(predicted_ids)} pixels, "
                f"the true one {_size(true_ids)}"
            )
        predicted = self._read_segments(predicted_segments, f"{image}: predicted")
        true = self._read_segments(true_segments, f"{image}: true")
        common = _common_pixels(true_ids, true, predicted_ids, predicted, image)

        same_category = true.rows[:, None] == predicted.rows
        candidates = same_category & ~true.crowds[:, None] & (common.pairs > 0)
        unions = common.true_areas[:, None] + (common.predicted_areas - common.void) - common.pairs
        ious = np.divide(common.pairs, unions, out=np.zeros_like(unions), where=candidates)
        matches = ious > 0.5

        ignored = common.void.copy()
        for crowd in np.flatnonzero(true.crowds):
            # As in panopticapi, the last crowd of a category counts where it has several.
            alike = same_category[crowd]
            ignored[alike] = common.void[alike] + common.pairs[crowd, alike]

        length = len(self.categories)
        matched = true.rows[np.nonzero(matches)[0]]
        missed = true.rows[~matches.any(axis=1) & ~true.crowds]
        false = predicted.rows[~matches.any(axis=0) & (ignored / common.predicted_areas <= 0.5)]
        counts = np.empty((length, 4))
        counts[:, _IOU] = _sums(matched, ious[matches], length)
        counts[:, _TRUE_POSITIVES] = np.bincount(matched, minlength=length)
        counts[:, _FALSE_POSITIVES] = np.bincount(false, minlength=length)
        counts[:, _FALSE_NEGATIVES] = np.bincount(missed, minlength=length)
        return counts

    def _read_segments(self, segments: Sequence[Segment], owner: str) -> _Segments:
        """Checks the entries of a ``segments_info``; ``owner`` names them in errors."""
        rows = []
        for segment in segments:
            segment_id = field(segment, "id", f"{owner} segment")
            category = field(segment, "category_id", f"{owner} segment {segment_id}")
            if category not in self._row_of_category:
                raise AnnotationError(
                    f"{owner} segment {segment_id} has category {category}, which the data set does not have"
                )
            rows.append(self._row_of_category[category])
        ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
        unique, first = np.unique(ids, return_index=True)
        if len(unique) < len(ids):
            twice = next(i for i in range(len(ids)) if i not in first)
            raise AnnotationError(f"{owner} segment {ids[twice]} is listed twice")
        return _Segments(
            ids=ids,
            rows=np.array(rows, dtype=np.int64),
            crowds=np.array([bool(segment.get("iscrowd", 0)) for segment in segments], dtype=bool),
            areas=np.array([segment.get("area", math.nan) for segment in segments], dtype=np.float64),
        )


class _Segments(NamedTuple):
    """The segments of one image, each array by place in ``segments_info``."""

    ids: np.ndarray  # int64
    rows: np.ndarray  # int64, the category's row in the counts
    crowds: np.ndarray  # bool
    areas: np.ndarray  # float64 in pixels, not a number where the annotation does not say


class _CommonPixels(NamedTuple):
    """Numbers of pixels of t true and p predicted segments, as floats."""

    pairs: np.ndarray  # (t, p), pixels that two segments share
    void: np.ndarray  # (p,), pixels of the predicted ones that are void in the truth
    true_areas: np.ndarray  # (t,), as the annotation says, or else counted
    predicted_areas: np.ndarray  # (p,)


def _common_pixels(
    true_ids: np.ndarray, true: _Segments, predicted_ids: np.ndarray, predicted: _Segments, image: str
) -> _CommonPixels:
    """Counts the pixels of one image; the predicted map and its list must have the same segments."""
    # The places in segments_info of the two segments of each pair that overlaps, -1 where not listed.
    pair_true, pair_predicted, pixels = _overlaps(true_ids, predicted_ids)
    row, column = _positions(pair_true, true.ids), _positions(pair_predicted, predicted.ids)
    unlisted = pair_predicted[(column < 0) & (pair_predicted != VOID)]
    if len(unlisted):
        raise AnnotationError(
            f"{image}: the predicted map contains segment {unlisted[0]}, which segments_info does not list"
        )

    def sums(of_pairs: np.ndarray, places: np.ndarray, segments: _Segments) -> np.ndarray:
        return _sums(places[of_pairs], pixels[of_pairs], len(segments.ids))

    predicted_areas = sums(column >= 0, column, predicted)
    if not predicted_areas.all():
        raise AnnotationError(
            f"{image}: segments_info lists segment {predicted.ids[predicted_areas == 0][0]}, "
            "of which the predicted map has no pixel"
        )
    both = (row >= 0) & (column >= 0)
    pairs = np.zeros((len(true.ids), len(predicted.ids)))
    pairs[row[both], column[both]] = pixels[both]
    return _CommonPixels(
        pairs=pairs,
        void=sums((column >= 0) & (pair_true == VOID), column, predicted),
        true_areas=np.where(np.isnan(true.areas), sums(row >= 0, row, true), true.areas),
        predicted_areas=predicted_areas,
    )


def _overlaps(true_ids: np.ndarray, predicted_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which segments overlap: true ids, predicted ids, and the number of pixels of each pair.

    Neighbouring pixels mostly share their segments, so runs along the rows are sorted instead of pixels.
    """
    pairs = (true_ids.astype(np.int64) << 32 | predicted_ids.astype(np.int64)).ravel()
    starts = np.flatnonzero(np.concatenate([[True], pairs[1:] != pairs[:-1]]))
    lengths = np.diff(np.append(starts, len(pairs)))
    unique, place = np.unique(pairs[starts], return_inverse=True)
    return unique >> 32, unique & 0xFFFFFFFF, _sums(place, lengths, len(unique))


def _sums(places: np.ndarray, numbers: np.ndarray, length: int) -> np.ndarray:
    """Sums of numbers by place, as floats, which hold numbers of pixels exactly."""
    return np.bincount(places, numbers, minlength=length).astype(np.float64)  # of nothing it is integers


def _positions(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Where each value stands in ``ids``, -1 where it does not."""
    if not len(ids):
        return np.full(len(values), -1)
    order = np.argsort(ids)
    found = order[np.searchsorted(ids, values, sorter=order).clip(max=len(ids) - 1)]
    return np.where(ids[found] == values, found, -1)


def _checked_map(ids: np.ndarray, what: str) -> np.ndarray:
    ids = np.asarray(ids)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise AnnotationError(
            f"{what} must be a (height, width) array of whole numbers, not {ids.dtype} {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= 2**31:
        raise AnnotationError(f"{what} contains ids below 0 or beyond 2^31; void pixels have id {VOID}")
    return ids


def _size(ids: np.ndarray) -> str:
    return f"{ids.shape[1]}x{ids.shape[0]}"


def _category_quality(category: Category, counts: np.ndarray) -> CategoryQuality:
    iou, true_positives, false_positives, false_negatives = counts.tolist()
    weight = true_positives + 0.5 * (false_positives + false_negatives)
    return CategoryQuality(
        id=category["id"],
        name=category_name(category),
        isthing=bool(category["isthing"]),
        pq=iou / weight if weight else 0.0,
        sq=iou / true_positives if true_positives else 0.0,
        rq=true_positives / weight if weight else 0.0,
        true_positives=int(true_positives),
        false_positives=int(false_positives),
        false_negatives=int(false_negatives),
    )


def _average(categories: Sequence[CategoryQuality]) -> PanopticScores:
    counting = [category for category in categories if category.counts]
    if not counting:
        return PanopticScores(math.nan, math.nan, math.nan, 0)
    n = len(counting)
    scores = zip(*((category.pq, category.sq, category.rq) for category in counting))
    pq, sq, rq = (math.fsum(column) / n for column in scores)
    return PanopticScores(pq, sq, rq, n)
