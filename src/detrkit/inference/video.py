"""Reading videos, cameras and streams, a frame at a time.

Example:
    ```python
    from detrkit import Detector
    from detrkit.inference.video import read_video

    detector = Detector.from_pretrained("blood-cells")
    for found in detector.stream(read_video("clip.mp4")):
        print(found.frame_index, found.timestamp, len(found))
    ```
"""

from __future__ import annotations

import heapq
import math
import os
import socket
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from detrkit.common.errors import ImageError, MissingExtraError, SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.log import logger
from detrkit.common.text import first_line, short_name
from detrkit.inference.batching import newest
from detrkit.inference.video_names import STREAMS, is_camera, is_live
from detrkit.processing.frames import VideoFrame
from detrkit.processing.sources import check_pixels, open_stream

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame as DecodedFrame
    from av.video.stream import VideoStream


# Containers, not playlists: those name further files and addresses, which nobody has checked.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mjpeg,h264,hevc,ivf,m4v"
_STREAM_PROTOCOLS = "rtsp,rtsps,rtp,srtp,tcp,tls,udp,crypto"
_BUFFER = 2**20  # bytes

# (a, b, c, d) of a display matrix -> how Pillow turns a frame upright, where x' = a x + c y, y' = b x + d y.
_TURNS: dict[tuple[int, ...], str | None] = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): "ROTATE_270",
    (-1, 0, 0, -1): "ROTATE_180",
    (0, -1, 1, 0): "ROTATE_90",
    (-1, 0, 0, 1): "FLIP_LEFT_RIGHT",
    (1, 0, 0, -1): "FLIP_TOP_BOTTOM",
    (0, 1, 1, 0): "TRANSPOSE",
    (0, -1, -1, 0): "TRANSVERSE",
}


def read_video(
    source: str | os.PathLike[str], every: int = 1, *, limits: ImageLimits | None = None
) -> Iterator[VideoFrame]:
    """The frames of a video, one after another; only a few are in memory at a time.

    Frames that cannot be decoded are left out with a warning. Frames of a rotated video, as phones record
    them, are upright.

    Args:
        source: A file, an address (http, https, rtsp), or the number of a camera.
        every: Give only every so many-th frame, beginning with the first.
        limits: Maximum size of a frame, and the addresses that may be opened; None for the defaults.

    Returns:
        An iterator of the frames.

    Raises:
        ImageError: The video cannot be opened, or none of its frames decoded.
        MissingExtraError: PyAV is not installed.
        SettingError: ``every`` is below 1.
    """
    check_every(every)

    def frames() -> Iterator[VideoFrame]:
        with Video(os.fspath(source), limits) as video:
            yield from video.frames(lambda index: index % every == 0, logger.warning)

    return frames()


