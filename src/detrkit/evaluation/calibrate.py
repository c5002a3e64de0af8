"""Chooses what turns a detector's scores into decisions from annotated images, and says what it is worth.

Every number is cross-fitted: the images are dealt into five parts, and what is chosen on four of them is
measured on the fifth. The settings that are stored are chosen on all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from detrkit.common.errors import AnnotationError
from detrkit.common.progress import with_progress
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.evaluation.calibration_sample import Sample, collect
from detrkit.evaluation.choosing import FOLDS, LEAST_OBJECTS, SEEN_SCORE, Chooser, Wishes
from detrkit.evaluation.operating_points import (
    Judged,
    OperatingPoint,
    point_at,
)
from detrkit.evaluation.score_calibration import (
    apply_curve,
    calibration_error,
)
from detrkit.results.detection_config import DetectionConfig
from detrkit.results.finder import ObjectFinder


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """The chosen settings and what they are worth.

    Attributes:
        config: The settings, with how they were chosen.
        wishes: What was asked.
        labels: The model's labels, in the order of the columns of ``raw``.
        names: Their class names.
        before: What the settings that the detector had are worth: all classes together under "", and each
            class under its name.
        after: The same for the new ones, cross-fitted.
        ap: COCO's numbers "before" and "after", cross-fitted.
        raw: All detections with the chosen filter and their raw scores.
        calibrated: (n,) the cross-fitted calibrated scores of ``raw``.
    """

    config: DetectionConfig
    wishes: Wishes
    labels: list[int]
    names: list[str]
    before: dict[str, OperatingPoint]
    after: dict[str, OperatingPoint]
    ap: dict[str, dict[str, float]]
    raw: Judged
    calibrated: np.ndarray

    def errors(self, column: int | None = None) -> tuple[float, float]:
        """The calibration error before and after, of all detections or of a class; NaN without any."""
        seen = self.raw.scores >= SEEN_SCORE
        if column is not None:
            seen &= self.raw.classes == column
        correct = self.raw.correct[seen]
        return (
            calibration_error(self.raw.scores[seen], correct),
            calibration_error(self.calibrated[seen], correct),
        )

    def facts(self, data: str, images: int) -> dict[str, Any]:
        """How the settings were chosen, for ``DetectionConfig.chosen``."""
        asked = {name: value for name, value in asdict(self.wishes).items() if value is not None}
        asked |= {} if len(asked) > 1 else {"best": "F1"}
        before, after = self.errors()
        return {
            "data": data,
            "images": images,
            "objects": {name: self.after[name].objects for name in self.names},
            "asked": asked,
            "measured": {
                "cross_fitted": self.wishes.confidence is None,
                "AP": self.ap["after"]["AP"],
                "AP50": self.ap["after"]["AP50"],
                "precision": self.after[""].precision,
                "recall": self.after[""].recall,
                "F1": self.after[""].f1,
                "calibration_error": None if np.isnan(after) else after,
            },
            "measured_before": {
                "AP": self.ap["before"]["AP"],
                "AP50": self.ap["before"]["AP50"],
                "precision": self.before[""].precision,
                "recall": self.before[""].recall,
                "F1": self.before[""].f1,
                "calibration_error": None if np.isnan(before) else before,
            },
        }


def calibrate_detector(
    detector: ObjectFinder,
    dataset: DetectionDataset,
    wishes: Wishes | None = None,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    strict: bool = False,
) -> Calibration:
    """Chooses detection settings for a detector from annotated images.

    Shows progress when it takes more than a few seconds.

    Args:
        detector: The detector.
        dataset: Images that the model was not trained on.
        wishes: What is asked of the threshold and the scores; by default the best F1.
        batch_size: Maximum number of images that go through the model at once.
        limit: Only use the first so many images.
        strict: Raise an error if the data set has problems or an image cannot be read.

    Raises:
        AnnotationError: The annotations cannot be used, do not fit the model, or have too few images.
        SettingError: A wish is out of range or cannot be fulfilled.
        MissingExtraError: faster-coco-eval is not installed.
    """
    if not dataset.checked:
        dataset = check_dataset(dataset, strict=strict).dataset
    sample = collect(detector, dataset, batch_size, limit, strict)
    return choose_settings(sample, wishes or Wishes(), detector.detection_config, data=dataset.source)


def quick_settings(
    detector: ObjectFinder,
    dataset: DetectionDataset,
    start: DetectionConfig,
    *,
    batch_size: int = 1,
    strict: bool = False,
) -> DetectionConfig:
    """Overlap filter and threshold with the best AP and F1 on a checked data set, without honest numbers.

    Returns:
        The settings, with the filter in ``start`` if it has one; ``start`` itself where the images have too
        few objects or nothing was found.
    """
    sample = collect(detector, dataset, batch_size, None, strict)
    places = list(range(len(sample.detections)))
    judged = sample.judge(dict.fromkeys(places, DetectionConfig(threshold=0.0)))
    if judged.objects.sum() < LEAST_OBJECTS or not judged.correct.any():
        return start
    chooser = Chooser(sample, Wishes(scores="none", per_class=False), start)
    config = chooser.choose(places) if start.overlap is None else chooser.choose_threshold(places)
    names = [sample.names[label] for label in sample.classes]
    objects = dict(zip(names, judged.objects.sum(axis=0).tolist()))
    about = {"data": dataset.source, "images": len(places), "objects": objects, "asked": {"best": "F1"}}
    return replace(config, chosen=about)


def choose_settings(sample: Sample, wishes: Wishes, current: DetectionConfig, *, data: str) -> Calibration:
    """Chooses settings for detections that have been collected; see :func:`calibrate_detector`.

    Args:
        sample: The detections and objects.
        wishes: What is asked.
        current: The settings that the detector has.
        data: What the images are called.
    """
    number = len(sample.detections)
    if number < 2:
        raise AnnotationError(
            f"{data}: {number} image is not enough to choose settings from; pass at least 2"
        )
    everything = list(range(number))
    chooser = Chooser(sample, wishes, current)
    if wishes.confidence is not None:
        if current.chosen.get("data") == data:
            warnings.warn(
                f"overlap filter and curves were chosen on {data} too, so the guarantee is too optimistic; "
                f"use other images",
                stacklevel=2,
            )
        config = chooser.guarantee(everything)
        configs = dict.fromkeys(everything, config)
    else:
        order = np.random.default_rng(0).permutation(number)
        parts = [set(order[start::FOLDS].tolist()) for start in range(min(FOLDS, number))]
        others = ([place for place in everything if place not in part] for part in parts)
        chosen = list(with_progress(map(chooser.choose, others), len(parts), "Choosing"))
        configs = {place: one for part, one in zip(parts, chosen) for place in part}
        config = chooser.choose(everything)
    before, after = (
        _points(sample, sample.judge(some), one)
        for some, one in ((dict.fromkeys(everything, current), current), (configs, config))
    )
    ap = {
        "before": sample.average_precision(dict.fromkeys(everything, current)),
        "after": sample.average_precision(configs),
    }
    raw = sample.judge(dict.fromkeys(everything, replace(config, threshold=0.0, calibration=None)))
    result = Calibration(
        config=config,
        wishes=wishes,
        labels=sample.classes,
        names=[sample.names[label] for label in sample.classes],
        before=before,
        after=after,
        ap=ap,
        raw=raw,
        calibrated=_calibrated(sample, raw, configs),
    )
    # What else is known of the model, such as the scale of its training, stays.
    return replace(result, config=replace(config, chosen={**current.chosen, **result.facts(data, number)}))


def _calibrated(sample: Sample, raw: Judged, configs: Mapping[int, DetectionConfig]) -> np.ndarray:
    """The scores of ``raw``, each calibrated by the settings of its image."""
    values = raw.scores.copy()
    for column, label in enumerate(sample.classes):
        for place, config in configs.items():
            curve = (config.calibration or {}).get(sample.names[label])
            if curve is not None:
                rows = (raw.classes == column) & (raw.images == place)
                values[rows] = apply_curve(values[rows], list(curve))
    return values


def _points(sample: Sample, judged: Judged, config: DetectionConfig) -> dict[str, OperatingPoint]:
    """What decisions are worth: of all classes under "", and of each under its name."""
    names = [sample.names[label] for label in sample.classes]
    single = not isinstance(config.threshold, Mapping)
    overall = config.least_threshold if single else float("nan")
    points = {"": replace(point_at(judged, 0.0), threshold=overall)}
    for column, name in enumerate(names):
        points[name] = replace(point_at(judged.of_class(column), 0.0), threshold=config.threshold_of(name))
    return points
