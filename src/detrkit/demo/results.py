"""What the demo shows of one image: a drawing, a legend, a table and a document, at any threshold."""

from __future__ import annotations

import html
import os
import secrets
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrkit.common.errors import DetrkitError, ImageError, SettingError
from detrkit.common.terminal import count
from detrkit.results.drawing import Color, class_color, segment_colors

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.attention.maps import Attention
    from detrkit.inference.detector import Detector
    from detrkit.inference.predictions import Prediction
    from detrkit.inference.tiles import TiledPrediction

MIN_THRESHOLD = 0.1
"""What the sliders begin with; a model is run for all thresholds from here on."""

MAX_PIXELS = 25_000_000
"""Largest image that the page takes."""

_KEPT_RESULTS = 128
_MOST_TOGETHER = 8


def read_upload(path: str, name: str) -> Image:
    """Reads an image that a visitor gave, turned as their browser shows it.

    An ImageError says the visitor's ``name`` for it rather than its ``path`` on the server.
    """
    from detrkit.common.limits import ImageLimits
    from detrkit.processing.images import load_image

    try:
        return load_image(path, exif_orientation=True, limits=ImageLimits(max_pixels=MAX_PIXELS))
    except ImageError as error:
        said = str(error).replace(path, name)
        if f"exceeds {MAX_PIXELS}" in said:
            said = f"{name}: more than {MAX_PIXELS // 10**6} million pixels; shrink the image and try again"
        raise ImageError(said) from error


@dataclass(frozen=True)
class View:
    """What a tab shows.

    Attributes:
        drawing: The image with what was found drawn on it.
        details: Summary, legend and table as HTML.
        file_stem: How files of this view are called, without suffix.
        document: The COCO document that the command line writes; None if there is none to download.
    """

    drawing: Image
    details: str
    file_stem: str
    document: dict[str, Any] | None = None


@dataclass
class Result:
    """An image that a model has seen.

    Attributes:
        path: Where the server has the image. It is read again for each drawing, as images in memory would
            cost far more than what the model said of them.
        name: What the visitor calls it.
        detector: The model.
        prediction: What it said.
        model: The model's name.
        attention: What the queries of the detected objects attend to, the most confident object first; None
            before ``look_inside``.
    """

    path: str
    name: str
    detector: Detector
    prediction: Prediction | TiledPrediction
    model: str
    attention: Attention | None = None

    @classmethod
    def of(cls, path: str, name: str, detector: Detector, model: str) -> Result:
        """Runs a model on an image; an ImageError if it cannot be read or is too large."""
        least = min(MIN_THRESHOLD, detector.detection_config.least_threshold)
        image = read_upload(path, name)
        in_tiles = detector.detection_config.cuts((image.height, image.width))
        prediction = (detector.predict_in_tiles if in_tiles else detector.predict)(image, least)
        return cls(path, name, detector, prediction, model)

    def boxes(self, threshold: float | None) -> View:
        """The boxes that score higher than a threshold, by default the model's own.

        The document is that of ``detrkit detect --json``.
        """
        from detrkit.inference.inputs import ImageInput, image_ids
        from detrkit.results.coco_document import CocoOutput

        found = self.prediction.detections(threshold)
        output = CocoOutput(Path("-"), image_ids([ImageInput(self.name)]), [self.name], {})
        output.add(0, found)
        rows = []
        for one in found:
            x0, y0, x1, y1 = one.box
            numbers = [f"{one.score:.2f}", *(f"{value:.0f}" for value in (x0, y0, x1 - x0, y1 - y0))]
            rows.append((class_color(one.label), one.name, numbers))
        return View(
            drawing=found.draw(read_upload(self.path, self.name)),
            details=_details(
                "object",
                self._described(threshold),
                ("score", "x", "y", "width", "height"),
                "Boxes in pixels from the top left corner of the image",
                rows,
            ),
            file_stem=f"{_stem(self.name)}-boxes",
            document=output.document(self.detector.names),
        )

    def segments(self, threshold: float) -> View:
        """The panoptic map; the document is that of ``detrkit segment --save-dir``.

        Raises:
            SettingError: The model gives no masks.
        """
        from detrkit.inference.inputs import ImageInput, image_ids

        found = self.prediction.segments(threshold)
        image_id = image_ids([ImageInput(self.name)])[0]
        height, width = found.image_size
        labels = [int(segment["category_id"]) for segment in found.segments]
        colors = segment_colors(labels)
        rows = []
        for segment, name, color in zip(found.segments, found.names, colors):
            kind = "thing" if segment["isthing"] else "stuff"
            share = f"{100 * segment['area'] / (width * height):.1f} %"
            rows.append((color, name, [kind, f"{segment['score']:.2f}", share]))
        return View(
            drawing=found.draw(read_upload(self.path, self.name)),
            details=_details(
                "segment",
                f"{threshold:.2f}",
                ("kind", "score", "area"),
                "Segments, things one by one and stuff as one for each class",
                rows,
            ),
            file_stem=f"{_stem(self.name)}-segments",
            document={
                "info": {"model": self.model, "threshold": threshold, "exif_orientation": True},
                "images": [{"id": image_id, "file_name": self.name, "width": width, "height": height}],
                "annotations": [found.to_coco(image_id, f"{_stem(self.name)}.png")],
                "categories": self.detector.categories(set(labels)),
            },
        )

    def look_inside(self) -> None:
        """Runs the model once more, for its attention.

        Raises:
            SettingError: No object scores high enough, or the model does not tell its attention.
        """
        from detrkit.attention.maps import decoder_attention

        if self.attention is None:
            drawing = read_upload(self.path, self.name)
            self.attention = decoder_attention(self.detector, drawing, self.prediction.min_threshold)

    def _described(self, threshold: float | None) -> str:
        """The threshold in words, after "above"."""
        if threshold is None:
            return self.detector.detection_config.describe(bare=True)
        return f"{threshold:.2f}"

    def attending(self, threshold: float | None) -> list[str]:
        """What can be chosen in ``attention_of``: the objects that ``boxes`` shows."""
        assert self.attention is not None
        config = self.detector.detection_config.with_options(threshold=threshold)
        found = self.attention.detections
        return [
            f"{place}: {one.name} {one.score:.2f}"
            for place, one in enumerate(found or (), start=1)
            if one.score > config.threshold_of(one.name)
        ]

    def attention_together(self, threshold: float | None) -> View:
        """What the queries of the most confident objects attend to, in one drawing.

        Raises:
            SettingError: No object scores higher than the threshold.
        """
        objects = self.attending(threshold)
        if not objects:
            raise SettingError(
                f"no object scores above {self._described(threshold)}; lower the threshold of objects"
            )
        return self.attention_of(range(min(len(objects), _MOST_TOGETHER)))

    def attention_of(self, objects: Sequence[int]) -> View:
        """What some objects' queries attend to in the last layer of the decoder.

        Args:
            objects: Their positions, the most confident object is 0.
        """
        from detrkit.attention.drawing import draw_attention

        assert self.attention is not None
        chosen = self.attention[list(objects)]
        assert chosen.detections is not None
        # Objects of one class must differ, so a colour means an object here.
        colors = [class_color(place) for place in range(len(chosen))]
        keys = [(color, one.name, f"{one.score:.2f}") for one, color in zip(chosen.detections, colors)]
        return View(
            drawing=draw_attention(read_upload(self.path, self.name), chosen, colors=colors),
            details='<p class="detrkit-summary" role="status">Where the decoder looks for '
            f"{count(len(chosen), 'object')}</p>"
            f"{_legend('objects', keys)}",
            file_stem=f"{_stem(self.name)}-attention",
        )


