"""Where the results of a run go: a table, a COCO file, a panoptic folder, drawings."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from detrkit.cli.output import check_save_dir, drawing_names, save_image
from detrkit.common.errors import DetrkitError
from detrkit.common.files import read_json, write_json
from detrkit.common.outputs import Output, document_output, has_mark, image_output
from detrkit.common.schema import JsonObject
from detrkit.common.screening import is_plain_name
from detrkit.common.terminal import count, make_table, print_table
from detrkit.inference.inputs import Fingerprints, ImageInput, file_names, image_ids
from detrkit.results.journal import Journal, match_results, position_by_name
from detrkit.results.positions import is_frame

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.detector import Detector
    from detrkit.results.detections import Detections
    from detrkit.results.panoptic import PanopticSegmentation

PANOPTIC_DOCUMENT = "panoptic.json"
PNG_FOLDER = "panoptic"
DRAWING_FOLDER = "pictures"
_PANOPTIC_JOURNAL = "unfinished.jsonl"


_Result = TypeVar("_Result", bound="Detections | PanopticSegmentation")


class Ending(enum.Enum):
    """How a run ended."""

    COMPLETE = enum.auto()
    WITH_FAILURES = enum.auto()
    """Some of the images could not be read."""
    INTERRUPTED = enum.auto()


class Sink(ABC, Generic[_Result]):
    """Takes the results of one run, an image at a time.

    The driver refuses ``outputs`` that would cost the user a file or cannot be written. Then it calls
    ``nothing_left``, ``begin``, ``accept`` for each image, and ``finish``, or ``abort`` if the run has no
    result; then, also after an error, ``close``.

    Attributes:
        lasts: Whether the results so far outlive the process, so that another run can continue.
        left_over: Number of results of an earlier run that belong to none of this run's images.
        outputs: The files that are going to be written.
        redraws: Whether it takes the frames of videos that an earlier run has done, too.
    """

    redraws: bool = False
    lasts: bool = False
    left_over: int = 0
    outputs: Sequence[Output] = ()

    def nothing_left(self) -> str | None:
        """A message if an earlier run has left nothing to do; then the model is not loaded."""
        return None

    def begin(self) -> Collection[int]:
        """Opens the output; returns the positions of the images that an earlier run has done."""
        return ()

    def recall(self, position: int, names: Mapping[int, str]) -> _Result:
        """What an earlier run has found in a frame that :meth:`begin` has named.

        Args:
            position: Position of the frame.
            names: Label -> class name of the model.
        """
        raise NotImplementedError

    @abstractmethod
    def accept(self, position: int, image: Image | None, result: _Result) -> None:
        """Takes the result of the image at a position of the inputs; None if another process has read it."""

    @abstractmethod
    def finish(self, detector: Detector, done: Sequence[int], ending: Ending) -> Sequence[str]:
        """Writes what can only be written at the end.

        Args:
            detector: The model, for the names of its classes.
            done: Positions of the images that have a result in every sink, in order; at least one.
            ending: How the run ended.

        Returns:
            What was found and where it is, for the summary.
        """

    def abort(self) -> None:
        """Removes what :meth:`begin` has made: the run has no result."""

    def close(self) -> None:
        """Lets other processes write the output; called last, however the run ended."""


class ResultTable(Sink[_Result]):
    """A table on stdout.

    Args:
        noun: What is counted in the summary.
        columns: Headings of the columns of text after the image's.
        numbers: Headings of the columns of numbers.
        rows: Gives the cells of a result, a row for each object.
    """

    def __init__(
        self,
        noun: str,
        columns: Sequence[str],
        numbers: Sequence[str],
        rows: Callable[[_Result], Iterator[Sequence[str]]],
    ) -> None:
        self._noun, self._columns, self._numbers, self._rows_of = noun, columns, numbers, rows
        self._found: dict[int, tuple[str, list[Sequence[str]]]] = {}

    def accept(self, position: int, image: Image | None, result: _Result) -> None:
        """Keeps the rows of an image."""
        index = getattr(result, "frame_index", None)
        name = f"{result.source or ''}{'' if index is None else f'#frame={index + 1}'}"
        self._found[position] = (name, list(self._rows_of(result)))

    def finish(self, detector: Detector, done: Sequence[int], ending: Ending) -> Sequence[str]:
        """Prints the table, also of an interrupted run."""
        from rich.text import Text

        table = make_table(["image", *self._columns], self._numbers)
        table.columns[0].overflow = "fold"
        for position in done:
            source, rows = self._found[position]
            for row in rows:
                table.add_row(source, *row)
            if not rows:
                table.add_row(source, Text("(nothing)", style="dim"))
        print_table(table)
        return [self.summary(detector, done)]

    def summary(self, detector: Detector, done: Sequence[int]) -> str:
        """How much there is in the images at these positions."""
        return _counted(sum(len(self._found[position][1]) for position in done), self._noun, done)


class Drawings(Sink[Any]):
    """A folder with each image and what was found in it drawn over it.

    Attributes:
        names: File names of the drawings of all inputs, those of videos among them.
    """

    def __init__(self, folder: Path, inputs: Sequence[ImageInput], *, resume: bool) -> None:
        check_save_dir(folder)
        self._folder, self._resume = folder, resume
        self.names = drawing_names(inputs)
        self._outputs = {
            i: image_output("--save-dir", folder / self.names[i])
            for i, item in enumerate(inputs)
            if not item.video
        }
        self.outputs = list(self._outputs.values())

    def begin(self) -> Collection[int]:
        """An image whose drawing is missing is not done."""
        if not self._resume:
            return ()
        return [i for i, output in self._outputs.items() if has_mark(output.path, output.mark)]

    def accept(self, position: int, image: Image | None, result: Detections | PanopticSegmentation) -> None:
        """Writes the drawing of an image; frames of videos have no drawings of their own."""
        if not is_frame(position):
            save_image(result.draw(image), self._outputs[position].path)

    def finish(self, detector: Detector, done: Sequence[int], ending: Ending) -> Sequence[str]:
        """All is written already."""
        return [f"drawings in {self._folder}"]


class PanopticFolder(Sink["PanopticSegmentation"]):
    """A COCO panoptic document and its PNG files, with a journal beside them until the run is complete."""

    lasts = True

    def __init__(
        self,
        folder: Path,
        inputs: Sequence[ImageInput],
        info: JsonObject,
        fingerprints: Fingerprints,
        drawings: Sequence[str],
        *,
        resume: bool,
    ) -> None:
        check_save_dir(folder)
        check_save_dir(folder / PNG_FOLDER)
        self._folder, self._resume = folder, resume
        self._journal = Journal(folder / _PANOPTIC_JOURNAL, info, _is_panoptic_entry)
        self._fingerprint = fingerprints
        self._ids, self._names, self._drawings = image_ids(inputs), file_names(inputs), drawings
        self._pngs = drawing_names(inputs, ".png")
        self._entries: dict[int, dict[str, Any]] = {}
        self.outputs = [document_output("--save-dir", folder / PANOPTIC_DOCUMENT)]
        self.outputs += [image_output("--save-dir", folder / PNG_FOLDER / name) for name in self._pngs]
        self.outputs.append(self._journal.output("--save-dir"))

    def begin(self) -> Collection[int]:
        """Opens the journal with the entries of an earlier run whose PNG files exist."""
        others: list[dict[str, Any]] = []
        if self._resume:
            earlier = ((entry, entry) for entry in self._earlier_entries())
            found, others = match_results(earlier, position_by_name(self._names), self._fingerprint)
            for position, entry in found.items():
                annotation = {**entry["annotation"], "image_id": self._ids[position]}
                image = {**entry["image"], "id": self._ids[position]}
                if annotation["file_name"] == self._pngs[position] and self._png(position).is_file():
                    self._entries[position] = {**entry, "image": image, "annotation": annotation}
        self.left_over = len(others)
        self._journal.start([*self._entries.values(), *others])
        return self._entries.keys()

    def accept(self, position: int, image: Image | None, result: PanopticSegmentation) -> None:
        """Writes the PNG file, then the entry: an entry stands for a complete file."""
        save_image(result.to_png(), self._png(position))
        height, width = result.image_size
        entry = {
            "image": {
                "id": self._ids[position],
                "file_name": self._names[position],
                "width": width,
                "height": height,
            },
            "annotation": result.to_coco(self._ids[position], self._pngs[position]),
            "fingerprint": self._fingerprint(position),
        }
        self._journal.add(entry)
        self._entries[position] = entry

    def finish(self, detector: Detector, done: Sequence[int], ending: Ending) -> Sequence[str]:
        """Writes the document, unless the run was interrupted."""
        if ending is Ending.INTERRUPTED:
            return []
        entries = [self._entries[position] for position in done]
        segments = [segment for entry in entries for segment in entry["annotation"]["segments_info"]]
        drawn = [{"drawing": f"{DRAWING_FOLDER}/{self._drawings[position]}"} for position in done]
        document = {
            "info": {**self._journal.settings, "fingerprints": [entry["fingerprint"] for entry in entries]},
            "images": [{**entry["image"], **drawing} for entry, drawing in zip(entries, drawn)],
            "annotations": [entry["annotation"] for entry in entries],
            "categories": detector.categories({segment["category_id"] for segment in segments}),
        }
        write_json(document, self._folder / PANOPTIC_DOCUMENT)
        if not self.left_over:
            self._journal.remove()
        found = _counted(len(segments), "segment", done)
        return [found, f"{PANOPTIC_DOCUMENT} and {PNG_FOLDER} in {self._folder}"]

    def abort(self) -> None:
        """Removes the journal, unless it is an earlier run's."""
        if not self._resume:
            self._journal.remove()

    def close(self) -> None:
        """Lets other processes write into the folder."""
        self._journal.close()

    def _png(self, position: int) -> Path:
        return self._folder / PNG_FOLDER / self._pngs[position]

    def _earlier_entries(self) -> list[dict[str, Any]]:
        """The entries of the journal, or of a finished document."""
        if self._journal.exists():
            self._journal.hold()
        entries = [entry for _, entry in self._journal.entries()]
        document = self._folder / PANOPTIC_DOCUMENT
        if entries or not document.is_file():
            return entries
        remedy = "start from scratch without --resume"
        finished = read_json(document, remedy=remedy)
        try:
            self._journal.check(finished["info"], document)
            annotations = {entry["image_id"]: entry for entry in finished["annotations"]}
            entries = [
                {
                    "image": {name: image[name] for name in ("id", "file_name", "width", "height")},
                    "annotation": annotations[image["id"]],
                    "fingerprint": fingerprint,
                }
                for image, fingerprint in zip(
                    finished["images"], finished["info"]["fingerprints"], strict=True
                )
            ]
            if not all(map(_is_panoptic_entry, entries)):
                raise ValueError("an entry is damaged")
            return entries
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DetrkitError(
                f"cannot resume: {document} is not a document of detrkit segment; {remedy}"
            ) from error


def _is_panoptic_entry(entry: JsonObject) -> bool:
    """Whether an entry, from a journal or a document, is one that :class:`PanopticFolder` makes."""
    try:
        image, annotation = entry["image"], entry["annotation"]
        segments = annotation["segments_info"]
        return (
            isinstance(image["file_name"], str)
            and all(type(image[side]) is int and image[side] > 0 for side in ("width", "height"))
            and isinstance(entry["fingerprint"], (str, type(None)))
            and is_plain_name(annotation["file_name"])
            and all(type(s[name]) is int for s in segments for name in ("id", "category_id", "area"))
            and all(0 <= s["score"] <= 1 for s in segments)
        )
    except (KeyError, TypeError):
        return False


def _counted(number: int, noun: str, done: Sequence[int]) -> str:
    return f"{count(number, noun)} in {count(len(done), 'image')}"
