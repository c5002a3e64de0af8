"""What a calibration found, as tables and charts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detrkit.common.files import atomic_file
from detrkit.common.outputs import Output
from detrkit.common.terminal import make_table
from detrkit.common.text import percent
from detrkit.evaluation.calibrate import Calibration
from detrkit.evaluation.charts import ALL_CATEGORIES, DPI, show_names, write_csv
from detrkit.evaluation.choosing import SEEN_SCORE
from detrkit.evaluation.operating_points import Judged, operating_points
from detrkit.evaluation.score_calibration import reliability
from detrkit.results.drawing import class_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

POINTS_FILE, CHART_FILE = "operating_points.csv", "calibration.png"
_HEADING = ("class", "threshold", "detections", "correct", "objects", "precision", "recall", "F1")
_MOST_CURVES = 10
_MOST_ROWS = 200  # of a class


def calibration_outputs(folder: Path) -> list[Output]:
    """The files that :func:`save_calibration` writes."""
    mark = ",".join(_HEADING).encode()
    return [
        Output("--output", folder / name, mark, witness=POINTS_FILE) for name in (POINTS_FILE, CHART_FILE)
    ]


def save_calibration(found: Calibration, folder: Path) -> list[Path]:
    """Writes precision, recall and F1 over the thresholds as CSV, and a chart of them and of the scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_points(left, found)
    _draw_classes(middle, found)
    _draw_reliability(right, found)
    chart = folder / CHART_FILE
    with atomic_file(chart) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png")
    return [write_csv(folder / POINTS_FILE, _HEADING, _rows(found)), chart]


def threshold_table(found: Calibration) -> Table:
    """The threshold of each class and what it is worth, in percent."""
    table = make_table(["class"], ["objects", "threshold", "precision", "recall", "F1"])
    for name in ("", *found.names):
        point = found.after[name]
        if point.objects or point.detections:
            threshold = "by class" if np.isnan(point.threshold) else f"{point.threshold:g}"
            shares = (point.precision, point.recall, point.f1)
            table.add_row(name or ALL_CATEGORIES, str(point.objects), threshold, *map(percent, shares))
    return table


def comparison_table(found: Calibration) -> Table:
    """What the settings from before and the new ones are worth, in percent."""
    table = make_table([""], ["before", "now"])
    for name in ("AP", "AP50"):
        table.add_row(name, *(percent(found.ap[side][name]) for side in ("before", "after")))
    for name, key in (("precision", "precision"), ("recall", "recall"), ("F1", "f1")):
        table.add_row(name, *(percent(getattr(side[""], key)) for side in (found.before, found.after)))
    errors = (percent(-1 if np.isnan(error) else error) for error in found.errors())
    table.add_row("error of scores", *errors)
    return table


def _final(found: Calibration) -> Judged:
    """The detections with their calibrated scores, on which thresholds act."""
    raw = found.raw
    return Judged(found.calibrated, raw.classes, raw.correct, raw.images, raw.objects)


def _rows(found: Calibration) -> Iterator[tuple[object, ...]]:
    judged = _final(found)
    for column, name in enumerate([ALL_CATEGORIES, *found.names], start=-1):
        points = operating_points(judged if column < 0 else judged.of_class(column))
        for point in points[:: -(-len(points) // _MOST_ROWS)]:
            numbers = (round(value, 6) for value in (point.precision, point.recall, point.f1))
            yield name, point.threshold, point.detections, point.correct, point.objects, *numbers


def _draw_points(axes: Axes, found: Calibration) -> None:
    points = operating_points(_final(found))
    thresholds = [point.threshold for point in points]
    for name, style in (("precision", "--"), ("recall", ":"), ("f1", "-")):
        label = {"f1": "F1"}.get(name, name)
        axes.plot(thresholds, [getattr(point, name) for point in points], style, color="black", label=label)
    chosen = found.after[""].threshold
    if not np.isnan(chosen):
        axes.axvline(chosen, color="tab:red", linewidth=1, label=f"threshold {chosen:g}")
    axes.set(title="All classes", xlabel="threshold", ylim=(0, 1.02), xlim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _draw_classes(axes: Axes, found: Calibration) -> None:
    judged = _final(found)
    frequent = sorted(range(len(found.names)), key=lambda column: -found.after[found.names[column]].objects)
    for column in frequent[:_MOST_CURVES]:
        name = found.names[column]
        points = operating_points(judged.of_class(column))
        color = np.array(class_color(found.labels[column])) / 255
        axes.plot([p.threshold for p in points], [p.f1 for p in points], color=color, label=name)
        axes.axvline(found.config.threshold_of(name), color=color, linewidth=0.8, linestyle=":")
    axes.set(title="F1 of each class, and its threshold", xlabel="threshold", ylim=(0, 1.02), xlim=(0, 1))
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    show_names(legend.get_texts())


def _draw_reliability(axes: Axes, found: Calibration) -> None:
    seen = found.raw.scores >= SEEN_SCORE
    correct = found.raw.correct[seen]
    axes.plot((0, 1), (0, 1), color="grey", linewidth=0.8)
    errors = found.errors()
    for scores, error, label, color in (
        (found.raw.scores, errors[0], "as the model gives them", "tab:orange"),
        (found.calibrated, errors[1], "calibrated", "tab:blue"),
    ):
        rows = reliability(scores[seen], correct)
        axes.plot(
            [x for x, _, _ in rows],
            [y for _, y, _ in rows],
            "o-",
            color=color,
            label=f"{label}, error {error:.3f}",
        )
    axes.set(
        title="Are scores as high as the share of right detections?",
        xlabel="score",
        ylabel="share of right detections",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
