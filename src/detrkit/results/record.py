"""The detections of a run over many images, kept on disk rather than in memory while the run lasts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.common.errors import DetrkitError
from detrkit.common.schema import JsonObject
from detrkit.results.journal import Journal, match_results
from detrkit.results.positions import frame_index, frame_position, is_frame, named, place

if TYPE_CHECKING:
    from detrkit.results.detections import Detections

# What a journal's entry of an image keeps for the documents.
_KEPT = ("file_name", "width", "height", "frame_index", "timestamp")


class Record:
    """The detections of one run, from which its documents and tables are written at the end.

    Those of each image are appended to a journal beside the run's first document, so that a run can be
    resumed however it ended. For a pipe, a device or stdout they are kept in memory.

    Attributes:
        left_over: Number of results of the earlier run that belong to none of this run's images.
        journal: The journal; None if the results are kept in memory.
        info: Where the results come from, and what they depend on.
        fingerprint: Gives the fingerprint of the image at a position.
        videos: Position -> number of the video, as for :meth:`__init__`.
    """

    def __init__(
        self,
        file: Path,
        ids: Sequence[int],
        names: Sequence[str],
        info: JsonObject,
        *,
        fingerprint: Callable[[int], str | None] = lambda position: None,
        drawings: Sequence[str] | None = None,
        videos: Mapping[int, int] | None = None,
    ) -> None:
        """Opens the record; nothing is written before :meth:`start` or :meth:`resume`.

        Args:
            file: The document that the journal is beside; ``-`` for stdout.
            ids: Image ids of all images that the user named, including those that cannot be read.
            names: Their file names.
            info: Where the results come from, and what they depend on.
            fingerprint: Gives the fingerprint of the content of the image at a position; None for one that
                has none.
            drawings: File names of the images' drawings, if they are drawn.
            videos: Position -> number of the video or animation, from 1, for videos and for frames that the
                user named.
        """
        self.left_over = 0
        self._file = file
        self._ids, self._names, self._drawings = ids, names, drawings
        self.videos = videos or {}
        self.fingerprint = fingerprint
        # Position among the inputs -> the image's entry, or its place in the journal.
        self._found: dict[int, JsonObject | int] = {}
        to_file = str(file) != "-" and (file.is_file() or not file.exists())
        self.journal = Journal(_journal_path(file), info, is_entry) if to_file else None
        self.info = self.journal.settings if self.journal else dict(info)

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
            raise DetrkitError(f"--resume needs a file, but {self._file} is a pipe, a device or stdout")
        if self.journal.exists():
            self.journal.hold()
            earlier: Iterable[tuple[JsonObject, int]] = (
                (entry, place) for place, entry in self.journal.entries()
            )
        else:
            entries = self._finished(self.journal)
            earlier = zip(entries, self.journal.start(entries))
        found, others = match_results(earlier, self._positions(), self.fingerprint)
        self._found.update(found)
        self.left_over = len(others)

    def _positions(self) -> Callable[[JsonObject], int | None]:
        """Finds the position of an earlier run's image among this run's."""
        positions = {name: position for position, name in enumerate(self._names)}

        def position_of(image: JsonObject) -> int | None:
            name, index = image["file_name"], image.get("frame_index")
            if name in positions or index is None:
                return positions.get(name)
            video = positions.get(name.removesuffix(f"#frame={index + 1}"))
            return None if video is None else frame_position(video, index)

        return position_of

    def _finished(self, journal: Journal) -> list[JsonObject]:
        """The entries of a run that is complete, where its document holds them."""
        return []

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
        image: dict[str, object] = {"id": self.image_id(position), "file_name": self.name(position)}
        image |= {"width": width, "height": height}
        if detections.frame_index is not None:
            image |= {"frame_index": detections.frame_index, "timestamp": detections.timestamp}
        entry = {
            "image": image,
            "annotations": detections.to_coco(self.image_id(position)),
            "fingerprint": self.fingerprint(position),
        }
        self._found[position] = entry if self.journal is None else self.journal.add(entry)

    def image_id(self, position: int) -> int:
        """The id of an image; 0 for a frame of a video, whose id is its place in the document."""
        return 0 if is_frame(position) else self._ids[position]

    def name(self, position: int) -> str:
        """The file name of an image; that of a frame ends with its number."""
        index = frame_index(position)
        name = self._names[named(position)]
        return name if index is None else f"{name}#frame={index + 1}"

    def detections(self, position: int, names: Mapping[int, str]) -> Detections:
        """What :meth:`add` was given of an image, without masks.

        Args:
            position: Position of an image that has a result.
            names: Label -> class name of the model.
        """
        import numpy as np

        from detrkit.results.detections import Detections

        entry = self._entry(position)
        image, found = entry["image"], entry["annotations"]
        boxes = np.array([one["bbox"] for one in found], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        followed = any("track_id" in one for one in found)
        tracks = np.array([one.get("track_id", -1) for one in found], dtype=np.int64)
        labels = np.array([one["category_id"] for one in found], dtype=np.int64)
        return Detections(
            boxes=boxes,
            scores=np.array([one["score"] for one in found], dtype=np.float32),
            labels=labels,
            names=[names.get(label, str(label)) for label in labels.tolist()],
            image_size=(image["height"], image["width"]),
            frame_index=image.get("frame_index"),
            timestamp=image.get("timestamp"),
            track_ids=tracks if followed else None,
        )

    def in_order(self, positions: Collection[int]) -> list[int]:
        """Positions in the order in which the user named the images."""
        return sorted(positions, key=place)

    def entries(self, positions: Collection[int]) -> Iterator[JsonObject]:
        """What was found in the images at these positions, in the order in which they were named.

        Returns:
            An iterator of ``image`` (as in a COCO document), ``annotations`` and ``fingerprint``.
        """
        numbered = any(is_frame(position) for position in positions)
        for number, position in enumerate(self.in_order(positions), 1):
            entry = self._entry(position)
            # An earlier run may have given it another id: its folder may have had other images before this.
            image: dict[str, object] = {"id": number if numbered else self.image_id(position)}
            image |= {name: entry["image"][name] for name in _KEPT if name in entry["image"]}
            if named(position) in self.videos:
                image["video_id"] = self.videos[named(position)]
            if self._drawings is not None:
                image["drawing"] = self._drawings[named(position)]
            yield {**entry, "image": image}

    def _entry(self, position: int) -> JsonObject:
        entry = self._found[position]
        if isinstance(entry, int):
            assert self.journal is not None  # places are the journal's
            return self.journal.at(entry)
        return entry

    def video_entries(self, positions: Collection[int]) -> list[dict[str, object]]:
        """The ``videos`` of a document: ``id`` and ``file_name`` of those that frames at positions are of."""
        names = {self.videos[p]: self._names[p] for p in map(named, positions) if p in self.videos}
        return [{"id": i, "file_name": re.sub("#frame=[0-9]+$", "", n)} for i, n in sorted(names.items())]

    def tally(self, positions: Collection[int]) -> Counter[int]:
        """How many objects of each label there are in the images at these positions."""
        return Counter(
            found["category_id"] for entry in self.entries(positions) for found in entry["annotations"]
        )

    def close(self) -> None:
        """Removes the journal: all is written."""
        if self.journal is not None:
            self.journal.remove()


def listed_classes(names: Mapping[int, str], used: Collection[int]) -> dict[int, str]:
    """The classes that a document lists, by label in order.

    Args:
        names: Label -> class name of the model.
        used: Labels that were found. Those that COCO left unused ("N/A") are only listed if they were.
    """
    listed = {label: name for label, name in names.items() if name != "N/A" or label in used}
    return dict(sorted({**{label: str(label) for label in used if label not in names}, **listed}.items()))


def is_entry(entry: JsonObject) -> bool:
    """Whether an entry, from a journal or a document, is one that :meth:`Record.add` makes."""
    try:
        image, annotations = entry["image"], entry["annotations"]
        numbers = [(*found["bbox"], found["area"], found["score"]) for found in annotations]
        return (
            isinstance(image["file_name"], str)
            and all(type(image[side]) is int and image[side] > 0 for side in ("width", "height"))
            and _is_whole(image.get("frame_index", 0))
            and isinstance(image.get("timestamp"), (int, float, type(None)))
            and isinstance(entry["fingerprint"], (str, type(None)))
            and all(_is_whole(found.get("track_id", 0)) for found in annotations)
            and all(_is_whole(found["category_id"]) for found in annotations)
            and all(len(values) == 6 and all(map(math.isfinite, values)) for values in numbers)
            and all(0 <= values[-1] <= 1 for values in numbers)
        )
    except (KeyError, TypeError, OverflowError):
        return False


def _is_whole(value: object) -> bool:
    """Whether a value is a number of a class, track or frame."""
    return type(value) is int and 0 <= value < 2**40


def _journal_path(json_file: Path) -> Path:
    return json_file.with_name(f"{json_file.name}.unfinished.jsonl")