class ResultStore:
    """The latest results, of which visitors may move the thresholds, under names that nobody can guess."""

    def __init__(self, capacity: int = _KEPT_RESULTS) -> None:
        self._capacity = capacity
        self._results: OrderedDict[str, Result] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._results)

    def put(self, result: Result) -> str:
        """Keeps a result, the one unused for longest makes room; returns its name."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._results[token] = result
            while len(self._results) > self._capacity:
                self._results.popitem(last=False)
        return token

    def get(self, token: str) -> Result:
        """The result of this name.

        Raises:
            DetrkitError: It is not kept any more.
        """
        with self._lock:
            if token not in self._results:
                raise DetrkitError("this image is no longer available; choose it again")
            self._results.move_to_end(token)
            return self._results[token]

    def retain(self, is_kept: Callable[[str], bool]) -> None:
        """Forgets the results of all models but those whose names are to be kept."""
        with self._lock:
            for token in [token for token, result in self._results.items() if not is_kept(result.model)]:
                del self._results[token]

    def discard(self, token: str | None) -> None:
        """Forgets a result."""
        with self._lock:
            self._results.pop(token or "", None)


def message(text: str) -> str:
    """A message in the place of summary, legend and table, as HTML."""
    return f'<p class="detrkit-message" role="status">{html.escape(text)}</p>'


def _details(
    noun: str,
    threshold: str,
    columns: Sequence[str],
    caption: str,
    rows: Sequence[tuple[Color, str, Sequence[str]]],
) -> str:
    """Summary, legend (class, colour of its first one, how many) and table."""
    if not rows:
        return message(f"No {noun} scores above {threshold}. Lower the threshold to see more.")
    colors: dict[str, Color] = {}
    for color, name, _ in rows:
        colors.setdefault(name, color)
    counts = Counter(name for _, name, _ in rows)
    keys = [(colors[name], name, str(number)) for name, number in counts.most_common()]
    heads = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in (noun, *columns))
    lines = "".join(
        f'<tr><th scope="row">{_chip(color)}{html.escape(name)}</th>{_cells(cells)}</tr>'
        for color, name, cells in rows
    )
    said = html.escape(f"{count(len(rows), noun)} above {threshold}")
    return (
        f'<p class="detrkit-summary" role="status">{said}</p>'
        f"{_legend('classes', keys)}"
        f'<div class="detrkit-table" tabindex="0" role="region" aria-label="{html.escape(caption)}"><table>'
        f"<caption>{html.escape(caption)}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def _legend(nouns: str, keys: Iterable[tuple[Color, str, str]]) -> str:
    items = (f"<li>{_chip(color)}{html.escape(name)} <span>{end}</span></li>" for color, name, end in keys)
    return f'<ul class="detrkit-legend" aria-label="Colours of the {nouns}">{"".join(items)}</ul>'


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)


def _chip(color: Color) -> str:
    return f'<i style="background: rgb({color[0]} {color[1]} {color[2]})"></i>'


def _stem(name: str) -> str:
    return os.path.splitext(name)[0] or "image"  # noqa: PTH122 - a name, not a path
