"""Frames of animations and videos."""

from __future__ import annotations

import io
from itertools import islice

import numpy as np
from PIL import Image

from detrkit.common.limits import ImageLimits
from detrkit.inference.video import read_video
from detrkit.processing.images import load_frames
from tests.clips import write_clip
from tests.fuzz.base import folder

_LIMITS = ImageLimits(max_pixels=10_000)
_MOST_FRAMES = 20
_SUFFIXES = (".mp4", ".avi", ".mkv", ".ts")


def _moving(size: tuple[int, int], count: int) -> list[Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size)
    return [image.rotate(90 * number) for number in range(count)]


def animation(data: bytes) -> None:
    """An animation or a TIFF of several pages, all frames of it."""
    for frame in islice(load_frames(data, limits=_LIMITS), _MOST_FRAMES):
        assert frame.mode == "RGB"
        assert len(frame.tobytes()) == 3 * frame.width * frame.height


def animation_seeds() -> list[bytes]:
    seeds = []
    for kind, options in (
        *(("GIF", {"duration": 40, "loop": 0}), ("GIF", {"disposal": 2, "transparency": 0})),
        *(("WEBP", {"duration": 40}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})),
        *(("TIFF", {"compression": "packbits"}), ("PNG", {"duration": 40}), ("MPO", {})),
    ):
        first, *others = _moving((12, 12), 3)
        stream = io.BytesIO()
        first.save(stream, kind, save_all=True, append_images=others, **options)
        seeds.append(stream.getvalue())
    return seeds


def video(data: bytes) -> None:
    """A video file, its first frames."""
    path = folder() / "video.mp4"
    path.write_bytes(data)
    for frame in islice(read_video(path, limits=_LIMITS), _MOST_FRAMES):
        assert frame.image.mode == "RGB"
        assert frame.index >= 0


def video_seeds() -> list[bytes]:
    frames = _moving((32, 32), 4)
    codecs = {".avi": "mjpeg"}
    clips = (
        write_clip(folder() / f"clip{suffix}", frames, codec=codecs.get(suffix, "mpeg4"))
        for suffix in _SUFFIXES
    )
    return [clip.read_bytes() for clip in clips]
