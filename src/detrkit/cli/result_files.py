"""The files that ``detrkit detect`` writes of its results, and the table that it prints without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.cli.sinks import Ending, ResultTable, Sink
from detrkit.common.errors import DetrkitError
from detrkit.common.files import write_text
from detrkit.common.outputs import Output, document_output
from detrkit.common.schema import JsonObject
from detrkit.common.tables import csv_lines
from detrkit.common.terminal import count, say
from detrkit.inference.inputs import Fingerprints, ImageInput, file_names, image_ids, video_numbers
from detrkit.results.coco_document import CocoOutput, coco_parts
from detrkit.results.record import Record, listed_classes
from detrkit.results.tables import (
    COUNTS_MARKS,
    LINES_MARK,
    OBJECTS_MARK,
    count_columns,
    count_row,
    json_line,
    object_columns,
    object_rows,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.detector import Detector
    from detrkit.results.detections import Detections

_LINES = (".jsonl", ".ndjson")
_CLASSES_IN_SUMMARY = 8


@dataclass(frozen=True)
class ResultPaths:
    """Where the user wants the results.

    Attributes:
        json: One COCO document, or by its suffix one line of JSON for each image.
        csv: One row for each object.
        counts: One row for each image.
    """

    json: Path | None = None
    csv: Path | None = None
    counts: Path | None = None

    def __bool__(self) -> bool:
        return bool(self.options)

    @property
    def options(self) -> dict[str, Path]:
        """Option -> file, of those that were given."""
        given = {"--json": self.json, "--csv": self.csv, "--counts": self.counts}
        return {option: path for option, path in given.items() if path is not None}

    @property
    def has_lines(self) -> bool:
        """Whether ``json`` is one line for each image."""
        return self.json is not None and self.json.suffix.lower() in _LINES

    def outputs(self) -> list[Output]:
        """The files, with the marks by which a later run knows them."""
        found = []
        if self.json is not None:
            lines = Output("--json", self.json, LINES_MARK)
            found.append(lines if self.has_lines else document_output("--json", self.json))
        if self.csv is not None:
            found.append(Output("--csv", self.csv, OBJECTS_MARK))
        if self.counts is not None:
            found.append(Output("--counts", self.counts, COUNTS_MARKS))
        return found

    def check(self) -> None:
        """Raises a DetrkitError if two of them are stdout."""
        both = [option for option, path in self.options.items() if str(path) == "-"]
        if len(both) > 1:
            raise DetrkitError(f"{' and '.join(both)} cannot both go to stdout; name a file for one of them")


class ResultFiles(Sink["Detections"]):
    """COCO document, lines of JSON and tables, also of an interrupted run.

    A journal is beside the first of them until the run is complete.
    """

    def __init__(
        self,
        paths: ResultPaths,
        inputs: Sequence[ImageInput],
        info: JsonObject,
        fingerprints: Fingerprints,
        drawings: Sequence[str] | None = None,
        *,
        threshold: str,
        tracks: bool = False,
        resume: bool,
    ) -> None:
        paths.check()
        self._paths, self._resume, self._images = paths, resume, len(inputs)
        option, file = _first_file(paths)
        self._file = file
        self._threshold = threshold
        kind = CocoOutput if file == paths.json and not paths.has_lines else Record
        self._record = kind(
            file,
            image_ids(inputs),
            file_names(inputs),
            info,
            fingerprint=fingerprints,
            drawings=drawings,
            videos=video_numbers(inputs),
        )
        self._columns = {"frames": bool(self._record.videos), "tracks": tracks}
        self.lasts = self._record.lasts
        self.outputs = paths.outputs()
        if self._record.journal is not None:
            self.outputs.append(self._record.journal.output(option))

    def nothing_left(self) -> str | None:
        """The document contains all images and has no journal, and no other file is made from it."""
        record = self._record
        if not (self._resume and isinstance(record, CocoOutput) and record.is_complete()):
            return None
        if len(self._paths.options) > 1:
            return None
        images = count(self._images, "image")
        return f"{self._file} already contains all {images}; leave out --resume to start from scratch."

    def begin(self) -> Collection[int]:
        """Opens the journal."""
        if self._resume:
            self._record.resume()
            if not self._record.done and not isinstance(self._record, CocoOutput) and self._file.exists():
                say(f"{self._file} has no journal to continue from; all images are processed again.")
        else:
            self._record.start()
        self.left_over = self._record.left_over
        return self._record.done

    def recall(self, position: int, names: Mapping[int, str]) -> Detections:
        """What an earlier run has found, from the journal."""
        return self._record.detections(position, names)

    def accept(self, position: int, image: Image | None, result: Detections) -> None:
        """Adds the detections to the journal."""
        self._record.add(position, result)

    def finish(self, detector: Detector, done: Sequence[int], ending: Ending) -> Sequence[str]:
        """Writes the files; removes the journal if no later run can need it."""
        record, paths = self._record, self._paths
        counts = record.tally(done)
        names = detector.names
        if paths.csv is not None:
            rows = (
                row
                for entry in record.entries(done)
                for row in object_rows(entry["image"], entry["annotations"], names, **self._columns)
            )
            write_text(csv_lines(object_columns(**self._columns), rows), paths.csv)
        if paths.counts is not None:
            classes = listed_classes(names, counts)
            rows = (
                count_row(entry["image"], entry["annotations"], classes, frames=self._columns["frames"])
                for entry in record.entries(done)
            )
            write_text(csv_lines(count_columns(classes, frames=self._columns["frames"]), rows), paths.counts)
        if paths.json is not None:
            write_text(self._json(names, done), paths.json)
        # Who resumes may want to try the images that failed again.
        retried = self._resume and ending is Ending.WITH_FAILURES
        if not (self.left_over or retried or ending is Ending.INTERRUPTED):
            record.close()
        files = [str(path) for path in paths.options.values() if str(path) != "-"]
        where = [f"results in {' and '.join(files)}"] if files else []
        return [summary(len(done), counts, names, self._threshold), *where]

    def _json(self, names: Mapping[int, str], done: Sequence[int]) -> Iterator[str]:
        if not self._paths.has_lines:
            return coco_parts(self._record, names, done)
        entries = self._record.entries(done)
        return (json_line(entry["image"], entry["annotations"], names) for entry in entries)

    def abort(self) -> None:
        """Removes the journal, unless it is an earlier run's, whose images may only be out of reach now."""
        if not self._resume:
            self._record.close()

    def close(self) -> None:
        """Lets other processes write the documents."""
        if self._record.journal is not None:
            self._record.journal.close()


