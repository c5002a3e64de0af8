"""Chooses an overlap filter, calibration curves and thresholds from some of a sample's images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.evaluation.calibration_sample import Sample
from detrkit.evaluation.guarantee import guaranteed_threshold
from detrkit.evaluation.operating_points import (
    Judged,
    OperatingPoint,
    best_at_precision,
    best_at_recall,
    best_f1,
    f1,
    operating_points,
)
from detrkit.evaluation.score_calibration import METHODS, Curve, apply_curve, brier_score, fit_curve
from detrkit.results.detection_config import DetectionConfig, Threshold

OVERLAPS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
"""IoUs of the overlap filter that are tried."""

FOLDS = 5

LEAST_OBJECTS = 20
"""The least number of a class's objects that its own threshold rests on."""

_LEAST_GAIN = 0.001  # of the AP, for the filter to be worth having
_LEAST_F1_GAIN = 0.004  # over two halves, for thresholds of each class
_MOST_IMAGES = 1000  # that a filter is chosen on: evenly spaced ones of a larger data set

SEEN_SCORE = 0.05
"""Lower raw scores are left out where scores are judged: there are many, and all of them are wrong."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is asked of the settings.

    Attributes:
        precision: The least precision; the threshold then finds as much as possible at it.
        recall: The least recall; the threshold is then the highest with it.
        confidence: How sure the recall must be on new images of the same kind: the threshold then comes from
            :func:`detrkit.evaluation.guarantee.guaranteed_threshold`, and filter and curves stay as they are.
        scores: "auto", "temperature", "isotonic" or "none": the curves that calibrate the scores.
        per_class: Whether each class gets its own threshold; None where that is better.
    """

    precision: float | None = None
    recall: float | None = None
    confidence: float | None = None
    scores: str = "auto"
    per_class: bool | None = None

    def __post_init__(self) -> None:
        """Raises a SettingError for wishes that are out of range or contradict each other."""
        for name in ("precision", "recall", "confidence"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise SettingError(f"{name} must be above 0 and below 1, not {value}")
        if self.precision is not None and self.recall is not None:
            raise SettingError("pass either a precision or a recall, not both")
        if self.confidence is not None and self.recall is None:
            raise SettingError("confidence requires recall, such as recall=0.9")
        if self.confidence is not None and self.per_class:
            raise SettingError("the guarantee is for the recall of all classes together; leave out per-class")
        if self.scores not in ("auto", "none", *METHODS):
            choices = ", ".join(("auto", "none", *METHODS))
            raise SettingError(f"scores must be one of {choices}, not {self.scores!r}")


class Chooser:
    """Chooses settings from some of the images of a sample."""

    def __init__(self, sample: Sample, wishes: Wishes, current: DetectionConfig) -> None:
        self._sample, self._wishes, self._current = sample, wishes, current

    def choose(self, places: Sequence[int]) -> DetectionConfig:
        """Overlap filter, then curves, then thresholds."""
        config = replace(self._current, threshold=0.0, overlap=None, calibration=None, chosen={})
        config = self._filter(places, config)
        config = replace(config, calibration=self._curves(places, config))
        return replace(config, threshold=self._thresholds(places, config))

    def best_average_precision(self) -> float:
        """The AP of the images, at most 1,000 evenly spaced ones, with the filter that is best for them."""
        everything = list(range(len(self._sample.detections)))
        config = self._filter(
            everything, replace(self._current, threshold=0.0, overlap=None, calibration=None)
        )
        return self._sample.average_precisions([config], _some(everything))[0]

    def choose_threshold(self, places: Sequence[int]) -> DetectionConfig:
        """The current filter and curves with a threshold that is chosen anew."""
        config = replace(self._current, threshold=0.0, chosen={})
        return replace(config, threshold=self._thresholds(places, config))

    def guarantee(self, places: Sequence[int]) -> DetectionConfig:
        """The current settings, which do not know the images, with a threshold that guarantees a recall."""
        wishes, config = self._wishes, replace(self._current, threshold=0.0)
        assert wishes.recall is not None
        assert wishes.confidence is not None
        judged = self._sample.judge(dict.fromkeys(places, config))
        point = guaranteed_threshold(judged, wishes.recall, wishes.confidence)
        return replace(config, threshold=point.threshold)

    def _filter(self, places: Sequence[int], config: DetectionConfig) -> DetectionConfig:
        """The filter with the best AP; none where it gains nothing."""
        some = _some(places)
        ways = (False, True) if len(self._sample.classes) > 1 else (False,)
        tried = [replace(config, overlap=iou, class_agnostic=way) for way in ways for iou in OVERLAPS]
        values = self._sample.average_precisions([config, *tried], some)
        best = int(np.argmax(values))
        return tried[best - 1] if best and values[best] > values[0] + _LEAST_GAIN else config

    def _curves(self, places: Sequence[int], config: DetectionConfig) -> dict[str, Curve] | None:
        """The curves of the classes; None where raw scores are as good."""
        method = self._wishes.scores
        if method == "none":
            return None
        judged = self._sample.judge(dict.fromkeys(places, config))
        if method == "auto":
            halves = judged.images % 2 == 0
            errors = {name: _held_out_error(judged, halves, name) for name in (None, *METHODS)}
            best = min(errors, key=lambda name: errors[name])
            if best is None:
                return None
            method = best
        return self._named(_fit(judged, method)) or None

    def _named(self, curves: Mapping[int, Curve]) -> dict[str, Curve]:
        names, classes = self._sample.names, self._sample.classes
        return {names[classes[column]]: curve for column, curve in curves.items()}

    def _thresholds(self, places: Sequence[int], config: DetectionConfig) -> Threshold:
        """One threshold for all classes, or one for each where that is asked for or better."""
        judged = self._sample.judge(dict.fromkeys(places, config))
        count = len(self._sample.classes)
        whole = np.full(count, self._best(judged).threshold)
        single = self._wishes.precision is not None or self._wishes.recall is not None or count == 1
        per_class = self._wishes.per_class
        if per_class is None:
            per_class = not single and self._gains_per_class(judged)
        if not per_class:
            return float(whole[0])
        own = self._per_class(judged, whole)
        names, classes = self._sample.names, self._sample.classes
        by_label = {label: float(own[column]) for column, label in enumerate(classes)}
        return {name: by_label.get(label, float(whole[0])) for label, name in names.items()}

    def _best(self, judged: Judged) -> OperatingPoint:
        wishes, points = self._wishes, operating_points(judged)
        if wishes.precision is not None:
            found = best_at_precision(points, wishes.precision)
            if found is None:
                best = max((point.precision for point in points if point.detections), default=0.0)
                raise SettingError(
                    f"no threshold has a precision of {wishes.precision:g}: {best:.3f} is the best; "
                    "ask for less"
                )
            return found
        if wishes.recall is not None:
            found = best_at_recall(points, wishes.recall)
            if found is None:
                raise SettingError(
                    f"no threshold has a recall of {wishes.recall:g}: {points[-1].recall:.3f} is the best; "
                    "ask for less"
                )
            return found
        return best_f1(points)

    def _per_class(self, judged: Judged, whole: np.ndarray) -> np.ndarray:
        """The threshold of each class; that of all where a class has few objects."""
        own = whole.copy()
        for column in range(len(whole)):
            of_class = judged.of_class(column)
            if of_class.objects.sum() >= LEAST_OBJECTS and of_class.correct.any():
                own[column] = self._best(of_class).threshold
        return own

    def _gains_per_class(self, judged: Judged) -> bool:
        """Whether thresholds of each class, chosen on half of the images, are better on the other half."""
        scores = np.zeros(2)
        for parity in (0, 1):
            half = np.arange(len(judged.objects)) % 2 == parity
            known, new = judged.of_images(half), judged.of_images(~half)
            if not known.correct.any():
                return False
            whole = np.full(judged.objects.shape[1], self._best(known).threshold)
            for place, thresholds in enumerate((whole, self._per_class(known, whole))):
                kept = new.above(thresholds)
                scores[place] += f1(int(kept.correct.sum()), len(kept.scores), int(kept.objects.sum()))
        return bool(scores[1] > scores[0] + _LEAST_F1_GAIN)


def _some(places: Sequence[int]) -> Sequence[int]:
    """Evenly spaced ones of the places of many images."""
    return places[:: -(-len(places) // _MOST_IMAGES)]


def _fit(judged: Judged, method: str) -> dict[int, Curve]:
    """The curves of the classes that have enough detections."""
    curves = {}
    for column in range(judged.objects.shape[1]):
        rows = judged.classes == column
        curve = fit_curve(judged.scores[rows], judged.correct[rows], method)
        if curve is not None:
            curves[column] = curve
    return curves


def _held_out_error(judged: Judged, halves: np.ndarray, method: str | None) -> float:
    """The Brier score of one half of the detections with curves of the other, both ways."""
    values = judged.scores.copy()
    if method is not None:
        for side in (halves, ~halves):
            curves = _fit(judged.of_images(_images_of(judged, ~side)), method)
            for column, curve in curves.items():
                rows = side & (judged.classes == column)
                values[rows] = apply_curve(judged.scores[rows], curve)
    seen = judged.scores >= SEEN_SCORE
    return brier_score(values[seen], judged.correct[seen]) if seen.any() else float("inf")


def _images_of(judged: Judged, rows: np.ndarray) -> np.ndarray:
    chosen = np.zeros(len(judged.objects), bool)
    chosen[judged.images[rows]] = True
    return chosen
