"""Writing drawn frames as a video, with the sound of the video that they came from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_file
from detrkit.common.limits import ImageLimits
from detrkit.common.log import logger
from detrkit.common.outputs import COMMENT
from detrkit.common.text import first_line, short_name
from detrkit.inference.video import import_av, open_container
from detrkit.inference.video_names import is_live

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from PIL.Image import Image


_CLOCK = Fraction(1, 90_000)  # seconds; divides the time of a frame at every usual rate
_DEFAULT_RATE = Fraction(30)
_CODECS = {"libx264": {"crf": "20", "preset": "veryfast"}, "mpeg4": {"qscale": "3"}}


class VideoWriter:
    """A video that is complete under its name or not there.

    Args:
        path: The file, whose suffix says its format: .mp4, .mov or .mkv.
        source: The video that the frames came from, for its rate and sound; a live one has neither.
        limits: Which addresses are asked for the sound of a video from the web.
    """

    def __init__(self, path: Path, source: str, limits: ImageLimits) -> None:
        self._name, self._last = path, -1
        self._size: tuple[int, int] | None = None
        self._rate = _DEFAULT_RATE
        self._sound: _Sound | None = None if is_live(source) else _Sound(source, limits)
        if self._sound is not None and self._sound.rate:
            self._rate = Fraction(self._sound.rate).limit_denominator(100_000)
        self._file = atomic_file(path)
        with _errors(path):
            self._container: OutputContainer = import_av().open(str(self._file.__enter__()), "w")
        self._container.metadata["comment"] = COMMENT

    def write(self, image: Image, index: int, timestamp: float | None) -> None:
        """Adds a frame.

        Args:
            image: The frame; one of another size than the first is resized.
            index: Its number in the source.
            timestamp: Seconds from the first frame; None if unknown.
        """
        from av import VideoFrame as Frame

        seconds = index / float(self._rate) if timestamp is None else timestamp
        with _errors(self._name):
            if self._size is None:
                self._size = image.size
                self._begin(*image.size)
            if image.size != self._size:
                image = image.resize(self._size)
            frame = Frame.from_image(image)
            self._last = max(self._last + 1, round(seconds / _CLOCK))
            frame.pts, frame.time_base = self._last, _CLOCK
            self._put(frame)
            if self._sound is not None:
                self._sound.copy(self._container, seconds)

    def finish(self, *, whole: bool) -> None:
        """Completes the file.

        Args:
            whole: Whether all of the source was written, so that its sound goes on to the end.
        """
        with _errors(self._name):
            if self._size is not None:
                self._put(None)
                if self._sound is not None and whole:
                    self._sound.copy(self._container, None)
            self._container.close()
        if self._sound is not None:
            self._sound.close()
        self._file.__exit__(None, None, None)

    def discard(self) -> None:
        """Removes what was written."""
        with contextlib.suppress(Exception):
            self._container.close()
        if self._sound is not None:
            self._sound.close()
        with contextlib.suppress(_DiscardedError):
            self._file.__exit__(_DiscardedError, _DiscardedError(), None)

    def _begin(self, width: int, height: int) -> None:
        codecs = import_av().codecs_available
        codec = next(name for name in _CODECS if name in codecs)
        stream = self._container.add_stream(codec, rate=self._rate, options=_CODECS[codec])
        self._stream = cast("VideoStream", stream)
        self._stream.width, self._stream.height = width, height
        # Half the colours in each direction are as usual, but need even sides.
        odd = width % 2 or height % 2
        self._stream.pix_fmt = "yuv444p" if odd and codec == "libx264" else "yuv420p"
        self._stream.codec_context.time_base = _CLOCK
        if self._sound is not None:
            self._sound.add_to(self._container)

    def _put(self, frame: VideoFrame | None) -> None:
        for packet in self._stream.encode(frame):
            if not packet.duration and packet.time_base:
                packet.duration = round(1 / self._rate / packet.time_base)
            self._container.mux(packet)


class _Sound:
    """The sound of a video, copied as it is stored.

    Attributes:
        rate: Frames a second of the video.
    """

    def __init__(self, source: str, limits: ImageLimits) -> None:
        self._name = short_name(source)
        self._container, self._file = open_container(source, limits)
        video = self._container.streams.best("video")
        self.rate = None if video is None else cast("VideoStream", video).guessed_rate
        self._offset = Fraction(0)  # seconds at which the video begins
        if video is not None and video.start_time is not None and video.time_base is not None:
            self._offset = video.start_time * video.time_base
        self._out: dict[int, AudioStream] = {}
        self._packets: Iterator[Packet] = iter(())
        self._waiting: Packet | None = None

    def add_to(self, container: OutputContainer) -> None:
        """Adds its streams to a video that is written."""
        for stream in self._container.streams.audio:
            try:
                self._out[stream.index] = container.add_stream_from_template(stream)
            except (ValueError, import_av().FFmpegError) as error:
                logger.warning("%s: its sound cannot be copied (%s)", self._name, first_line(error))
        if self._out:
            self._packets = self._container.demux(
                [s for s in self._container.streams if s.index in self._out]
            )

    def copy(self, container: OutputContainer, until: float | None) -> None:
        """Copies what sounds before a time in seconds, or all that is left."""
        while True:
            packet = self._waiting or self._next()
            self._waiting = None
            if packet is None:
                return
            assert packet.pts is not None
            assert packet.time_base is not None
            begin = packet.pts * packet.time_base - self._offset
            if until is not None and begin > until:
                self._waiting = packet
                return
            if begin < 0:  # before the first frame
                continue
            shift = round(self._offset / packet.time_base)
            packet.pts -= shift
            packet.dts = packet.pts if packet.dts is None else packet.dts - shift
            packet.stream = self._out[packet.stream.index]
            container.mux(packet)

    def _next(self) -> Packet | None:
        try:
            return next((packet for packet in self._packets if packet.pts is not None), None)
        except (OSError, import_av().FFmpegError) as error:
            logger.warning("%s: its sound ends early (%s)", self._name, first_line(error))
            self._packets = iter(())
            return None

    def close(self) -> None:
        """Closes the source."""
        self._container.close()
        if self._file is not None:
            self._file.close()


class _DiscardedError(Exception):
    """Ends the writing of a file that is not kept."""


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    """What PyAV raises leaves as a DetrkitError."""
    try:
        yield
    except (OSError, ValueError, import_av().FFmpegError) as error:
        if isinstance(error, DetrkitError):
            raise
        raise DetrkitError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or first_line(error)}"
        ) from error