class DetectionTable(ResultTable["Detections"]):
    """A row on stdout for each object.

    Args:
        threshold: The minimum score in words.
    """

    def __init__(self, threshold: str) -> None:
        super().__init__("object", ["object"], ["score", "x0", "y0", "x1", "y1"], _cells)
        self._threshold = threshold
        self._counts: Counter[int] = Counter()

    def accept(self, position: int, image: Image | None, result: Detections) -> None:
        """Keeps the rows of an image, and counts its objects."""
        super().accept(position, image, result)
        self._counts.update(result.labels.tolist())

    def summary(self, detector: Detector, done: Sequence[int]) -> str:
        """How many objects of each class there are."""
        return summary(len(done), self._counts, detector.names, self._threshold)


def summary(images: int, counts: Counter[int], names: Mapping[int, str], threshold: str) -> str:
    """What a run has found: "87 images, 1,312 objects (RBC 1,020, WBC 292) at threshold 0.5".

    Args:
        images: Number of images.
        counts: Label -> number of objects.
        names: Label -> class name.
        threshold: The minimum score in words.
    """
    most = counts.most_common()
    shown = [f"{names.get(label, str(label))} {number:,}" for label, number in most[:_CLASSES_IN_SUMMARY]]
    if rest := most[_CLASSES_IN_SUMMARY:]:
        shown.append(f"{len(rest)} other classes {sum(number for _, number in rest):,}")
    by_class = f" ({', '.join(shown)})" if shown else ""
    objects = count(counts.total(), "object")
    return f"{count(images, 'image')}, {objects}{by_class} at {threshold}"


def _cells(detections: Detections) -> Iterator[Sequence[str]]:
    for found in detections:
        yield found.name, f"{found.score:.3f}", *(f"{value:.1f}" for value in found.box)


def _first_file(paths: ResultPaths) -> tuple[str, Path]:
    """The option and file that the journal is beside: the first that stays, or what there is."""
    given = list(paths.options.items())
    lasting = [(o, p) for o, p in given if str(p) != "-" and (p.is_file() or not p.exists())]
    return (lasting or given)[0]
