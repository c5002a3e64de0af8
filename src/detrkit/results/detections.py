"""The objects found in one image: boxes, scores, classes and masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, overload

import numpy as np

from detrkit.common.errors import ImageError, MissingExtraError
from detrkit.common.schema import Annotation, JsonObject

if TYPE_CHECKING:
    import pandas
    import supervision
    from PIL.Image import Image

    from detrkit.processing.images import ImageSource
    from detrkit.results.panoptic import PanopticSegmentation
    from detrkit.results.tables import Cell

Index: TypeAlias = slice | np.ndarray | Sequence[int] | Sequence[bool]
"""Chooses among detections."""


class Detection(NamedTuple):
    """One detected object.

    Attributes:
        box: (4,) float32, x0, y0, x1, y1 in pixels of the original image.
        score: Confidence in [0, 1].
        label: Class id.
        name: Class name.
        mask: (height, width) bool, or None.
        track_id: The same for an object in all frames that it was followed through; None if it is not.
    """

    box: np.ndarray
    score: float
    label: int
    name: str
    mask: np.ndarray | None = None
    track_id: int | None = None


@dataclass(eq=False, repr=False)
class Detections:
    """The objects found in one image, the most confident first.

    ``len()`` counts them, iterating gives a ``Detection`` each, and indexing takes an integer (a
    ``Detection``) or a slice, a boolean mask or a list of positions (``Detections``):
    ``detections[detections.scores > 0.9]``.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels of the original image. As in the original
            implementations, a box may reach a little over the border.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 class ids.
        names: N class names.
        image_size: Height and width of the original image in pixels.
        masks: (N, height, width) bool, or None where the model gives none.
        source: File name or address of the image, where it came from one.
        exif_orientation: Whether the boxes refer to the image turned as its EXIF entry says.
        frame_index: Number of the frame, from 0, if the image is one of a video or animation.
        timestamp: Seconds from the first frame, if that is known.
        track_ids: (N,) int64, the same number for an object in all frames that it was followed through, -1
            for one that is not followed (yet); None where nothing is.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    image_size: tuple[int, int]
    masks: np.ndarray | None = None
    source: str | None = None
    exif_orientation: bool = False
    frame_index: int | None = None
    timestamp: float | None = None
    track_ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (self._row(i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Detection: ...

    @overload
    def __getitem__(self, index: Index) -> Detections: ...

    def __getitem__(self, index: int | Index) -> Detection | Detections:
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            return self._row(int(index))
        chosen = np.arange(len(self))[_as_index(index)]
        return Detections(
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            names=[self.names[i] for i in chosen],
            image_size=self.image_size,
            masks=None if self.masks is None else self.masks[chosen],
            source=self.source,
            exif_orientation=self.exif_orientation,
            frame_index=self.frame_index,
            timestamp=self.timestamp,
            track_ids=None if self.track_ids is None else self.track_ids[chosen],
        )

    def __repr__(self) -> str:
        return summary(self)

    def _row(self, i: int) -> Detection:
        mask = None if self.masks is None else self.masks[i]
        score, label = float(self.scores[i]), int(self.labels[i])
        return Detection(self.boxes[i], score, label, self.names[i], mask, self._track(i))

    def _track(self, i: int) -> int | None:
        return None if self.track_ids is None or self.track_ids[i] < 0 else int(self.track_ids[i])

    def to_coco(self, image_id: int = 0, first_id: int = 1) -> list[Annotation]:
        """The detections as entries of a COCO document's ``annotations`` (or of a COCO results file).

        Args:
            image_id: Id of the image.
            first_id: ``id`` of the first entry; the others count on from it.

        Returns:
            A dict for each detection: ``id``, ``image_id``, ``category_id``, ``bbox`` (x, y of the top left
            corner, width, height, in pixels), ``area`` (of the box, in pixels) and ``score``. An object
            that is followed has a ``track_id`` too.
        """
        sizes = self.boxes[:, 2:] - self.boxes[:, :2]
        entries: list[Annotation] = [
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": int(self.labels[i]),
                "bbox": [shortest_float(v) for v in (*box[:2], *size)],
                "area": shortest_float(size[0] * size[1]),
                "score": shortest_float(self.scores[i]),
            }
            for i, (box, size) in enumerate(zip(self.boxes, sizes))
        ]
        for i, entry in enumerate(entries):
            if (track := self._track(i)) is not None:
                entry["track_id"] = track
        return entries

    def to_rows(self) -> list[dict[str, Cell]]:
        """The detections as rows of a table, those of ``detrkit detect --csv``.

        Returns:
            For each detection ``file_name`` (the source), ``label``, ``name``, ``score``, the corners ``x0``,
            ``y0``, ``x1``, ``y1`` and the image's ``width`` and ``height`` in pixels; for a frame also
            ``frame_index`` and ``timestamp``, with tracks ``track_id``.
        """
        columns, rows = self._table()
        return [dict(zip(columns, row)) for row in rows]

    def to_pandas(self) -> pandas.DataFrame:
        """The detections as a ``pandas.DataFrame`` with a row for each, and the columns of :meth:`to_rows`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("Detections.to_pandas()", package="pandas") from error
        columns, rows = self._table()
        return pandas.DataFrame(rows, columns=columns)

    def _table(self) -> tuple[list[str], list[list[Cell]]]:
        from detrkit.results.tables import object_columns, object_rows

        height, width = self.image_size
        image: JsonObject = {"file_name": self.source, "width": width, "height": height}
        if frames := self.frame_index is not None:
            image = {**image, "frame_index": self.frame_index, "timestamp": self.timestamp}
        tracks = self.track_ids is not None
        names = dict(zip(self.labels.tolist(), self.names))
        rows = object_rows(image, self.to_coco(), names, frames=frames, tracks=tracks)
        return object_columns(frames=frames, tracks=tracks), list(rows)

    def to_supervision(self) -> supervision.Detections:
        """The detections as ``supervision.Detections``, with the names under ``data["class_name"]``.

        Raises:
            MissingExtraError: The supervision package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise MissingExtraError("Detections.to_supervision()", "supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            mask=None if self.masks is None else self.masks.astype(bool),
            data={"class_name": np.array(self.names, dtype=str)},
            tracker_id=None if self.track_ids is None else self.track_ids.copy(),
        )

    def draw(self, image: ImageSource | None = None) -> Image:
        """Draws boxes, names and scores on an image.

        Args:
            image: The image that was given to the detector (path, address, PIL image, array or tensor).
                When left out, the file or address that the detections came from is read again.

        Returns:
            A new RGB image of the same size.

        Raises:
            ImageError: The image cannot be read, or does not have the size that the boxes refer to.
        """
        from detrkit.results.drawing import class_color, draw_boxes

        background = image_of(self, image, "boxes")
        captions = [
            f"{found.name}{'' if found.track_id is None else f' #{found.track_id}'} {found.score:.2f}"
            for found in self
        ]
        return draw_boxes(
            background, self.boxes, captions, [class_color(int(label)) for label in self.labels]
        )


def summary(results: Detections | PanopticSegmentation) -> str:
    """What ``repr()`` says of the results of an image: how many there are of which class."""
    height, width = results.image_size
    where = f" in {results.source}" if results.source else ""
    counts = ", ".join(f"{count} {name}" for name, count in Counter(results.names).most_common())
    head = f"{type(results).__name__}({len(results)}{where}, {width}x{height}"
    return f"{head}: {counts})" if counts else f"{head})"


def image_of(results: Detections | PanopticSegmentation, image: ImageSource | None, what: str) -> Image:
    """The image that results are drawn on: by default their own source; errors call the results ``what``.

    Raises:
        ImageError: The image cannot be read, or does not have the size that the results refer to.
    """
    from detrkit.processing.images import load_image

    if image is None and results.source is None:
        raise ImageError(f"these {what} did not come from a file; pass the image to draw()")
    if image is None and getattr(results, "frame_index", None) is not None:
        raise ImageError(f"these {what} are of a frame of {results.source}; pass the frame to draw()")
    source = results.source if image is None else image
    background = load_image(source, exif_orientation=results.exif_orientation)
    height, width = results.image_size
    if background.size != (width, height):
        raise ImageError(
            f"the {what} refer to an image of {width}x{height} pixels, but the image to draw on has "
            f"{background.width}x{background.height}"
        )
    return background


def _as_index(index: Index | bool) -> slice | np.ndarray:
    if isinstance(index, slice):
        return index
    index = np.asarray(index)
    return index.astype(np.int64) if index.size == 0 and index.dtype != bool else index


def shortest_float(value: np.float32) -> float:
    """The float with the fewest digits that is the same float32; keeps JSON files small and exact."""
    return float(str(np.float32(value)))