def check_every(every: int) -> None:
    """Raises a SettingError unless ``every`` is a whole number above 0."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise SettingError(f"every must be a whole number of 1 or more, not {every!r}")


class Video:
    """An open video, to be used in a ``with`` block.

    Attributes:
        name: What messages call it.
        rate: Frames a second; None if unknown.
        length: Number of frames, which may be an estimate; None if unknown.
        is_live: Whether it is a camera or stream without an end.
    """

    def __init__(self, source: str, limits: ImageLimits | None = None) -> None:
        """Opens a video.

        Args:
            source: As for :func:`read_video`.
            limits: As for :func:`read_video`.

        Raises:
            ImageError: It cannot be opened, or has too many pixels.
            MissingExtraError: PyAV is not installed.
        """
        self.name = short_name(source)
        self.is_live = is_live(source)
        self._source, self._limits = source, limits or ImageLimits()
        self._turn_known: object = ()  # the display matrix that was warned of
        av = import_av()
        try:
            self._container, self._file = open_container(source, self._limits)
            found = self._container.streams.best("video")
        except (OSError, ValueError, av.FFmpegError) as error:
            if isinstance(error, ImageError):
                raise
            raise ImageError(
                f"{self.name}: cannot be opened as a video ({_reason(error)}); check it"
            ) from error
        if found is None:
            self.close()
            raise ImageError(f"{self.name}: has no video stream")
        self._stream = cast("VideoStream", found)
        context = self._stream.codec_context
        if self._limits.max_pixels is not None:
            context.options = {"max_pixels": str(min(_with_edges(self._limits.max_pixels), 2**31 - 1))}
        try:
            check_pixels((context.width, context.height), self._limits, self.name)
        except ImageError:
            self.close()
            raise
        rate = self._stream.guessed_rate or self._stream.average_rate
        self.rate = float(rate) if rate else None
        self.length = None if self.is_live else self._estimate()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file or connection."""
        self._container.close()
        if self._file is not None:
            self._file.close()

    def frames(self, wanted: Callable[[int], bool], report: Callable[[str], object]) -> Iterator[VideoFrame]:
        """Its frames, upright; of a live source the newest ones, as fast as they are taken.

        Args:
            wanted: Whether to give the frame of an index.
            report: Called with a line about frames that cannot be decoded.

        Raises:
            ImageError: No frame can be decoded.
        """
        frames = self._upright(wanted, report)
        return newest(frames) if self.is_live else frames

    def _upright(
        self, wanted: Callable[[int], bool], report: Callable[[str], object]
    ) -> Iterator[VideoFrame]:
        start: float | None = None
        found = False
        for index, frame in self._numbered(report):
            time = (
                None if frame.pts is None or frame.time_base is None else float(frame.pts * frame.time_base)
            )
            if start is None and index == 0:
                start = time
            found = True
            if not wanted(index):
                continue
            if time is None:
                timestamp = index / self.rate if self.rate else None
            else:
                timestamp = round(time - (start or 0.0), 6)
            yield VideoFrame(self._image(frame, index), index, timestamp, self._source)
        if not found:
            raise ImageError(f"{self.name}: no frame of it can be decoded; the file is damaged or empty")

    def _numbered(self, report: Callable[[str], object]) -> Iterator[tuple[int, DecodedFrame]]:
        """Number and content of each sound frame; the numbers of damaged ones are left out and reported."""
        index, run = 0, 0  # the next number, and how many damaged frames have just passed
        damaged: list[int] = []  # display times of packets that could not be decoded
        for frame in self._decoded(damaged, report):
            while frame is not None and frame.pts is not None and damaged and damaged[0] < frame.pts:
                heapq.heappop(damaged)
                index, run = index + 1, run + 1
            if frame is None or frame.is_corrupt:
                run += 1
            else:
                self._report_run(index, run, report)
                run = 0
                yield index, frame
            index += 1
        self._report_run(index + len(damaged), run + len(damaged), report)

    def _report_run(self, end: int, run: int, report: Callable[[str], object]) -> None:
        """Reports a run of damaged frames before the one of number ``end``."""
        if run == 1:
            report(f"{self.name}: frame {end} cannot be decoded and is left out")
        elif run:
            report(f"{self.name}: frames {end - run + 1} to {end} cannot be decoded and are left out")

    def _decoded(self, damaged: list[int], report: Callable[[str], object]) -> Iterator[DecodedFrame | None]:
        """The frames in the order of their display; None for a damaged one whose time is unknown."""
        av = import_av()
        packets = self._container.demux(self._stream)
        count = 0
        while True:
            try:
                packet = next(packets, None)
            except (OSError, av.FFmpegError) as error:
                report(f"{self.name}: ends early ({_reason(error)})")
                packet = None
            try:
                frames = self._stream.decode(packet)
            except av.EOFError:
                frames = []
            except (OSError, av.FFmpegError):
                if packet is not None and packet.pts is not None:
                    heapq.heappush(damaged, packet.pts)
                else:
                    yield None
                frames = []
            yield from frames
            if packet is None:
                self._report_end(count, report)
                return
            count += bool(packet.size)

    def _report_end(self, packets: int, report: Callable[[str], object]) -> None:
        """Reports a file that ends before its table of contents does; other formats have none to rely on."""
        total = self._stream.frames
        if "mp4" in self._container.format.name.split(",") and packets < total:
            report(f"{self.name}: ends early, with {packets} of {total} frames")

    def _image(self, frame: DecodedFrame, index: int) -> Any:
        from PIL.Image import Transpose

        check_pixels((frame.width, frame.height), self._limits, f"{self.name}: frame {index + 1}")
        image = frame.to_image()
        turn = self._turn(frame)
        return image if turn is None else image.transpose(Transpose[turn])

    def _turn(self, frame: DecodedFrame) -> str | None:
        """How to turn a frame upright, by Pillow's name."""
        import numpy as np
        from av.sidedata.sidedata import Type

        matrix = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
        if matrix is None:
            return None
        entries = np.frombuffer(bytes(matrix), np.int32, 5).astype(np.float64)
        signs = tuple(int(s) for s in np.sign(np.where(np.abs(entries) < 2**12, 0, entries))[[0, 1, 3, 4]])
        if signs not in _TURNS and signs != self._turn_known:
            self._turn_known = signs
            logger.warning(
                "%s: is rotated by an odd angle; its frames are left as they are stored", self.name
            )
        return _TURNS.get(signs)

    def _estimate(self) -> int | None:
        stream = self._stream
        if stream.frames:
            return int(stream.frames)
        seconds = None
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        elif self._container.duration is not None:
            seconds = self._container.duration / 1e6
        return round(seconds * self.rate) if seconds and self.rate else None


