"""What turns scores into decisions: thresholds, the overlap filter and the calibration of scores.

Example:
    ```python
    from detrkit import DetectionConfig, Detector

    detector = Detector.from_pretrained("blood-cells")
    detector.detection_config = DetectionConfig(threshold={"RBC": 0.4, "WBC": 0.6}, overlap=0.8)
    detector.detection_config.save_pretrained("my-model")  # used whenever the model is loaded from there
    ```
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from detrkit.common.errors import CheckpointError, DetrkitError, SettingError
from detrkit.common.files import PRETRAINED, write_json
from detrkit.common.schema import JsonObject
from detrkit.common.screening import DETECTION_CONFIG, read_model_json
from detrkit.common.text import first_line
from detrkit.common.without_torch import require_torch
from detrkit.results.overlap import Views, without_overlaps, without_repeats

DEFAULT_THRESHOLD = 0.5

Threshold: TypeAlias = "float | Mapping[str, float]"
"""A least score, or one for each class name; classes that are not named have ``DEFAULT_THRESHOLD``."""


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """How a model's scored boxes become detections; stored beside the model as ``detection_config.json``.

    The defaults are those of the released models: all boxes with a score above 0.5.

    Attributes:
        threshold: Only objects with a higher score are given: a number in [0, 1], or one for each class name.
            It acts on calibrated scores.
        overlap: IoU in (0, 1] above which the lower-scored of two boxes is dropped; None keeps all.
        class_agnostic: Whether boxes of two classes drop each other too.
        max_objects: The most objects of an image, the best ones; None for as many as the model has queries,
            in each tile.
        calibration: Class name -> points (score, calibrated score) of a rising curve over [0, 1], straight
            between its points; the scores of other classes stay. None leaves all scores as they are.
        tile_size: Side in pixels of the square tiles that larger images are cut into, or their height and
            width; None for no tiles.
        tile_overlap: How much of a tile its neighbours share at least, in parts of its sides, from 0 to below
            1.
        chosen: How the settings were chosen: data, counts and numbers, as JSON has them.
    """

    threshold: Threshold = DEFAULT_THRESHOLD
    overlap: float | None = None
    class_agnostic: bool = False
    max_objects: int | None = None
    calibration: Mapping[str, Sequence[tuple[float, float]]] | None = None
    tile_size: int | Sequence[int] | None = None
    tile_overlap: float = 0.2
    chosen: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the settings.

        Raises:
            SettingError: One is out of range or not of its kind.
        """
        if isinstance(self.threshold, Mapping):
            for name, value in self.threshold.items():
                _check_number(f"threshold of {name!r}", value, 0, 1)
        else:
            _check_number("threshold", self.threshold, 0, 1)
        if self.overlap is not None:
            _check_number("overlap", self.overlap, 0, 1)
            if self.overlap == 0:
                raise SettingError("overlap must be above 0; None keeps all boxes")
        if not isinstance(self.class_agnostic, bool):
            raise SettingError(f"class_agnostic must be true or false, not {self.class_agnostic!r}")
        _check_count("max_objects", self.max_objects)
        self._check_tile_size()
        _check_number("tile_overlap", self.tile_overlap, 0, 1)
        if self.tile_overlap == 1:
            raise SettingError("tile_overlap must be below 1: otherwise tiles do not advance")
        mappings: dict[str, object] = {"calibration": self.calibration or {}, "chosen": self.chosen}
        for name, given in mappings.items():
            if not isinstance(given, Mapping):
                raise SettingError(f"{name} must be a mapping from names to values, not {_shown(given)}")
        for name, points in (self.calibration or {}).items():
            _check_curve(name, points)

    def _check_tile_size(self) -> None:
        if self.tile_size is None or isinstance(self.tile_size, Integral):
            _check_count("tile_size", self.tile_size)
        elif isinstance(self.tile_size, Sequence) and len(self.tile_size) == 2:
            for name, side in zip(("height", "width"), self.tile_size):
                _check_count(f"tile_size: the {name}", side)
        else:
            raise SettingError(
                f"tile_size must be a side, or a height and a width, not {_shown(self.tile_size)}"
            )

    @property
    def tile_shape(self) -> tuple[int, int] | None:
        """Height and width of the tiles in pixels; None for no tiles."""
        if self.tile_size is None:
            return None
        if isinstance(self.tile_size, Sequence):
            return self.tile_size[0], self.tile_size[1]
        return self.tile_size, self.tile_size

    def cuts(self, image_size: tuple[int, int]) -> bool:
        """Whether an image of this height and width in pixels is cut into tiles."""
        shape = self.tile_shape
        return shape is not None and (image_size[0] > shape[0] or image_size[1] > shape[1])

    def check_whole(self, image_size: tuple[int, int], source: str | None) -> None:
        """Raises a SettingError for an image that is to be cut, where only whole images are looked at."""
        if self.cuts(image_size):
            assert self.tile_shape is not None
            (height, width), (tall, wide) = image_size, self.tile_shape
            raise SettingError(
                f"{source or 'an image'} has {width}x{height} pixels, which the model's settings cut into "
                f"tiles of {wide}x{tall}; segmentation, attention, pipelines and images that were prepared "
                "ahead are not cut: shrink the image, or turn tiles off with --tiles 0 or tile_size None"
            )

    @classmethod
    def from_dict(cls, values: JsonObject) -> DetectionConfig:
        """The settings in the content of a ``detection_config.json``.

        Raises:
            SettingError: A setting does not exist or is out of range.
        """
        if not isinstance(values, Mapping):
            raise SettingError(f"it must contain a JSON object, not a {type(values).__name__}")
        known = [one.name for one in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise SettingError(f"unknown setting {str(unknown[0])[:100]!r}; supported: {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_pretrained(
        cls, model: str | os.PathLike[str], *, revision: str | None = None
    ) -> DetectionConfig:
        """The settings that are stored with a model; the defaults where none are.

        Args:
            model: A Hub id, a folder, or the name of a model in the package.
            revision: Branch, tag or commit on the Hub.

        Raises:
            CheckpointError: The settings cannot be read or used.
        """
        name = os.fspath(model)
        folders = (folder for folder in (Path(name), PRETRAINED / name) if folder.is_dir())
        folder = next(folders, None)
        path = _on_hub(name, revision) if folder is None else folder / DETECTION_CONFIG
        if path is None or not os.path.lexists(path):
            return cls()
        try:
            return cls.from_dict(read_model_json(path))
        except (DetrkitError, TypeError) as error:
            raise _unreadable(name, error) from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``detection_config.json`` into a folder, replacing the one that is there."""
        write_json(asdict(self), Path(folder) / DETECTION_CONFIG)

    def with_options(self, **options: Any) -> DetectionConfig:
        """The same settings but for options that are not None.

        Raises:
            SettingError: An option is out of range.
        """
        return replace(self, **{name: value for name, value in options.items() if value is not None})

    def threshold_of(self, name: str) -> float:
        """The threshold of a class."""
        if isinstance(self.threshold, Mapping):
            return self.threshold.get(name, DEFAULT_THRESHOLD)
        return self.threshold

    @property
    def least_threshold(self) -> float:
        """The lowest of the thresholds."""
        if isinstance(self.threshold, Mapping):
            return min([DEFAULT_THRESHOLD, *self.threshold.values()])
        return self.threshold

    def decisions(self) -> dict[str, Any]:
        """What of the settings shapes results, by name, for a document's ``info``."""
        return {name: value for name, value in asdict(self).items() if name != "chosen"}

    def describe(self, *, bare: bool = False) -> str:
        """The threshold in words: "threshold 0.5", "thresholds RBC 0.4, WBC 0.6"; ``bare``: no noun."""
        if not isinstance(self.threshold, Mapping):
            return f"{self.threshold:g}" if bare else f"threshold {self.threshold:g}"
        listed = ", ".join(f"{name} {value:g}" for name, value in self.threshold.items())
        return listed if bare else f"thresholds {listed}"


class DetectionRule:
    """Detection settings for a model's labels; the one place where scored boxes become detections."""

    def __init__(self, config: DetectionConfig, names: Mapping[int, str]) -> None:
        """Takes over settings.

        Args:
            config: The settings.
            names: The model's labels and their class names.

        Raises:
            SettingError: The settings name a class that the model does not have.
        """
        self._config = config
        given = config.threshold
        by_name = given if isinstance(given, Mapping) else {}
        curves = config.calibration or {}
        known = set(names.values())
        for name in (*by_name, *curves):
            if name not in known:
                listed = ", ".join(sorted(known)[:20])
                raise SettingError(
                    f"the detection settings name a class {name!r} that the model does not have; its classes "
                    f"are: {listed}"
                )
        self._threshold = DEFAULT_THRESHOLD if isinstance(given, Mapping) else float(given)
        self._thresholds = {label: by_name[name] for label, name in names.items() if name in by_name}
        self._curves = {
            label: np.asarray(curves[name], np.float64) for label, name in names.items() if name in curves
        }

    @property
    def least_score(self) -> float:
        """The score, before calibration, at or below which no object of any class is kept."""
        least = [self._config.least_threshold]
        for label, curve in self._curves.items():
            below = curve[curve[:, 1] <= self._thresholds.get(label, self._threshold), 0]
            least.append(float(below.max()) if len(below) else 0.0)
        return min(least)

    def calibrated(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The calibrated scores (n,) of n candidates; a copy."""
        scores = scores.copy()
        for label, curve in self._curves.items():
            chosen = labels == label
            scores[chosen] = np.interp(scores[chosen], curve[:, 0], curve[:, 1])
        return scores

    def select(
        self, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, views: Views | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chooses among the candidates of an image.

        Args:
            scores: (n,) float32, as the model gives them.
            labels: (n,) int64.
            boxes: (n, 4) float32, xyxy in pixels.
            views: The tiles that the candidates were found in, if the image was cut into several.

        Returns:
            The places of the chosen candidates, the best first, and their calibrated scores.
        """
        places, final = self._above_threshold(scores, labels)
        rivals = None if self._config.class_agnostic else labels
        # As the model ranks them: the curves of two classes need not be made for a comparison.
        if views is not None:
            seen = Views(views.tiles[places], views.image_size)
            of_class = None if rivals is None else rivals[places]
            places = places[without_repeats(boxes[places], scores[places], seen, of_class)]
        if self._config.overlap is not None:
            of_class = None if rivals is None else rivals[places]
            places = places[without_overlaps(boxes[places], self._config.overlap, of_class)]
        places = places[np.argsort(-final[places], kind="stable")][: self._config.max_objects]
        return places, final[places]

    def _above_threshold(self, scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The places of candidates above the threshold, by the model's score, and all calibrated scores."""
        final = self.calibrated(scores, labels)
        thresholds: Any = self._threshold
        if self._thresholds:
            thresholds = np.full(len(labels), self._threshold)
            for label, value in self._thresholds.items():
                thresholds[labels == label] = value
        places = np.flatnonzero(final > thresholds)
        return places[np.argsort(-scores[places], kind="stable")], final


class TileRule(DetectionRule):
    """What of one tile may become objects; the ``DetectionRule`` decides when it has those of all tiles."""

    def select(
        self, scores: np.ndarray, labels: np.ndarray, boxes: np.ndarray, views: Views | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The places of the candidates above the threshold, the best first, and the model's own scores."""
        places, _ = self._above_threshold(scores, labels)
        return places, scores[places]


def _on_hub(name: str, revision: str | None) -> Path | None:
    """The settings of a repository on the Hub, in the cache; None where it has none."""
    require_torch(f"{name} is not the folder of an exported model; running it")
    from transformers.utils import cached_file

    try:
        path = cached_file(
            name,
            DETECTION_CONFIG,
            revision=revision,
            # As with the other optional files: a copy in the cache is complete without it.
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        remedy = "check the name, the revision and, for a private model, your login (hf auth login)"
        raise _unreadable(name, error, remedy) from error
    return None if path is None else Path(path)


def _unreadable(name: str, error: Exception, remedy: str = "correct or remove it") -> CheckpointError:
    return CheckpointError(f"cannot read {DETECTION_CONFIG} of {name}: {first_line(error)}; {remedy}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number: Any = value  # Real has no comparison for type checkers
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= number <= high:
        raise SettingError(f"{name} must be between {low} and {high}, not {_shown(value)}")


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SettingError(f"{name} must be a whole number, not {_shown(value)}")
    if value < 1:
        raise SettingError(f"{name} must be at least 1, not {_shown(value)}")


def _shown(value: object) -> str:
    # Requests set these too, to texts of any length and to integers that Python does not print.
    return "another integer" if isinstance(value, int) and abs(value) > 2**63 else repr(value)[:100]


def _check_curve(name: str, points: object) -> None:
    try:
        curve = np.asarray(points, np.float64)
    except (TypeError, ValueError):
        curve = np.empty(0)
    if curve.ndim != 2 or curve.shape[1] != 2 or len(curve) < 2:
        raise SettingError(f"the calibration of {name!r} must be a list of points (score, calibrated score)")
    steps = np.diff(curve, axis=0)
    inside = bool(np.isfinite(curve).all()) and curve.min() >= 0 and curve.max() <= 1
    if not inside or (steps[:, 0] <= 0).any() or (steps[:, 1] < 0).any():
        raise SettingError(f"the calibration of {name!r} must rise from point to point within [0, 1]")
