"""COCO's numbers for the boxes of each decoder layer, as in figure 4 of the DETR paper.

In the paper the first layer finds objects several times, which an overlap filter mends; the later layers tell
their queries apart and lose a little by one. So a filter in the detection settings is also left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from detrkit.common.errors import SettingError
from detrkit.common.files import atomic_file
from detrkit.common.tables import write_csv
from detrkit.common.terminal import make_table
from detrkit.common.text import percent
from detrkit.evaluation.charts import DPI, LAYER_FILES, number_or_blank
from detrkit.evaluation.coco import STATISTICS, CocoEvaluator, compare
from detrkit.results.detection_config import DetectionConfig
from detrkit.results.finder import ObjectFinder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from detrkit.results.detections import Detections

_KEEPS_ALL = 1.0  # the IoU of an overlap filter that drops nothing
_COLUMNS = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge")
_UNFILTERED = ("AP", "AP50")


@dataclass(frozen=True)
class LayerScores:
    """COCO's numbers for the boxes of each decoder layer.

    Attributes:
        layers: Those of each layer as the detection settings say, from the first to the last.
        unfiltered: The same without the settings' overlap filter; None if they have none.
        overlap: The IoU of that filter.
    """

    layers: Sequence[Mapping[str, float]]
    unfiltered: Sequence[Mapping[str, float]] | None = None
    overlap: float | None = None

    def to_dict(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        numbers: dict[str, object] = {"overlap": self.overlap, "scores": list(self.layers)}
        return numbers if self.unfiltered is None else {**numbers, "unfiltered": list(self.unfiltered)}

    def table(self) -> Table:
        """The main numbers in percent, a row for each layer."""
        extra = () if self.unfiltered is None else tuple(f"{name} unfiltered" for name in _UNFILTERED)
        table = make_table(["decoder layer"], [*_COLUMNS, *extra])
        for place, stats in enumerate(self.layers):
            numbers = [stats[name] for name in _COLUMNS]
            if self.unfiltered is not None:
                numbers += [self.unfiltered[place][name] for name in _UNFILTERED]
            table.add_row(str(place + 1), *map(percent, numbers))
        return table

    def save(self, folder: Path) -> list[Path]:
        """Writes the numbers as a CSV file and a chart; gives both.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        table, chart = (folder / name for name in LAYER_FILES)
        rows = (
            (place, overlap, *(number_or_blank(stats[name]) for name in STATISTICS))
            for overlap, scores in self._curves()
            for place, stats in enumerate(scores, start=1)
        )
        write_csv(table, ("layer", "overlap_filter", *STATISTICS), rows)
        with atomic_file(chart) as temporary:
            self.draw().savefig(temporary, dpi=DPI, bbox_inches="tight")
        return [table, chart]

    def draw(self) -> Figure:
        """AP and AP50 over the layers, dashed without the overlap filter."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(7, 5))
        axes = figure.add_subplot()
        for (overlap, scores), style in zip(self._curves(), ("-", "--")):
            suffix = f", overlap filter {overlap:g}" if overlap != "" else ""
            for name, color in zip(_UNFILTERED, ("tab:blue", "tab:orange")):
                values = [100 * stats[name] for stats in scores]
                axes.plot(
                    range(1, len(values) + 1), values, style, color=color, marker="o", label=name + suffix
                )
        axes.set(title="Boxes of each decoder layer", xlabel="decoder layer", ylabel="AP in percent")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        return figure

    def _curves(self) -> Iterator[tuple[float | str, Sequence[Mapping[str, float]]]]:
        """The IoU of the overlap filter, empty without one, and the numbers of each layer."""
        yield ("" if self.overlap is None else self.overlap), self.layers
        if self.unfiltered is not None:
            yield "", self.unfiltered


class LayerFinder(ObjectFinder, Protocol):
    """A detector that also gives what the earlier decoder layers find."""

    def stream_layers(
        self,
        images: Sequence[Path],
        batch_size: int,
        *,
        overlaps: Sequence[float | None],
        exif_orientation: bool,
    ) -> Iterator[list[Detections]]:
        """See :meth:`detrkit.Detector.stream_layers`."""


class LayerEvaluator:
    """Collects what all decoder layers find, image by image."""

    def __init__(self, detector: ObjectFinder, evaluator: CocoEvaluator) -> None:
        """Checks that there are decoder layers to look at.

        Args:
            detector: The detector.
            evaluator: Is given what the last layer finds, with the detector's own settings.

        Raises:
            SettingError: The detector does not run on this machine.
        """
        finder: LayerFinder | None = getattr(detector, "stream_layers", None) and detector  # type: ignore[assignment]
        if finder is None:
            raise SettingError("decoder layers are compared on this machine; leave out --ray")
        self._evaluator = evaluator
        self._overlap = _filter_of(detector.detection_config)
        overlaps = (None,) if self._overlap is None else (None, _KEEPS_ALL)
        self._readings = len(overlaps)
        self.stream = partial(finder.stream_layers, overlaps=overlaps)
        # Detections, not entries of results: of all layers these would take gigabytes.
        self._found: list[list[Detections]] = []

    def add(self, image_id: int, found: list[Detections]) -> None:
        """Takes what ``stream`` gives of an image."""
        self._evaluator.add(image_id, found[len(found) // self._readings - 1])
        self._found.append(found)

    def result(self) -> LayerScores:
        """The numbers of all layers on the images so far."""
        scores = [
            self._scores([found[place] for found in self._found]) for place in range(len(self._found[0]))
        ]
        count = len(scores) // self._readings
        return LayerScores(scores[:count], scores[count:] or None, self._overlap)

    def _scores(self, detections: Sequence[Detections]) -> dict[str, float]:
        evaluator, image_ids = self._evaluator.like(), self._evaluator.image_ids
        for image_id, found in zip(image_ids, detections):
            evaluator.add(image_id, found)
        entries = evaluator.results["bbox"]
        return compare(evaluator.ground_truth, entries, "bbox", image_ids=image_ids, confusion=False).stats


def _filter_of(config: DetectionConfig) -> float | None:
    """The IoU of the overlap filter; None if nothing is dropped."""
    return None if config.overlap is None or config.overlap >= _KEEPS_ALL else config.overlap
