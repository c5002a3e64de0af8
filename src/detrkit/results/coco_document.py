"""The COCO document of a run over many images, kept on disk rather than in memory while the run lasts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.common.errors import DetrkitError
from detrkit.common.files import write_text
from detrkit.common.schema import JsonObject
from detrkit.results.journal import Journal

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
        settings: JsonObject,
        *,
        resume: bool = False,
    ) -> None:
        """Opens the output, with the results of an earlier run if that is to be resumed.

        Args:
            json_file: The document's file; ``-`` for stdout.
            ids: Image ids of all images that the user named, including those that cannot be read.
            names: Their file names.
            settings: What the results depend on.
            resume: Keep the results of the run that was interrupted.

        Raises:
            DetrkitError: The journal cannot be read or written, or is of a run with other settings.
        """
        self.json_file = json_file
        self.left_over = self._written = 0
        self._ids, self._names = ids, names
        # Position among the inputs -> the image's entry, or its place in the journal.
        self._found: dict[int, JsonObject | int] = {}
        to_file = str(json_file) != "-" and (json_file.is_file() or not json_file.exists())
        self._journal = Journal(_journal_path(json_file), settings) if to_file else None
        if self._journal is None:
            if resume:
                raise DetrkitError(f"--resume needs a file, but {json_file} is a pipe, a device or stdout")
            return
        self._resume(self._journal, resume)

    def _resume(self, journal: Journal, resume: bool) -> None:
        if not (resume and journal.path.exists()):
            journal.start()
            return
        positions = {name: position for position, name in enumerate(self._names)}
        for place, entry in journal.entries():
            position = positions.get(entry["image"]["file_name"])
            if position is None:
                self.left_over += 1
            else:
                self._found[position] = place

    @property
    def lasts(self) -> bool:
        """Whether the results outlive the process, so that another one can continue."""
        return self._journal is not None

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
        entry = {"image": image, "annotations": detections.to_coco(self._ids[position])}
        self._found[position] = entry if self._journal is None else self._journal.add(entry)

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
        if self._journal is not None:
            self._journal.remove()

    def _parts(self, names: Mapping[int, str], positions: Collection[int]) -> Iterator[str]:
        separator = ""
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
                assert self._journal is not None  # places are the journal's
                entry = self._journal.at(entry)
            # An earlier run may have given it another id: its folder may have had other images before this.
            yield {**entry, "image": {**entry["image"], "id": self._ids[position]}}


def is_complete(json_file: Path, ids: Sequence[int], names: Sequence[str]) -> bool:
    """Whether the document of an earlier run contains all these images and has no journal to continue.

    Raises:
        DetrkitError: The file is not a COCO document.
    """
    if _journal_path(json_file).exists() or not json_file.is_file():
        return False
    try:
        images = json.loads(json_file.read_bytes())["images"]
        found = {(image["id"], image["file_name"]) for image in images}
    except (ValueError, KeyError, TypeError) as error:
        raise DetrkitError(
            f"cannot resume: {json_file} is not a document of detrkit detect; start from scratch without "
            "--resume"
        ) from error
    return found >= set(zip(ids, names))


def _journal_path(json_file: Path) -> Path:
    return json_file.with_name(f"{json_file.name}.unfinished.jsonl")
