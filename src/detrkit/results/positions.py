"""The numbers by which a run calls its images.

An image that the user named is called by its place among all that were named. How many frames a video has is
only known at its end, so a frame is called by a number that is computed from the video's place and its index.
"""

from __future__ import annotations

_FRAMES = 2**40  # more than any video has


def frame_position(video: int, index: int) -> int:
    """The position of a frame.

    Args:
        video: Position of its video.
        index: Its index in the video, from 0.
    """
    return (video + 1) * _FRAMES + index


def is_frame(position: int) -> bool:
    """Whether a position is that of a frame of a video."""
    return position >= _FRAMES


def named(position: int) -> int:
    """The position of the image or video that the user named: the frame's video, or the image itself."""
    return position // _FRAMES - 1 if is_frame(position) else position


def frame_index(position: int) -> int | None:
    """The index of a frame; None for an image."""
    return position % _FRAMES if is_frame(position) else None


def place(position: int) -> tuple[int, int]:
    """What positions are sorted by to be in the order in which the user named them."""
    return named(position), position % _FRAMES if is_frame(position) else -1
