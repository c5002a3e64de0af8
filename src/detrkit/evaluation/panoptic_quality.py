"""Panoptic quality (Kirillov et al., "Panoptic Segmentation", CVPR 2019), counted as panopticapi counts it.

Example:
    ```python
    from detrkit.evaluation.panoptic_quality import PanopticQuality, panoptic_quality_of_files

    result = panoptic_quality_of_files("panoptic_val2017.json", "predictions.json")
    print(result.all.pq, result.things.pq, result.stuff.pq)

    quality = PanopticQuality(categories)  # or image by image, from arrays
    for prediction, truth in pairs:
        quality.update(prediction.ids, prediction.segments, truth.ids, truth.segments)
    result = quality.result()
    ```

Source: ``panopticapi/evaluation.py`` of cocodataset/panopticapi.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detrkit.common.errors import AnnotationError, ImageError
from detrkit.common.progress import with_progress
from detrkit.data.documents import field, read_document
from detrkit.evaluation.categories import classes_by_name

if TYPE_CHECKING:
    from rich.table import Table

VOID = 0
"""Id of the pixels that belong to no segment."""

# Columns of the counts: the sum of the matched segments' IoU, and how many segments of each kind.
_IOU, _TRUE_POSITIVES, _FALSE_POSITIVES, _FALSE_NEGATIVES = range(4)
# Another process is only worth its start for this many images (about five seconds of work).
_IMAGES_PER_PROCESS = 250
_CHUNK = 8

Segment = Mapping[str, Any]
"""An entry of ``segments_info``: ``id``, ``category_id``, and for the truth ``iscrowd`` and ``area``."""


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
        scores = {"pq": self.pq, "sq": self.sq, "rq": self.rq}
        return {**{name: None if math.isnan(v) else v for name, v in scores.items()}, "n": self.n}


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

    def to_dict(self) -> dict[str, Any]:
        """All of it, with panopticapi's short names for the numbers of segments."""
        return {
            "name": self.name,
            "isthing": int(self.isthing),
            "pq": self.pq,
            "sq": self.sq,
            "rq": self.rq,
            "tp": self.true_positives,
            "fp": self.false_positives,
            "fn": self.false_negatives,
        }


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

    def to_dict(self) -> dict[str, Any]:
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
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE)
        table.add_column("")
        for heading in ("PQ", "SQ", "RQ", "categories"):
            table.add_column(heading, justify="right")
        for name, scores in (("all", self.all), ("things", self.things), ("stuff", self.stuff)):
            values = (scores.pq, scores.sq, scores.rq)
            table.add_row(name, *(_percent(value) for value in values), str(scores.n))
        return table

    def category_table(self) -> Table:
        """A row for each category that has segments, in percent."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE)
        table.add_column("category")
        table.add_column("kind")
        for heading in ("PQ", "SQ", "RQ", "found", "missed", "false"):
            table.add_column(heading, justify="right")
        for category in self.categories:
            if category.counts:
                counted = (category.true_positives, category.false_negatives, category.false_positives)
                table.add_row(
                    Text(category.name),
                    "thing" if category.isthing else "stuff",
                    *(_percent(value) for value in (category.pq, category.sq, category.rq)),
                    *map(str, counted),
                )
        return table


class PanopticQuality:
    """Compares predicted with true segments, image by image.

    A predicted and a true segment of one category match when their IoU is above 0.5, void pixels (id 0) left
    out of the predicted one. Matched pairs are true positives, other true segments false negatives unless
    they are crowds, and other predicted segments false positives unless more than half of their pixels are
    void or of a crowd of their category.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]]) -> None:
        """Starts at zero images.

        Args:
            categories: The data set's, with ``id``, ``isthing`` and, for the tables, ``name``.

        Raises:
            AnnotationError: There are none, one lacks a key, or two share an id.
        """
        self.categories = [dict(category) for category in categories]
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
        image_id: Any = None,
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
        self._add(
            self._count(
                predicted_ids,
                predicted_segments,
                true_ids,
                true_segments,
                "this image" if image_id is None else f"image {image_id}",
            )
        )

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

    def _add(self, counts: np.ndarray) -> None:
        self._counts += counts
        self.images += 1

    def _count(
        self,
        predicted_ids: np.ndarray,
        predicted_segments: Sequence[Segment],
        true_ids: np.ndarray,
        true_segments: Sequence[Segment],
        image: str,
    ) -> np.ndarray:
        """The counts of one image, (categories, 4)."""
        predicted_ids = _checked_map(predicted_ids, f"{image}: the predicted map")
        true_ids = _checked_map(true_ids, f"{image}: the true map")
        if predicted_ids.shape != true_ids.shape:
            raise AnnotationError(
                f"{image}: the predicted map has {_size(predicted_ids)} pixels, "
                f"the true one {_size(true_ids)}"
            )
        predicted = self._read_segments(predicted_segments, f"{image}: predicted")
        true = self._read_segments(true_segments, f"{image}: true")

        # The places in segments_info of the two segments of each pair that overlaps, -1 where not listed.
        pair_true, pair_predicted, pixels = _overlaps(true_ids, predicted_ids)
        row, column = _positions(pair_true, true.ids), _positions(pair_predicted, predicted.ids)
        unlisted = pair_predicted[(column < 0) & (pair_predicted != VOID)]
        if len(unlisted):
            raise AnnotationError(
                f"{image}: the predicted map holds segment {unlisted[0]}, which segments_info does not list"
            )

        def sums(of_pairs: np.ndarray, places: np.ndarray, segments: _Segments) -> np.ndarray:
            return _sums(places[of_pairs], pixels[of_pairs], len(segments.ids))

        predicted_areas = sums(column >= 0, column, predicted)
        if not predicted_areas.all():
            raise AnnotationError(
                f"{image}: segments_info lists segment {predicted.ids[predicted_areas == 0][0]}, "
                "of which the predicted map has no pixel"
            )
        true_areas = np.where(np.isnan(true.areas), sums(row >= 0, row, true), true.areas)
        void = sums((column >= 0) & (pair_true == VOID), column, predicted)
        both = (row >= 0) & (column >= 0)
        intersections = np.zeros((len(true.ids), len(predicted.ids)))
        intersections[row[both], column[both]] = pixels[both]

        same_category = true.rows[:, None] == predicted.rows
        candidates = same_category & ~true.crowds[:, None] & (intersections > 0)
        unions = true_areas[:, None] + (predicted_areas - void) - intersections
        ious = np.divide(intersections, unions, out=np.zeros_like(unions), where=candidates)
        matches = ious > 0.5

        ignored = void.copy()
        for crowd in np.flatnonzero(true.crowds):
            # As in panopticapi, the last crowd of a category counts where it has several.
            alike = same_category[crowd]
            ignored[alike] = void[alike] + intersections[crowd, alike]

        length = len(self.categories)
        matched = true.rows[np.nonzero(matches)[0]]
        missed = true.rows[~matches.any(axis=1) & ~true.crowds]
        false = predicted.rows[~matches.any(axis=0) & (ignored / predicted_areas <= 0.5)]
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


