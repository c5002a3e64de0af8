"""The reports of a training run: a table, curves, and a sheet of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detrkit.common.errors import ImageError
from detrkit.common.files import atomic_file
from detrkit.common.tables import write_csv
from detrkit.data.coco import DetectionDataset
from detrkit.results.drawing import class_color, draw_boxes
from detrkit.training.history import columns, evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from detrkit.inference.detector import Detector

_DPI = 120
_CURVES = ("PQ", "PQthings", "PQstuff", "AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge")
_SHEET_IMAGES = 4
_TILE = 480  # pixels; width of an image on the sheet
_GAP = 8  # pixels
_HEADING = 32  # pixels


def write_reports(folder: Path, rows: Sequence[Mapping[str, float]], metric: str) -> None:
    """Writes the table of the run and its curves; ``metric`` determines the best model."""
    names = columns(rows)
    write_csv(folder / "metrics.csv", names, [[row.get(name, "") for name in names] for row in rows])
    _save_figure(draw_losses(rows), folder / "loss.png")
    if evaluations(rows, metric):
        _save_figure(draw_evaluations(rows, metric), folder / "ap.png")


def draw_losses(rows: Sequence[Mapping[str, float]]) -> Figure:
    """The loss and its terms over the epochs, on a logarithmic scale."""
    trained = [row for row in rows if "loss" in row]
    names = [name for name in columns(trained) if name == "loss" or name.startswith("loss_")]
    figure, axes = _axes("Loss", "loss")
    for name in names:
        _curve(axes, trained, name, main=name == "loss")
    axes.set_yscale("log")
    _legend(axes)
    return figure


def draw_evaluations(rows: Sequence[Mapping[str, float]], metric: str) -> Figure:
    """The main metrics of the evaluations over the epochs."""
    evaluated = evaluations(rows, metric)
    figure, axes = _axes("Evaluation", "in [0, 1]")
    for name in columns(evaluated):
        # -1 stands for a size that no object has.
        if name in _CURVES and max(row.get(name, -1) for row in evaluated) >= 0:
            _curve(axes, evaluated, name, main=name == metric, marker=".")
    axes.set_ylim(0, 1)
    _legend(axes)
    return figure


def write_predictions(detector: Detector, dataset: DetectionDataset, folder: Path) -> None:
    """Writes a sheet of images, each with its annotations on the left and the predictions on the right.

    Both have the colours of their classes, as in all drawings.
    """
    count = min(_SHEET_IMAGES, len(dataset))
    rows = []
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        path = dataset.path(index)
        try:
            image, target = dataset[index]
        except ImageError:  # the evaluation has named it
            continue
        labels = target["class_labels"].tolist()
        truth = draw_boxes(
            image,
            target["boxes"].numpy(),
            [detector.names.get(label, str(label)) for label in labels],
            [class_color(label) for label in labels],
        )
        found = detector(path, exif_orientation=dataset.upright)
        rows.append([_tile(truth), _tile(found.draw(path))])
    if not rows:
        return
    thresholds = detector.detection_config.threshold
    said = f"{thresholds:g}" if isinstance(thresholds, (int, float)) else "the thresholds"
    width = 2 * _TILE + _GAP
    sheet = Image.new("RGB", (width, _HEADING + sum(row[0].height + _GAP for row in rows) - _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for left, heading in ((0, "Annotations"), (_TILE + _GAP, f"Predictions above {said}")):
        draw.text((left + _GAP, _HEADING // 4), heading, "black", ImageFont.load_default(_HEADING // 2))
    top = _HEADING
    for truth, predicted in rows:
        sheet.paste(truth, (0, top))
        sheet.paste(predicted, (_TILE + _GAP, top))
        top += truth.height + _GAP
    with atomic_file(folder / "predictions.png") as temporary:
        sheet.save(temporary)


def _tile(image: Image.Image) -> Image.Image:
    return image.resize((_TILE, round(image.height * _TILE / image.width)), Image.Resampling.LANCZOS)


def _axes(title: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # whole epochs
    return figure, axes


def _legend(axes: Axes) -> None:
    """A legend beside the axes, where it covers no curve."""
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _curve(
    axes: Axes, rows: Sequence[Mapping[str, float]], name: str, *, main: bool, marker: str | None = None
) -> None:
    """Draws one column over the epochs; the main one stands out."""
    axes.plot(
        [row["epoch"] for row in rows],
        [row.get(name, np.nan) for row in rows],
        label="total" if name == "loss" else name,
        marker=marker,
        **({"color": "black", "linewidth": 2} if main else {"linewidth": 1}),
    )


def _save_figure(figure: Figure, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, bbox_inches="tight")