def import_av() -> ModuleType:
    """PyAV; raises a MissingExtraError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("reading videos", "video") from error
    return av


def open_container(source: str, limits: ImageLimits) -> tuple[InputContainer, BinaryIO | None]:
    """Opens a source with PyAV, and the file that the caller closes after it."""
    av = import_av()
    if is_camera(source):
        return _open_camera(av, source, limits), None
    if source.lower().startswith(STREAMS):
        options = {"rtsp_transport": "tcp", "protocol_whitelist": _STREAM_PROTOCOLS}
        return av.open(_checked_address(source, limits), options=options, timeout=limits.timeout), None
    # A video may be of any size; one from the web is fetched whole, within the limits.
    file = open_stream(source, short_name(source), replace(limits, max_pixels=None))
    try:
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        return av.open(file, container_options=options, buffer_size=_BUFFER, metadata_errors="replace"), file
    except BaseException:
        file.close()
        raise


def _open_camera(av: ModuleType, source: str, limits: ImageLimits) -> InputContainer:
    name, form = {
        "linux": (f"/dev/video{source}", "v4l2"),
        "darwin": (source, "avfoundation"),
    }.get(sys.platform, (source, ""))
    if not form:
        raise ImageError(f"camera {source}: cameras are supported on Linux and macOS only; name a file")
    if form == "v4l2" and not Path(name).exists():
        raise ImageError(f"camera {source}: no camera at {name}; list them with: ls /dev/video*")
    return av.open(name, format=form, timeout=limits.timeout)


def _checked_address(source: str, limits: ImageLimits) -> str:
    """An RTSP address with the number of its host, which is one that may be asked."""
    from detrkit.processing.fetching import is_public

    parts = urllib.parse.urlsplit(source)
    name = short_name(source)
    if not parts.hostname:
        raise ImageError(f"{name}: has no host; write rtsp://host/path")
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 554, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ImageError(f"{name}: its host cannot be found ({error.strerror or error}); check it") from error
    for *_, address in found:
        number = str(address[0])
        if limits.allow_private or is_public(number):
            host = f"[{number}]" if ":" in number else number
            user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
            port = f":{parts.port}" if parts.port else ""
            # The number, so that a second look-up cannot lead elsewhere.
            return urllib.parse.urlunsplit(parts._replace(netloc=f"{user}{host}{port}"))
    raise ImageError(
        f"{name}: resolves to {found[0][4][0]}, which is not on the public internet; pass allow_private=True "
        "(--allow-private-addresses) if that is meant"
    )


def _with_edges(pixels: int) -> int:
    """What FFmpeg's own limit must be for frames of so many pixels, up to 256 times as wide as high.

    FFmpeg rounds their sides up to 64, and counts the rows that a decoder holds at the edges: 280 of them.
    """
    longest = 16 * math.isqrt(pixels)
    return max(pixels + 64 * longest, 280 * (longest + 160))


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or first_line(error))
