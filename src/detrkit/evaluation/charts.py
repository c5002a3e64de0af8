"""Precision-recall curves and confusion matrices, as CSV files and as charts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detrkit.common.errors import MissingExtraError
from detrkit.common.files import atomic_file
from detrkit.common.outputs import Output
from detrkit.common.tables import write_csv
from detrkit.evaluation.coco import IOU_THRESHOLDS, IOU_TYPES, RECALLS, STATISTICS, CocoResult
from detrkit.evaluation.confusion import ConfusionMatrix
from detrkit.results.drawing import class_color
from detrkit.results.fonts import font_file, legible

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

ALL_CATEGORIES = "(all)"

PANOPTIC_TABLE = "panoptic_per_class.csv"

_CHART_FILES = (
    *("per_class.csv", "precision_recall.csv", "confusion_matrix.csv"),
    *("precision_recall.png", "confusion_matrix.png"),
)
LAYER_FILES = ("boxes_layers.csv", "boxes_layers.png")
ERROR_GALLERY = "boxes_errors.png"
_MEAN_IOU = f"{IOU_THRESHOLDS[0]:.2f}:{IOU_THRESHOLDS[-1]:.2f}"
_CURVE_IOUS = (0.5, 0.75)
_MOST_CURVES = 10
_MOST_CELLS_WITH_NUMBERS = 25
DPI = 120


def check_charts_available() -> None:
    """Raises a MissingExtraError, before any work, if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "drawing precision-recall curves and confusion matrices", "coco", package="matplotlib"
        ) from error


def evaluation_outputs(folder: Path, *, panoptic: bool) -> list[Output]:
    """All files that ``Evaluation.save`` may write; the tables of the categories come first."""
    option = "--save-dir"
    if panoptic:
        return [Output(option, folder / PANOPTIC_TABLE, b"id,name,isthing,pq,sq,rq,")]
    names = {
        stem: [f"{stem}_{name}" for name in (*_CHART_FILES, "results.json")] for stem in IOU_TYPES.values()
    }
    names["boxes"] += [*LAYER_FILES, ERROR_GALLERY]
    return [
        Output(option, folder / name, b"id,category,objects,AP,", witness=f"{stem}_per_class.csv")
        for stem, of_stem in names.items()
        for name in of_stem
    ]


def number_or_blank(value: float) -> float | str:
    """A number of COCO's for a table; nothing for -1, which stands for no object of a size."""
    return value if value >= 0 else ""


def save_coco_result(result: CocoResult, folder: Path) -> list[Path]:
    """Writes the numbers of each category, the precision-recall curves and the confusion matrix.

    Gives the files, three CSV and two PNG, whose names begin with "boxes" or "masks".
    """
    check_charts_available()
    stem = IOU_TYPES[result.iou_type]
    written = []

    def write_table(name: str, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        written.append(write_csv(folder / f"{stem}_{name}.csv", heading, rows))

    def write_figure(name: str, figure: Figure) -> None:
        path = folder / f"{stem}_{name}.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=DPI, bbox_inches="tight")
        written.append(path)

    per_class = (
        (c.id, c.name, c.objects, *map(number_or_blank, map(c.stats.__getitem__, STATISTICS)))
        for c in result.categories
    )
    write_table("per_class", ("id", "category", "objects", *STATISTICS), per_class)
    write_table("precision_recall", ("category", "iou", "recall", "precision", "score"), _curve_rows(result))
    names = result.confusion.names
    matrix_rows = ((name, *row) for name, row in zip(names, result.confusion.counts.tolist()))
    write_table("confusion_matrix", ("true \\ detected", *names), matrix_rows)
    write_figure("precision_recall", draw_precision_recall(result))
    write_figure("confusion_matrix", draw_confusion_matrix(result.confusion))
    return written


def draw_precision_recall(result: CocoResult) -> Figure:
    """The mean precision over recall, and at IoU 0.5 that of the categories with the most objects."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.add_subplot()
    frequent = sorted(
        (i for i, category in enumerate(result.categories) if category.objects),
        key=lambda i: -result.categories[i].objects,
    )
    for i in frequent[:_MOST_CURVES] if len(frequent) > 1 else ():
        category = result.categories[i]
        axes.plot(
            RECALLS,
            result.precision[0, :, i],
            color=np.array(class_color(category.id)) / 255,
            linewidth=1,
            label=f"{category.name} (IoU 0.50)",
        )
    for (iou, curve), style in zip(_mean_curves(result), ("-", "--", ":")):
        axes.plot(RECALLS, curve, style, color="black", linewidth=2, label=f"all, IoU {iou}")
    axes.set(
        title=f"Precision and recall of {IOU_TYPES[result.iou_type]}",
        xlabel="recall",
        ylabel="precision",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axes.grid(alpha=0.3)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    show_names(legend.get_texts())
    return figure


def draw_confusion_matrix(matrix: ConfusionMatrix) -> Figure:
    """The share of each true class that was detected as which; classes that never occur are left out."""
    from matplotlib.figure import Figure

    occurring = np.flatnonzero(matrix.counts.sum(axis=0) + matrix.counts.sum(axis=1))
    occurring = np.union1d(occurring, [len(matrix.counts) - 1])
    counts = matrix.counts[np.ix_(occurring, occurring)]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [matrix.names[i] for i in occurring]
    size = max(5.0, 0.3 * len(names) + 2)
    figure = Figure(figsize=(size + 1, size))
    axes = figure.add_subplot()
    cells = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(cells, ax=axes, label="share of the row", fraction=0.046)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    show_names([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.set(
        title=f"Confusion at score > {matrix.score_threshold}, IoU ≥ {matrix.iou_threshold}",
        xlabel="detected",
        ylabel="true",
    )
    if len(names) <= _MOST_CELLS_WITH_NUMBERS:
        for (y, x), count in np.ndenumerate(counts):
            if count:
                color = "white" if shares[y, x] > 0.5 else "black"
                axes.text(x, y, str(count), ha="center", va="center", color=color, fontsize=8)
    return figure


def show_names(texts: Iterable[Text]) -> None:
    """Gives names a font that has their letters, as drawings do; matplotlib's own where it will do."""
    from matplotlib.font_manager import FontProperties

    for text in texts:
        name = text.get_text()
        if name.isascii():
            continue
        file = font_file(name)
        text.set_text(legible(name))
        if file is not None:
            text.set_fontproperties(FontProperties(fname=file, size=text.get_fontsize()))


def _mean_curves(result: CocoResult) -> Iterator[tuple[str, np.ndarray]]:
    """IoU threshold and (101,) precision, averaged over the categories."""
    precision = result.mean_precision()
    yield _MEAN_IOU, precision.mean(axis=0)
    for iou in _CURVE_IOUS:
        yield f"{iou:.2f}", precision[IOU_THRESHOLDS.index(iou)]


def _curve_rows(result: CocoResult) -> Iterator[tuple[object, ...]]:
    for averaged, curve in _mean_curves(result):
        for recall, precision in zip(RECALLS, curve.tolist()):
            yield ALL_CATEGORIES, averaged, recall, precision, ""
    for i, category in enumerate(result.categories):
        if not category.objects:
            continue
        for iou in _CURVE_IOUS:
            threshold = IOU_THRESHOLDS.index(iou)
            curve, scores = result.precision[threshold, :, i], result.scores[threshold, :, i]
            for recall, precision, score in zip(RECALLS, curve.tolist(), scores.tolist()):
                yield category.name, f"{iou:.2f}", recall, precision, score
