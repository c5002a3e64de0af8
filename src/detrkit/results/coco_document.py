"""Detections of many images on their way into one COCO document: kept on disk as they come, not in memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrkit.common.errors import DetrkitError
from detrkit.common.files import write_text
from detrkit.results.journal import Journal

if TYPE_CHECKING:
    from detrkit.results.detections import Detections


class CocoOutput:
    """The document of one run.

    What is found in an image is appended to a journal beside the file, so that a run which ends in any way
    can be gone on with. For a pipe, a device or stdout it is kept in memory.

    Attributes:
        objects: How many were found so far.
        left_over: Results of the earlier run whose images are not among those of this one.
    """

    def __init__(
        self,
        json_file: Path,
        ids: Sequence[int],
        names: Sequence[str],
        settings: dict[str, Any],
        *,
        resume: bool = False,
        pictures: Sequence[Path] | None = None,
    ) -> None:
        """Opens the output, with the results of an earlier run where that is to be gone on with.

        Args:
            json_file: Where the document goes; ``-`` for stdout.
            ids: Image ids of all images that the user named, those that cannot be read too.
            names: Their file names.
            settings: What the results depend on.
            resume: Keep the results of the run that was interrupted.
            pictures: Where each image's drawn picture goes; an earlier result without it does not count.

        Raises:
            DetrkitError: The journal cannot be read or written, or is of a run with other settings.
        """
        self.json_file = json_file
        self.objects = self.left_over = 0
        self._ids, self._names = ids, names
        # Position among the inputs -> the image's entry, or its place in the journal.
        self._found: dict[int, dict[str, Any] | int] = {}
        to_file = str(json_file) != "-" and (json_file.is_file() or not json_file.exists())
        self._journal = Journal(_journal_path(json_file), settings) if to_file else None
        if self._journal is None:
            if resume:
                raise DetrkitError(f"--resume needs a file to go on with, and {json_file} is none")
            return
        self._resume(self._journal, resume, pictures)

    def _resume(self, journal: Journal, resume: bool, pictures: Sequence[Path] | None) -> None:
        if not (resume and journal.path.exists()):
            journal.start()
            return
        positions = {name: position for position, name in enumerate(self._names)}
        for place, entry in journal.entries():
            position = positions.get(entry["image"]["file_name"])
            if position is None:
                self.left_over += 1
            elif position not in self._found and (pictures is None or pictures[position].is_file()):
                self._found[position] = place
                self.objects += len(entry["annotations"])

    @property
    def lasts(self) -> bool:
        """Whether the results outlive the process, so that another one can go on with them."""
        return self._journal is not None

    @property
    def done(self) -> Collection[int]:
        """Positions of the images that have their result."""
        return self._found.keys()

    def add(self, position: int, detections: Detections) -> None:
        """Keeps what was found in an image.

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
        self.objects += len(detections)

    def write(self, names: Mapping[int, str]) -> None:
        """Writes the document: the images in the order that they were named in.

        Args:
            names: Class id -> class name of the model. Those that COCO left unused ("N/A") are only listed
                when something was found of them.

        Raises:
            DetrkitError: The file cannot be written.
        """
        write_text(self._parts(names), self.json_file)

    def document(self, names: Mapping[int, str]) -> dict[str, Any]:
        """The document itself, as :meth:`write` writes it."""
        return dict(json.loads("".join(self._parts(names))))

    def close(self) -> None:
        """Forgets what there is to go on with: all is written."""
        if self._journal is not None:
            self._journal.remove()

    def _parts(self, names: Mapping[int, str]) -> Iterator[str]:
        separator = ""
        yield '{"images": ['
        for entry in self._entries():
            yield separator + json.dumps(entry["image"])
            separator = ", "
        number, separator = 0, ""
        used = set()
        yield '], "annotations": ['
        for entry in self._entries():
            for annotation in entry["annotations"]:
                number += 1
                used.add(annotation["category_id"])
                yield separator + json.dumps({**annotation, "id": number, "image_id": entry["image"]["id"]})
                separator = ", "
        listed = {label: name for label, name in names.items() if name != "N/A" or label in used}
        categories = [{"id": label, "name": name} for label, name in sorted(listed.items())]
        yield f'], "categories": {json.dumps(categories)}}}\n'

    def _entries(self) -> Iterator[dict[str, Any]]:
        for position in sorted(self._found):
            entry = self._found[position]
            if isinstance(entry, int):
                assert self._journal is not None  # places are the journal's
                entry = self._journal.at(entry)
            # Of an earlier run, whose folder may have had other images before this one.
            yield {**entry, "image": {**entry["image"], "id": self._ids[position]}}


def is_complete(json_file: Path, ids: Sequence[int], names: Sequence[str]) -> bool:
    """Whether a document of an earlier run holds all these images and nothing of it waits to be gone on with.

    Raises:
        DetrkitError: The file is no COCO document.
    """
    if _journal_path(json_file).exists() or not json_file.is_file():
        return False
    try:
        images = json.loads(json_file.read_bytes())["images"]
        found = {(image["id"], image["file_name"]) for image in images}
    except (ValueError, KeyError, TypeError) as error:
        raise DetrkitError(
            f"cannot resume: {json_file} is not a document of detrkit detect; start anew without --resume"
        ) from error
    return found >= set(zip(ids, names))


def _journal_path(json_file: Path) -> Path:
    return json_file.with_name(f"{json_file.name}.unfinished.jsonl")
