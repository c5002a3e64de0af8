"""What a setting of a model takes and is worth: measured in a process of its own, shown and stored."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING

from detrkit.benchmark import machine
from detrkit.benchmark.speed_settings import RunOptions, Setting, VariableModel
from detrkit.common.errors import DetrkitError, ImageError
from detrkit.common.tables import write_csv
from detrkit.common.terminal import make_table, quiet_libraries
from detrkit.common.text import percent
from detrkit.common.without_torch import thread_count
from detrkit.data.coco import DetectionDataset
from detrkit.engines.exported import PrivateFolder
from detrkit.evaluation.calibrate import Calibration, calibrate_detector
from detrkit.evaluation.choosing import Wishes
from detrkit.inference.detector import Detector
from detrkit.processing.images import load_image

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from rich.table import Table

SPEED_FILE = "speed.csv"

_HEADING = ("input", "engine", "precision", "layers", "queries", "AP", "AP50", "ms", "chosen")
_IMAGES, _ROUNDS = 24, 3


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a data set is read; see :func:`detrkit.evaluation.calibrate.calibrate_detector`."""

    batch_size: int = 1
    limit: int | None = None
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a setting took and was worth.

    Attributes:
        setting: The setting.
        ms: Milliseconds an image, from its file to objects, one image at a time.
        found: The detection settings chosen for it, and what they are worth.
        folder: Has the model with this setting.
    """

    setting: Setting
    ms: float
    found: Calibration
    folder: PrivateFolder

    @property
    def ap(self) -> float:
        """The AP, cross-fitted."""
        return self.found.ap["after"]["AP"]


@dataclass(frozen=True, eq=False)
class Speeds:
    """What was measured, and what was chosen of it.

    Attributes:
        model: The model.
        max_ms: The limit in milliseconds an image.
        points: All points, the best AP first.
        chosen: The best that fits.
    """

    model: VariableModel
    max_ms: float
    points: Sequence[Point]
    chosen: Point

    @property
    def found(self) -> Calibration:
        """The calibration of the chosen point; its settings say how they and the point were chosen."""
        about = {
            "max_ms": self.max_ms,
            "ms_per_image": round(self.chosen.ms, 2),
            **asdict(self.chosen.setting),
            "input": self.model.input_name(self.chosen.setting),
            "processor": machine.processor(),
            "threads": thread_count(),
        }
        found = self.chosen.found
        return replace(found, config=replace(found.config, chosen={**found.config.chosen, "speed": about}))

    def table(self) -> Table:
        """The points, a row each."""
        table = make_table(list(_HEADING[:3]), [*_HEADING[3:8], ""])
        for point in self.points:
            mark = "chosen" if point is self.chosen else "" if point.ms <= self.max_ms else "too slow"
            ap = point.found.ap["after"]
            numbers = percent(ap["AP"]), percent(ap["AP50"]), f"{point.ms:.1f}", mark
            table.add_row(*map(str, self._about(point)), *numbers)
        return table

    def save(self, folder: Path) -> Path:
        """Writes the points as a CSV file."""
        rows = [
            (
                *self._about(point),
                *(round(point.found.ap["after"][name], 4) for name in ("AP", "AP50")),
                round(point.ms, 2),
                int(point is self.chosen),
            )
            for point in self.points
        ]
        return write_csv(folder / SPEED_FILE, _HEADING, rows)

    def _about(self, point: Point) -> tuple[object, ...]:
        one = point.setting
        return self.model.input_name(one), one.engine, one.precision, one.layers, one.queries


def time_per_image(detector: Detector, images: Sequence[Path], upright: bool, rounds: int = _ROUNDS) -> float:
    """Milliseconds from a file to its objects: mean over the images of the median of a few runs of each.

    Args:
        detector: The detector.
        images: Image files, which go through it one at a time.
        upright: Whether they are turned as their EXIF entry says.
        rounds: Runs of each, after one that warms up.
    """
    seconds: list[list[float]] = [[] for _ in images]
    for turn in range(rounds + 1):
        for path, own in zip(images, seconds):
            begin = time.perf_counter()
            detector(path, exif_orientation=upright)
            if turn:
                own.append(time.perf_counter() - begin)
    return 1000 * mean(map(median, seconds))


def readable_images(dataset: DetectionDataset, limit: int | None, most: int) -> list[Path]:
    """Evenly spaced ones of the first images of a data set, at most so many.

    Raises:
        ImageError: None can be read.
    """
    count = len(dataset.document["images"][:limit])
    images = []
    for place in range(0, count, max(1, -(-count // most))):
        try:
            load_image(dataset.path(place), exif_orientation=dataset.upright)
        except ImageError:  # which is told when the data set is run
            continue
        images.append(dataset.path(place))
    if not images:
        raise ImageError(f"{dataset.source}: none of {count} images can be read")
    return images


def measure(
    folder: Path, options: RunOptions, dataset: DetectionDataset, wishes: Wishes, reading: Reading
) -> tuple[Calibration, float]:
    """Chooses detection settings for the model in a folder, and takes the time of an image, in a new process.

    Args:
        folder: The model.
        options: For ``Detector.from_pretrained``.
        dataset: The images.
        wishes: What is asked of the settings.
        reading: How the data set is read.

    Returns:
        The calibration, and the milliseconds.

    Raises:
        DetrkitError: The process was ended from outside; or as :func:`calibrate_detector`.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, folder, options, dataset, wishes, reading)
    process = context.Process(target=_measure, args=arguments, daemon=True)
    process.start()
    sender.close()  # so that the end of the process ends the wait
    try:
        found = receiver.recv()
    except EOFError as error:
        raise DetrkitError("the process that measured a setting was ended; maybe memory ran out") from error
    finally:
        process.kill()
        process.join()
    if isinstance(found, DetrkitError):
        raise found
    return found


def _measure(
    sender: Connection,
    folder: Path,
    options: RunOptions,
    dataset: DetectionDataset,
    wishes: Wishes,
    reading: Reading,
) -> None:
    """Sends what :func:`measure` gives, or its mistake."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    quiet_libraries()
    try:
        detector = Detector.from_pretrained(folder, **options)
        found = calibrate_detector(detector, dataset, wishes, **vars(reading))
        images = readable_images(dataset, reading.limit, _IMAGES)
        sender.send((found, time_per_image(detector.with_config(found.config), images, dataset.upright)))
    except DetrkitError as error:
        sender.send(error)
