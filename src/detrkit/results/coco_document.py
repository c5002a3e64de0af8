"""The COCO document of a run over many images, kept on disk rather than in memory while the run lasts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.common.errors import DetrkitError
from detrkit.common.files import read_json, write_text
from detrkit.common.schema import JsonObject
from detrkit.results.journal import Journal, match_results

if TYPE_CHECKING:
    from detrkit.results.detections import Detections


class CocoOutput:
    """The COCO document of one run.

    The detections of each image are appended to a journal beside the file, so that a run can be resumed
    however it ended. For a pipe, a device or stdout they are kept in memory.

    Attributes:
        left_over: Number of results of the earlier run that belong to none of this run's images.
    """

    def __init__(
        self,
        json_file: Path,
        ids: Sequence[int],
        names: Sequence[str],
        info: JsonObject,
        *,
        fingerprint: Callable[[int], str | None] = lambda position: None,
        drawings: Sequence[str] | None = None,
    ) -> None:
        """Opens the output; nothing is written before :meth:`start` or :meth:`resume`.

        Args:
            json_file: The document's file; ``-`` for stdout.
            ids: Image ids of all images that the user named, including those that cannot be read.
            names: Their file names.
            info: Where the document comes from, and what the results depend on.
            fingerprint: Gives the fingerprint of the content of the image at a position; None for one that
                has none.
            drawings: File names of the images' drawings, if they are drawn.
        """
        self.json_file = json_file
        self.left_over = self._written = 0
        self._ids, self._names, self._drawings = ids, names, drawings
        self._fingerprint = fingerprint
        # Position among the inputs -> the image's entry, or its place in the journal.
        self._found: dict[int, JsonObject | int] = {}
        to_file = str(json_file) != "-" and (json_file.is_file() or not json_file.exists())
        self.journal = Journal(_journal_path(json_file), info, _is_entry) if to_file else None
        self._info = self.journal.settings if self.journal else dict(info)

    def start(self) -> None:
        """Begins from scratch.

        Raises:
            DetrkitError: The journal cannot be written, or another process writes this document.
        """
        if self.journal is not None:
            self.journal.start()

    def resume(self) -> None:
        """Begins with the results of an earlier run, finished or not.

        Raises:
            DetrkitError: There is no file, or it cannot be read or written, or is of a run with other
                settings, or another process writes it.
        """
        if self.journal is None:
            raise DetrkitError(f"--resume needs a file, but {self.json_file} is a pipe, a device or stdout")
        if self.journal.exists():
            self.journal.hold()
            earlier: Iterable[tuple[JsonObject, int]] = (
                (entry, place) for place, entry in self.journal.entries()
            )
        else:
            entries = self._finished(self.journal)
            earlier = zip(entries, self.journal.start(entries))
        found, others = match_results(earlier, self._names, self._fingerprint)
        self._found.update(found)
        self.left_over = len(others)

    def is_complete(self) -> bool:
        """Whether the document of an earlier run contains just these images and has no journal to continue.

        Raises:
            DetrkitError: The file is not a COCO document of such a run, or was made with other settings.
        """
        if self.journal is None or self.journal.exists():
            return False
        entries = self._finished(self.journal)
        found, others = match_results(((entry, entry) for entry in entries), self._names, self._fingerprint)
        same_ids = all(entry["image"]["id"] == self._ids[position] for position, entry in found.items())
        return bool(entries) and same_ids and not others and len(found) == len(self._ids)

    def _finished(self, journal: Journal) -> list[JsonObject]:
        """The entries of a finished document; none if there is no file."""
        if not self.json_file.is_file() or not self.json_file.stat().st_size:
            return []
        remedy = "start from scratch without --resume"
        document = read_json(self.json_file, remedy=remedy)
        try:
            journal.check(document["info"], self.json_file)
            entries = {
                image["id"]: {"image": image, "annotations": [], "fingerprint": found}
                for image, found in zip(document["images"], document["info"]["fingerprints"], strict=True)
            }
            for annotation in document["annotations"]:
                entries[annotation["image_id"]]["annotations"].append(annotation)
            if not all(map(_is_entry, entries.values())):
                raise ValueError("an entry is damaged")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DetrkitError(
                f"cannot resume: {self.json_file} is not a document of detrkit detect; {remedy}"
            ) from error
        return list(entries.values())

    @property
    def lasts(self) -> bool:
        """Whether the results outlive the process, so that another one can continue."""
        return self.journal is not None

    @property
    def done(self) -> Collection[int]:
        """Positions of the images that have a result."""
        return self._found.keys()

    def add(self, position: int, detections: Detections) -> None:
        """Keeps the detections of an image; they replace earlier ones of the same image.

        Raises:
            DetrkitError: The journal cannot be written.
        """
        height, width = detections.image_size
        image = {
            "id": self._ids[position],
            "file_name": self._names[position],
            "width": width,
            "height": height,
        }
        entry = {
            "image": image,
            "annotations": detections.to_coco(self._ids[position]),
            "fingerprint": self._fingerprint(position),
        }
        self._found[position] = entry if self.journal is None else self.journal.add(entry)

    def write(self, names: Mapping[int, str], positions: Collection[int] | None = None) -> int:
        """Writes the document, with the images in the order in which they were named.

        Args:
            names: Label -> class name of the model. Those that COCO left unused ("N/A") are only listed if
                objects of them were found.
            positions: Positions of the images to list; None for all that have a result.

        Returns:
            Number of objects in the document.

        Raises:
            DetrkitError: The file cannot be written.
        """
        write_text(self._parts(names, self.done if positions is None else positions), self.json_file)
        return self._written

    def document(self, names: Mapping[int, str]) -> dict[str, object]:
        """The document itself, as :meth:`write` writes it."""
        return dict(json.loads("".join(self._parts(names, self.done))))

    def close(self) -> None:
        """Removes the journal: all is written."""
        if self.journal is not None:
            self.journal.remove()

    def _parts(self, names: Mapping[int, str], positions: Collection[int]) -> Iterator[str]:
        separator = ""
        if self._info:
            info = {**self._info, "fingerprints": [self._fingerprint(i) for i in sorted(positions)]}
            yield f'{{"info": {json.dumps(info)}, "images": ['
        else:
            yield '{"images": ['
        for entry in self._entries(positions):
            yield separator + json.dumps(entry["image"])
            separator = ", "
        number, separator = 0, ""
        used = set()
        yield '], "annotations": ['
        for entry in self._entries(positions):
            for annotation in entry["annotations"]:
                number += 1
                used.add(annotation["category_id"])
                yield separator + json.dumps({**annotation, "id": number, "image_id": entry["image"]["id"]})
                separator = ", "
        self._written = number
        listed = {label: name for label, name in names.items() if name != "N/A" or label in used}
        categories = [{"id": label, "name": name} for label, name in sorted(listed.items())]
        yield f'], "categories": {json.dumps(categories)}}}\n'

    def _entries(self, positions: Collection[int]) -> Iterator[JsonObject]:
        for position in sorted(positions):
            entry = self._found[position]
            if isinstance(entry, int):
                assert self.journal is not None  # places are the journal's
                entry = self.journal.at(entry)
            # An earlier run may have given it another id: its folder may have had other images before this.
            image = {name: entry["image"][name] for name in ("file_name", "width", "height")}
            drawing = {} if self._drawings is None else {"drawing": self._drawings[position]}
            yield {**entry, "image": {"id": self._ids[position], **image, **drawing}}


def _is_entry(entry: JsonObject) -> bool:
    """Whether an entry, from a journal or a document, is one that :meth:`CocoOutput.add` makes."""
    try:
        image, annotations = entry["image"], entry["annotations"]
        numbers = [(*found["bbox"], found["area"], found["score"]) for found in annotations]
        return (
            isinstance(image["file_name"], str)
            and all(type(image[side]) is int and image[side] > 0 for side in ("width", "height"))
            and isinstance(entry["fingerprint"], (str, type(None)))
            and all(type(found["category_id"]) is int for found in annotations)
            and all(len(values) == 6 and all(map(math.isfinite, values)) for values in numbers)
            and all(0 <= values[-1] <= 1 for values in numbers)
        )
    except (KeyError, TypeError, OverflowError):
        return False


def _journal_path(json_file: Path) -> Path:
    return json_file.with_name(f"{json_file.name}.unfinished.jsonl")
