"""A frame of a video or an animation, with its place in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One frame. A detector takes it like an image, and its detections know the frame's index and time.

    Attributes:
        image: The frame, upright, in mode RGB.
        index: Its number in the video, from 0; frames that are skipped or damaged count too.
        timestamp: Seconds from the first frame; None where the file does not say.
        source: File or address of the video.
    """

    image: Image
    index: int
    timestamp: float | None
    source: str