def panoptic_quality_of_files(
    annotations_file: str | os.PathLike[str],
    predictions_file: str | os.PathLike[str],
    annotations_dir: str | os.PathLike[str] | None = None,
    predictions_dir: str | os.PathLike[str] | None = None,
    *,
    processes: int | None = None,
) -> PanopticResult:
    """The panoptic quality of predictions in COCO's panoptic format.

    Shows a progress bar on stderr when it takes more than a few seconds.

    Args:
        annotations_file: COCO panoptic JSON of the ground truth, with ``annotations`` and ``categories``.
        predictions_file: COCO panoptic JSON of the predictions. Images that the ground truth does not have
            are left out. Category ids are those of the ground truth, unless the file has ``categories`` of
            its own: these are matched by name, and segments of those that the ground truth does not have
            become void.
        annotations_dir: Folder of the ground truth's PNG files; by default the JSON's path without ".json".
        predictions_dir: Folder of the predictions' PNG files, with the same default.
        processes: How many to use; by default one more for every few hundred images, up to the number of
            processors. Where processes are not forked, a script that asks for several needs the usual
            ``if __name__ == "__main__":`` guard.

    Raises:
        AnnotationError: A file is missing or no such file, an image has no prediction, or a prediction does
            not fit (see ``PanopticQuality.update``).
    """
    truth = read_document(annotations_file, "annotations", "categories")
    predictions = read_document(predictions_file, "annotations")
    true_folder = _png_folder(annotations_dir, annotations_file)
    predicted_folder = _png_folder(predictions_dir, predictions_file)
    pairs = _pair_annotations(truth["annotations"], predictions["annotations"], predictions_file)
    categories = _match_by_name(predictions.get("categories"), truth["categories"])
    quality = PanopticQuality(truth["categories"])
    count = partial(_count_files, quality, true_folder, predicted_folder, categories)
    if processes is None:
        processes = max(1, min(_processors(), len(pairs) // _IMAGES_PER_PROCESS))
    if processes == 1:
        for counts in with_progress(map(count, pairs), len(pairs), "Comparing"):
            quality._add(counts)
    else:
        with ProcessPoolExecutor(processes, initializer=_ignore_interrupts) as pool:
            for counts in with_progress(pool.map(count, pairs, chunksize=_CHUNK), len(pairs), "Comparing"):
                quality._add(counts)
    return quality.result()


def _match_by_name(predicted: Any, true: list[dict[str, Any]]) -> dict[int, int | None]:
    """Category id of the predictions -> that of the ground truth, None where it has none of that name.

    Empty where the predictions name no category that the ground truth knows: ids are the same then.
    """
    named = [c for c in predicted or () if isinstance(c, Mapping) and {"id", "name"} <= c.keys()]
    found = classes_by_name({category["id"]: str(category["name"]) for category in named}, true)
    return {category["id"]: found.get(category["id"]) for category in named} if found else {}


def _pair_annotations(
    truth: list[dict[str, Any]], predictions: list[dict[str, Any]], predictions_file: Any
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The true and the predicted annotation of each image, with the keys that the comparison needs."""
    for annotation, owner in [(a, "a true") for a in truth] + [(a, "a predicted") for a in predictions]:
        for key in ("image_id", "file_name", "segments_info"):
            field(annotation, key, f"{owner} panoptic annotation of image {annotation.get('image_id', '?')}")
    predicted = {annotation["image_id"]: annotation for annotation in predictions}
    missing = [a["image_id"] for a in truth if a["image_id"] not in predicted]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AnnotationError(f"{predictions_file} has no prediction for image {missing[0]}{more}")
    return [(annotation, predicted[annotation["image_id"]]) for annotation in truth]


def _count_files(
    quality: PanopticQuality,
    true_folder: Path,
    predicted_folder: Path,
    categories: Mapping[int, int | None],
    pair: tuple[dict[str, Any], dict[str, Any]],
) -> np.ndarray:
    """The counts of one image whose maps lie in PNG files."""
    true, predicted = pair
    image = f"image {true['image_id']}"
    predicted_ids = read_panoptic_ids(
        predicted_folder / predicted["file_name"], f"{image}: the predicted map"
    )
    return quality._count(
        *in_categories(predicted_ids, predicted["segments_info"], categories),
        read_panoptic_ids(true_folder / true["file_name"], f"{image}: the true map"),
        true["segments_info"],
        image,
    )


def in_categories(
    ids: np.ndarray, segments: Sequence[Segment], categories: Mapping[int, int | None]
) -> tuple[np.ndarray, list[Segment]]:
    """Gives segments other category ids.

    Args:
        ids: (height, width) segment ids.
        segments: Their entries.
        categories: New ``category_id`` by the one so far. Segments of categories that become None are left
            out, their pixels void; categories that are not listed stay.

    Returns:
        The new map and entries.
    """
    kept: list[Segment] = []
    foreign: list[Any] = []
    for segment in segments:
        category: Any = segment.get("category_id")
        if category not in categories:
            kept.append(segment)
        elif categories[category] is not None:
            kept.append({**segment, "category_id": categories[category]})
        else:
            foreign.append(segment.get("id"))
    return (np.where(np.isin(ids, foreign), VOID, ids) if foreign else ids), kept


def read_panoptic_ids(path: Path, what: str) -> np.ndarray:
    """The segment ids of a panoptic PNG, (height, width); ``what`` names the map in errors.

    Raises:
        AnnotationError: The file is missing or no picture.
    """
    from detrkit.processing.images import load_image
    from detrkit.processing.panoptic_png import rgb_to_id

    try:
        return rgb_to_id(np.asarray(load_image(path)))
    except ImageError as error:
        raise AnnotationError(f"{what}: {error}") from error


@dataclass(frozen=True, eq=False)
class _Segments:
    """The segments of one image, by place in ``segments_info``.

    Attributes:
        ids: (n,) int64.
        rows: (n,) int64, the category's row in the counts.
        crowds: (n,) bool.
        areas: (n,) float64 in pixels, not a number where the annotation does not say.
    """

    ids: np.ndarray
    rows: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray


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
        raise AnnotationError(f"{what} holds ids below 0 or beyond 2^31; void pixels have id {VOID}")
    return ids


def _size(ids: np.ndarray) -> str:
    return f"{ids.shape[1]}x{ids.shape[0]}"


def _category_quality(category: Mapping[str, Any], counts: np.ndarray) -> CategoryQuality:
    iou, true_positives, false_positives, false_negatives = counts.tolist()
    weight = true_positives + 0.5 * (false_positives + false_negatives)
    return CategoryQuality(
        id=category["id"],
        name=str(category.get("name", category["id"])),
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
    return PanopticScores(
        pq=math.fsum(category.pq for category in counting) / n,
        sq=math.fsum(category.sq for category in counting) / n,
        rq=math.fsum(category.rq for category in counting) / n,
        n=n,
    )


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _png_folder(folder: str | os.PathLike[str] | None, file: str | os.PathLike[str]) -> Path:
    path = Path(file).with_suffix("") if folder is None else Path(folder)
    if not path.is_dir():
        raise AnnotationError(f"there is no folder {path} with the PNG files of {file}")
    return path


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts() -> None:
    """Leaves Ctrl-C to the main process, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
