"""Reading the images that a command was given, and taking them through a model in order."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits
from detrkit.common.progress import with_progress
from detrkit.common.terminal import say
from detrkit.common.text import is_url, short_name, without_password
from detrkit.inference.inputs import Fingerprints, FrameReader, ImageInput
from detrkit.inference.video_names import is_live
from detrkit.processing.frames import VideoFrame
from detrkit.results.positions import frame_position, named

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.cluster import RayDetector
    from detrkit.inference.tracking import Tracker
    from detrkit.results.detections import Detections
    from detrkit.results.panoptic import PanopticSegmentation

_Result = TypeVar("_Result", bound="Detections | PanopticSegmentation")
_Stream: TypeAlias = "Callable[[Iterator[Image | VideoFrame]], Iterator[_Result]]"

Results: TypeAlias = "Iterator[tuple[int, Image | None, _Result]]"
"""Position, image and result of each image; the image is None if another process has read it."""


@dataclass(eq=False)
class ImageReader:
    """Reads the images that the user named, and reports those that cannot be read on stderr.

    Iteration yields the position and the image of each readable one, and of each frame of a video.

    Attributes:
        inputs: The images and videos that the user named.
        exif_orientation: Whether to rotate images as their EXIF orientation says.
        debug: Whether to show the tracebacks of images that cannot be read.
        limits: Maximum sizes of images, and permitted addresses.
        failures: One line for each image, or run of frames, that could not be read so far.
        fingerprints: If given, the fingerprint of each image is taken before it is read.
        every: Of a video, only every so many-th frame is read.
        track: Whether to follow objects from frame to frame.
        todo: Positions of the images and videos to read; all by default.
        known: Positions of frames that an earlier run has done. They are read only if ``recall`` is given.
        recall: Gives the result of a frame that is known, with the names of classes by label.
        names: The names of the model's classes by label.
    """

    inputs: Sequence[ImageInput]
    exif_orientation: bool = False
    debug: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    failures: list[str] = field(default_factory=list)
    fingerprints: Fingerprints | None = None
    every: int = 1
    track: bool = False

    def __post_init__(self) -> None:
        self.todo: Sequence[int] = range(len(self.inputs))
        self.known: Collection[int] = ()
        self.recall: Callable[[int, Mapping[int, str]], object] | None = None
        self.names: Mapping[int, str] = {}
        self._unread: Iterator[tuple[int, Image | VideoFrame]] = self._read()
        self._in_work: deque[tuple[int, Image | VideoFrame]] = deque()
        self._tracker: tuple[str, Tracker] | None = None
        if self.track:
            from detrkit.inference.tracking import import_tracker

            import_tracker()  # before any work

    def __iter__(self) -> Iterator[tuple[int, Image | VideoFrame]]:
        return self._unread

    @property
    def has_videos(self) -> bool:
        """Whether one of the inputs is a video, so that the number of images is unknown."""
        return any(item.video for item in self.inputs)

    @property
    def ends_live(self) -> bool:
        """Whether the last input is a camera or stream, which ends when the user says so."""
        return bool(self.inputs) and self.inputs[-1].video and is_live(self.inputs[-1].source)

    def finds_an_image(self) -> bool:
        """Whether any image that is left can be read; reads up to the first one."""
        first = list(itertools.islice(self._unread, 1))
        self._unread = itertools.chain(first, self._unread)
        return bool(first)

    def results(self, stream: _Stream[_Result], description: str) -> Results[_Result]:
        """The result of every readable image, in order.

        Args:
            stream: Turns images into results, one each, in their order.
            description: The label of the progress bar.
        """
        yield from with_progress(self._each(stream), self._total(), description)

    def _total(self) -> int | None:
        """How many images are left, those of videos estimated; None where nothing says."""
        total = 0
        for position in self.todo:
            item = self.inputs[position]
            length = 1
            if item.video:
                known = None if is_live(item.source) or is_url(item.source) else self._length(item)
                if known is None:
                    return None
                length = -(-known // self.every)
            total += length
        return total if self.recall is not None else max(0, total - len(self.known))

    def _length(self, item: ImageInput) -> int | None:
        from detrkit.inference.video import Video

        try:
            with Video(item.source, self.limits) as video:
                return video.length
        except ImageError:  # reading it says what is wrong
            return 0

    def _each(self, stream: _Stream[_Result]) -> Results[_Result]:
        # What an earlier run has done must not wait in memory for what is done anew.
        while (following := next(self._unread, None)) is not None:
            position, image = following
            if position in self.known and self.recall is not None:
                yield self._finished(position, image, cast("_Result", self.recall(position, self.names)))
            else:
                self._unread = itertools.chain([following], self._unread)
                yield from self._run(stream)

    def _run(self, stream: _Stream[_Result]) -> Results[_Result]:
        """The results up to the end, or to a frame that an earlier run has done."""
        unfinished = True
        while unfinished:
            try:
                for result in stream(self._images()):
                    yield self._finished(*self._in_work.popleft(), result)
                unfinished = False
            except ImageError:
                # The model does not take one of the images in work: which one shows when each runs alone.
                waiting, self._in_work = list(self._in_work), deque()
                for position, image in waiting:
                    try:
                        (result,) = stream(iter([image]))
                    except ImageError as error:
                        self._report(error, self.inputs[named(position)])
                    else:
                        yield self._finished(position, image, result)

    def _finished(
        self, position: int, image: Image | VideoFrame, result: _Result
    ) -> tuple[int, Image, _Result]:
        source = self.inputs[named(position)].source
        result.source = without_password(source)
        if not isinstance(image, VideoFrame):
            return position, image, result
        if self.track:
            from detrkit.inference.tracking import Tracker

            if self._tracker is None or self._tracker[0] != source:
                self._tracker = source, Tracker()
            self._tracker[1].update(cast("Detections", result))
        return position, image.image, result

    def cluster_results(self, detector: RayDetector, *, batch_size: int) -> Results[Detections]:
        """The detections of every image that the workers of a cluster can read, in the order of completion.

        Args:
            detector: The workers.
            batch_size: Maximum number of images at once on each worker.
        """
        from detrkit.results.detections import Detections

        sources = [self.inputs[position].source for position in self.todo]
        found = detector.results(sources, batch_size=batch_size, exif_orientation=self.exif_orientation)
        for place, result in with_progress(found, len(sources), "Detecting"):
            if isinstance(result, ImageError):
                self._report(result)
            elif isinstance(result, Detections):
                result.source = sources[place]
                yield self.todo[place], None, result

    def _read(self) -> Iterator[tuple[int, Image | VideoFrame]]:
        frames = FrameReader(exif_orientation=self.exif_orientation, limits=self.limits)
        with contextlib.closing(frames):
            for position in self.todo:
                if self.fingerprints is not None:
                    self.fingerprints(position)
                try:
                    if self.inputs[position].video:
                        yield from self._read_video(position)
                        continue
                    image = frames.read(self.inputs[position])
                except ImageError as error:
                    if self.debug:
                        traceback.print_exc()
                    self._report(error)
                else:
                    yield position, image

    def _read_video(self, position: int) -> Iterator[tuple[int, VideoFrame]]:
        from detrkit.inference.video import Video

        def wanted(index: int) -> bool:
            skipped = self.recall is None and frame_position(position, index) in self.known
            return index % self.every == 0 and not skipped

        with Video(self.inputs[position].source, self.limits) as video:
            for frame in video.frames(wanted, self._report_line):
                yield frame_position(position, frame.index), frame

    def _images(self) -> Iterator[Image | VideoFrame]:
        """Passes images on (in the detector's thread), keeping those that still wait for a result."""
        for position, image in self:
            if position in self.known:
                self._unread = itertools.chain([(position, image)], self._unread)
                return
            self._in_work.append((position, image))
            yield image

    def _report(self, error: ImageError, item: ImageInput | None = None) -> None:
        """Says what is wrong with an image, named by its input where the error does not know it."""
        self._report_line(str(error) if item is None else f"{short_name(item.source)}: {error}")

    def _report_line(self, line: str) -> None:
        self.failures.append(line)
        say(line)
