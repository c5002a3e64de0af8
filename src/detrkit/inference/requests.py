"""What detrkit's services have in common: images and options as requests hold them, and the form of answers.

Used by ``detrkit serve`` and by the handler of Hugging Face Inference Endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from detrkit.common.errors import ImageError, SettingError
from detrkit.common.text import did_you_mean
from detrkit.results.detection_config import DetectionConfig, Threshold
from detrkit.results.detections import shortest_float

if TYPE_CHECKING:
    from detrkit.results.detections import Detections
    from detrkit.results.panoptic import PanopticSegmentation


@dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """The options of a request; None leaves the choice to the model's detection settings.

    Attributes:
        threshold: As in :class:`detrkit.DetectionConfig`, like the others.
        overlap: See there.
        max_objects: See there.
    """

    threshold: Threshold | None = None
    overlap: float | None = None
    max_objects: int | None = None

    def given(self) -> dict[str, Any]:
        """Those that are not None, as arguments of a detector's call."""
        return {name: value for name, value in vars(self).items() if value is not None}


OPTIONS = tuple(RequestOptions.__dataclass_fields__)
"""The names of all options."""


def read_options(values: Mapping[str, object], allowed: Sequence[str] = OPTIONS) -> RequestOptions:
    """The options of a request.

    Args:
        values: Name -> number; None is no choice.
        allowed: The names that this kind of request takes.

    Raises:
        SettingError: An option does not exist, or is out of range.
    """
    for name in map(str, values):
        if name not in allowed:
            hint = did_you_mean(name[:100], allowed) or f"; supported: {', '.join(allowed)}"
            raise SettingError(f"unknown parameter {name[:100]!r}{hint}")
    given: dict[str, Any] = {name: value for name, value in values.items() if name in OPTIONS}
    options = RequestOptions(**given)
    DetectionConfig().with_options(**options.given())  # checks them
    return options


def image_bytes(value: object, name: str) -> bytes:
    """The bytes of the image file that an entry of a request holds; paths and addresses are not opened.

    Args:
        value: The bytes, or these in base64, or a ``data:`` URL.
        name: What errors call the entry.

    Raises:
        ImageError: It is something else.
    """
    from detrkit.processing.sources import decode_text

    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise ImageError(f"{name} must be an image, its bytes or its base64 text, not {found}")
    return decode_text(value, name)


class ObjectEntry(TypedDict):
    """An object in an answer."""

    label: int
    name: str
    score: float
    box: list[float]  # x0, y0, x1, y1 in pixels of the image


class SegmentEntry(TypedDict):
    """A segment in an answer."""

    id: int  # R + 256 G + 65536 B of its pixels in the panoptic PNG
    label: int
    name: str
    isthing: bool
    score: float
    area: int  # number of its pixels
    box: list[int]  # x0, y0, x1, y1 around its pixels


def object_entries(detections: Detections) -> list[ObjectEntry]:
    """The objects of an image for an answer, the best first."""
    return [
        {
            "label": found.label,
            "name": found.name,
            "score": shortest_float(detections.scores[i]),
            "box": [shortest_float(value) for value in found.box],
        }
        for i, found in enumerate(detections)
    ]


def segment_entries(segmentation: PanopticSegmentation) -> list[SegmentEntry]:
    """The segments of an image for an answer."""
    entries: list[SegmentEntry] = []
    for segment, name in zip(segmentation.to_coco()["segments_info"], segmentation.names):
        x, y, width, height = segment["bbox"]
        entries.append(
            {
                "id": segment["id"],
                "label": segment["category_id"],
                "name": name,
                "isthing": bool(segment["isthing"]),
                "score": segment["score"],
                "area": segment["area"],
                "box": [x, y, x + width, y + height],
            }
        )
    return entries


def things(segments: Sequence[SegmentEntry]) -> list[ObjectEntry]:
    """The segments that are things as objects, with the box around their pixels, the best first."""
    best_first = sorted((one for one in segments if one["isthing"]), key=lambda one: -one["score"])
    return [
        {
            "label": one["label"],
            "name": one["name"],
            "score": one["score"],
            "box": [float(edge) for edge in one["box"]],
        }
        for one in best_first
    ]
