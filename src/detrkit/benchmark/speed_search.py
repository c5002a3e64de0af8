"""The most accurate setting of a model that takes at most so many milliseconds an image, on this machine.

The search goes in stages, as trying everything takes too long. The engines are compared at the model's own
setting. PyTorch takes the times of all sizes, decoder layers and numbers of queries on a few images. Of those
that may fit the AP is measured, all decoder layers in one run. Both are forecasts: the best settings are then
stored and measured in a fresh process each, as they will be used, and only these numbers count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from detrkit.benchmark.speed_points import (
    Point,
    Reading,
    Speeds,
    measure,
    readable_images,
    time_per_image,
)
from detrkit.benchmark.speed_settings import Engine, RunOptions, Setting, VariableModel
from detrkit.common.errors import DetrkitError, SettingError
from detrkit.common.progress import with_progress
from detrkit.common.terminal import say
from detrkit.data.coco import DetectionDataset
from detrkit.engines.exported import PrivateFolder
from detrkit.evaluation.calibrate import Calibration
from detrkit.evaluation.calibration_sample import Sample, collect, collect_layers
from detrkit.evaluation.choosing import Chooser, Wishes
from detrkit.inference.detector import Detector

_SLACK = 1.1  # times the limit: a forecast up to there may turn out to fit
_MOST_POINTS = 7
_FEW, _ROUNDS = 4, 2  # images that forecasts are timed on, and runs of each
_quickly = partial(time_per_image, rounds=_ROUNDS)
_INT8_IMAGES = 64  # that ranges of int8 are measured on
_LEARNED = 0.5  # of the last decoder layer's AP: an earlier one below it was not trained to detect

Timer: TypeAlias = Callable[[Detector, Sequence[Path], bool], float]
Measure: TypeAlias = Callable[
    [Path, RunOptions, DetectionDataset, Wishes, Reading], tuple[Calibration, float]
]


@dataclass(frozen=True)
class Forecast:
    """What a setting is expected to take, in milliseconds an image, and its AP."""

    setting: Setting
    ms: float
    ap: float


def best_first(forecasts: Sequence[Forecast], limit: float) -> list[Setting]:
    """Settings that may fit, the best AP first, each faster than those before; the fastest if none may."""
    fitting = [one for one in forecasts if one.ms <= limit] or [min(forecasts, key=lambda one: one.ms)]
    front, fastest = [], float("inf")
    for one in sorted(fitting, key=lambda one: (-one.ap, one.ms)):
        if one.ms < fastest:
            front.append(one.setting)
            fastest = one.ms
    return front


@dataclass(kw_only=True)
class SpeedSearch:
    """Looks for the best setting within a limit.

    Attributes:
        model: The model.
        dataset: Checked images that it was not trained on.
        max_ms: The most milliseconds an image.
        wishes: What is asked of the detection settings.
        reading: How the data set is read.
        engine: The only engine to try; None for all that run the model here.
        timer: Takes the times of forecasts; see :func:`time_per_image`.
        measure: Measures a setting; see :func:`detrkit.benchmark.speed_points.measure`.
    """

    model: VariableModel
    dataset: DetectionDataset
    max_ms: float
    wishes: Wishes = field(default_factory=Wishes)
    reading: Reading = field(default_factory=Reading)
    engine: str | None = None
    timer: Timer = _quickly
    measure: Measure = measure

    def run(self) -> Speeds:
        """Measures the model as it is, and the best settings; chooses among them.

        Raises:
            SettingError: None fits.
        """
        images = readable_images(self.dataset, self.reading.limit, _FEW)
        engines = self.model.engines(self.engine)
        ranked = best_first(self._forecasts(engines, images), self.max_ms * _SLACK)
        settings = list(dict.fromkeys([self.model.own.on(engines[0]), *ranked]))
        points: list[Point] = []
        refusal: SettingError | None = None
        for setting in settings:
            if len(points) >= _MOST_POINTS and any(point.ms <= self.max_ms for point in points):
                break
            turn = f"{len(points) + 1} of at most {len(settings)}"
            say(f"Measuring setting {turn}: {self.model.in_words(setting)}")
            try:
                points.append(self._point(setting))
            except SettingError as error:  # such as a recall that this setting cannot have
                refusal = error
                say(f"Left out: {error}")
        if refusal is not None and not points:
            raise refusal
        points.sort(key=lambda point: (-point.ap, point.ms))
        for point in points:
            if point.ms <= self.max_ms:
                return Speeds(self.model, self.max_ms, points, point)
        fastest = min(points, key=lambda point: point.ms)
        raise SettingError(
            f"no setting takes at most {self.max_ms:g} ms an image on this machine; the fastest that was "
            f"measured takes {fastest.ms:.1f} ms: {self.model.in_words(fastest.setting)}"
        )

    def _point(self, setting: Setting) -> Point:
        folder = self._stored(setting)
        options = self.model.run_options(setting)
        found, ms = self.measure(folder.path, options, self.dataset, self.wishes, self.reading)
        return Point(setting=setting, ms=ms, found=found, folder=folder)

    def _stored(self, setting: Setting) -> PrivateFolder:
        folder = PrivateFolder()
        dataset, limit = self.dataset, self.reading.limit
        self.model.write(setting, folder.path, lambda: readable_images(dataset, limit, _INT8_IMAGES))
        return folder

    def _forecasts(self, engines: Sequence[Engine], images: Sequence[Path]) -> list[Forecast]:
        """What the settings that may fit are expected to take and to be worth; the fastest if none may."""
        own = self.model.own
        detector = self.model.detector(own)
        aps = {(own.size, own.queries): self._layers(detector)}
        own_ms = self.timer(detector, images, self.dataset.upright)
        own_aps = aps[own.size, own.queries]
        ratios = self._engines(engines, images, own_ms, own_aps[-1])
        least = min(ratio for ratio, _ in ratios.values())
        times = self._times(self._useful_layers(own_aps), images, self.max_ms * _SLACK / least)
        for setting in times:
            key = setting.size, setting.queries
            if key not in aps:
                most = max(one.layers for one in times if (one.size, one.queries) == key)
                aps[key] = self._layers(self.model.detector(replace(setting, layers=most)))
        forecasts = []
        for setting, ms in times.items():
            ap = aps[setting.size, setting.queries][setting.layers - 1]
            for engine, (ratio, loss) in ratios.items():
                forecasts.append(Forecast(setting.on(engine), ms * ratio, ap - loss))
        return forecasts

    def _layers(self, detector: Detector) -> list[float]:
        """The AP of each decoder layer."""
        reading = vars(self.reading)
        return [self._ap(sample) for sample in collect_layers(detector, self.dataset, **reading)]

    def _ap(self, sample: Sample) -> float:
        return Chooser(sample, self.wishes, self.model.detection_config).best_average_precision()

    def _useful_layers(self, aps: Sequence[float]) -> list[int]:
        """The numbers of decoder layers that are worth a look, by the AP of each at the own setting."""
        useful = [count for count in self.model.layers if aps[count - 1] >= _LEARNED * aps[-1]]
        if len(useful) < len(self.model.layers):
            left = ", ".join(f"{count}" for count in self.model.layers if count not in useful)
            say(
                f"Left out: {left} of {len(aps)} decoder layers, whose AP is less than half of that of all; "
                "auxiliary losses would have taught each layer to detect."
            )
        return useful

    def _engines(
        self, engines: Sequence[Engine], images: Sequence[Path], own_ms: float, own_ap: float
    ) -> dict[Engine, tuple[float, float]]:
        """The engines worth using: how many times PyTorch's time each takes, and how much AP it loses.

        In the model's own precision all give the same results, so only the fastest stays; in another one an
        engine stays that is faster still.
        """
        own = self.model.own
        kept: dict[Engine, tuple[float, float]] = {}
        for engine in engines:
            if engine == own.engine_and_precision:
                kept[engine] = 1.0, 0.0
                continue
            setting = own.on(engine)
            try:
                folder = self._stored(setting)
            except DetrkitError as error:
                if self.engine is not None:
                    raise
                say(f"Left out: {engine[0]} in {engine[1]}: {error}")
                continue
            detector = Detector.from_pretrained(folder.path, **self.model.run_options(setting))
            ratio = self.timer(detector, images, self.dataset.upright) / own_ms
            if kept and ratio >= min(other for other, _ in kept.values()):
                continue
            if engine[1] == own.precision:
                kept = {engine: (ratio, 0.0)}
            else:
                kept[engine] = ratio, own_ap - self._ap(collect(detector, self.dataset, **vars(self.reading)))
        return kept

    def _times(self, layers: Sequence[int], images: Sequence[Path], limit: float) -> dict[Setting, float]:
        """PyTorch's time of the settings that take no more than a limit; of the fastest, if all take more."""
        total = len(self.model.queries) * len(layers) * len(self.model.sizes)
        times = dict(with_progress(self._timed(layers, images, limit), total, "Timing"))
        fitting = {setting: ms for setting, ms in times.items() if ms <= limit}
        return fitting or dict([min(times.items(), key=lambda item: item[1])])

    def _timed(
        self, layers: Sequence[int], images: Sequence[Path], limit: float
    ) -> Iterator[tuple[Setting, float]]:
        """Settings and their times, the sizes up to the first one above the limit."""
        for queries in self.model.queries:
            for count in layers:
                for size in sorted(self.model.sizes):
                    setting = replace(self.model.own, size=size, layers=count, queries=queries)
                    try:
                        detector = self.model.detector(setting)
                    except SettingError:  # images of that size have no room for so many queries
                        continue
                    ms = self.timer(detector, images, self.dataset.upright)
                    yield setting, ms
                    if ms > limit:
                        break
