"""Short videos for tests, made with PyAV."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

FRAMES = 12
_MILLISECOND = Fraction(1, 1000)


def panned(
    image: Image.Image, size: tuple[int, int], step: int = 4, frames: int = FRAMES
) -> list[Image.Image]:
    """A window that moves over an image to the right."""
    return [image.crop((step * i, 0, step * i + size[0], size[1])) for i in range(frames)]


def write_clip(
    path: Path,
    frames: Iterable[Image.Image],
    *,
    rate: int = 10,
    times: Sequence[int] | None = None,
    codec: str = "libx264",
    sound: bool = False,
) -> Path:
    """Writes frames as a video.

    Args:
        path: The file; its suffix says the format.
        frames: Images of one size with even sides.
        rate: Frames a second.
        times: Times of the frames in milliseconds, where they do not follow each other evenly.
        codec: What the frames are written with.
        sound: Whether it has a track of silence.
    """
    import av

    frames = list(frames)
    # An MP4 file with its table of contents in front can be read when its end is missing.
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = _MILLISECOND
        audio = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts = number * 1000 // rate if times is None else times[number]
            frame.time_base = _MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio is not None:
            for number in range(9):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                silence.sample_rate, silence.pts = 8000, 1024 * number
                container.mux(audio.encode(silence))
            container.mux(audio.encode(None))
    return path


def set_display_matrix(path: Path, matrix: Sequence[float], size: tuple[int, int]) -> None:
    """Makes an MP4 file one that is displayed turned, as phones record them.

    Args:
        path: The file.
        matrix: a, b, c, d of x' = a x + c y, y' = b x + d y.
        size: Width and height of the stored frames, by which the turned ones are moved back into view.
    """
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 44
    a, b, c, d = (round(value * 2**16) for value in matrix)
    x = sum(-value * side for value, side in zip((a, c), size) if value < 0)
    y = sum(-value * side for value, side in zip((b, d), size) if value < 0)
    content[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, x, y, 2**30)
    path.write_bytes(content)


def damage_packet(path: Path, number: int) -> None:
    """Overwrites the content of a packet, in the order of the file."""
    import av

    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    start, size = packets[number]
    content = bytearray(path.read_bytes())
    content[start : start + size] = bytes(size)
    path.write_bytes(content)


def frame_count(path: Path) -> int:
    """How many frames a video really has."""
    import av

    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))
