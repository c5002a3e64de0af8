"""Which sources are videos, by their names."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path

from detrkit.common.text import is_url

SUFFIXES = frozenset(
    {
        *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
        *(".wmv", ".flv", ".3gp", ".ogv", ".mjpeg"),
    }
)
"""How the names of video files end."""

STREAMS = ("rtsp://", "rtsps://")
"""How addresses of streams begin."""


def is_camera(source: str) -> bool:
    """Whether a source is the number of a camera, and not the name of a file."""
    return re.fullmatch("[0-9]{1,2}", source) is not None and not Path(source).exists()


def is_live(source: str) -> bool:
    """Whether a source has no end: a camera or an RTSP address."""
    return is_camera(source) or source.lower().startswith(STREAMS)


def is_video(source: str) -> bool:
    """Whether a source is a camera, an RTSP address, or a file or address that is named like a video."""
    if is_live(source):
        return True
    try:
        path = urllib.parse.urlsplit(source).path if is_url(source) else source
    except ValueError:
        return False
    return Path(path).suffix.lower() in SUFFIXES
