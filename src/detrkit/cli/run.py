"""One driver for the commands that find something in many images: from the named images to the outputs."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, TypeAlias, TypeVar

import typer

from detrkit.cli.sinks import Ending, Sink
from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits
from detrkit.common.outputs import check_outputs
from detrkit.common.progress import with_progress
from detrkit.common.terminal import count, interrupt_status, list_failures, say
from detrkit.common.text import short_name
from detrkit.inference.inputs import Fingerprints, FrameReader, ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.cluster import RayDetector
    from detrkit.inference.detector import Detector
    from detrkit.results.detections import Detections
    from detrkit.results.panoptic import PanopticSegmentation

_Result = TypeVar("_Result", bound="Detections | PanopticSegmentation")

Results: TypeAlias = "Iterator[tuple[int, Image | None, _Result]]"
"""Position, image and result of each image; the image is None if another process has read it."""


@dataclass(eq=False)
class ImageReader:
    """Reads the images that the user named, and reports those that cannot be read on stderr.

    Iteration yields the position and the image of each readable one.

    Attributes:
        inputs: The images that the user named.
        exif_orientation: Whether to rotate images as their EXIF orientation says.
        debug: Whether to show the tracebacks of images that cannot be read.
        limits: Maximum sizes of images, and permitted addresses.
        failures: One line for each image that could not be read so far.
        todo: Positions of the images to read; all by default.
        fingerprints: If given, the fingerprint of each image is taken before it is read.
    """

    inputs: Sequence[ImageInput]
    exif_orientation: bool = False
    debug: bool = False
    limits: ImageLimits = field(default_factory=ImageLimits)
    failures: list[str] = field(default_factory=list)
    fingerprints: Fingerprints | None = None

    def __post_init__(self) -> None:
        self.todo: Sequence[int] = range(len(self.inputs))
        self._unread: Iterator[tuple[int, Image]] = self._read()
        self._in_work: deque[tuple[int, Image]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Image]]:
        return self._unread

    def finds_an_image(self) -> bool:
        """Whether any image that is left can be read; reads up to the first one."""
        first = list(itertools.islice(self._unread, 1))
        self._unread = itertools.chain(first, self._unread)
        return bool(first)

    def results(
        self, stream: Callable[[Iterator[Image]], Iterator[_Result]], description: str
    ) -> Results[_Result]:
        """The result of every readable image, in order.

        Args:
            stream: Turns images into results, one each, in their order.
            description: The label of the progress bar.
        """
        yield from with_progress(self._each(stream), len(self.todo), description)

    def _each(self, stream: Callable[[Iterator[Image]], Iterator[_Result]]) -> Results[_Result]:
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
                        self._report(error, self.inputs[position])
                    else:
                        yield self._finished(position, image, result)

    def _finished(self, position: int, image: Image, result: _Result) -> tuple[int, Image, _Result]:
        result.source = self.inputs[position].source
        return position, image, result

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

    def _read(self) -> Iterator[tuple[int, Image]]:
        frames = FrameReader(exif_orientation=self.exif_orientation, limits=self.limits)
        with contextlib.closing(frames):
            for position in self.todo:
                if self.fingerprints is not None:
                    self.fingerprints(position)
                try:
                    image = frames.read(self.inputs[position])
                except ImageError as error:
                    if self.debug:
                        traceback.print_exc()
                    self._report(error)
                else:
                    yield position, image

    def _images(self) -> Iterator[Image]:
        """Passes images on (in the detector's thread), keeping those that still wait for a result."""
        for position, image in self:
            self._in_work.append((position, image))
            yield image

    def _report(self, error: ImageError, item: ImageInput | None = None) -> None:
        """Says what is wrong with an image, named by its input where the error does not know it."""
        said = str(error) if item is None else f"{short_name(item.source)}: {error}"
        self.failures.append(said)
        say(said)


def run_images(
    reader: ImageReader,
    mistakes: Sequence[str],
    sinks: Sequence[Sink[_Result]],
    start: Callable[[], tuple[Detector, Results[_Result]]],
    *,
    model: str,
    overwrite: bool = False,
    reads_here: bool = True,
) -> None:
    """Takes images through a model into sinks, and reports the outcome.

    Args:
        reader: The images.
        mistakes: One line for each argument that names no image.
        sinks: Where the results go. Each result goes to them in this order; the last sink records that an
            image is done, and says what an earlier run has done.
        start: Loads the model; returns it and an iterator over the results of ``reader``.
        model: The model as the user named it; no output replaces its files.
        overwrite: Whether outputs may replace files that detrkit did not write.
        reads_here: Whether this process reads the images, so that it can look for a readable one before it
            loads the model.

    Raises:
        DetrkitError: An output would cost the user a file, or cannot be written.
        typer.Exit: With status 1 if some images could not be read, 2 if none could, 130 after an
            interrupt, 143 after SIGTERM.
    """
    from detrkit.checkpoints.identity import model_files

    outputs = [output for sink in sinks for output in sink.outputs]
    check_outputs(outputs, [*(item.path for item in reader.inputs), *model_files(model)], overwrite=overwrite)
    try:
        _run_images(reader, mistakes, sinks, start, reads_here=reads_here)
    finally:
        for sink in sinks:
            sink.close()


def _run_images(
    reader: ImageReader,
    mistakes: Sequence[str],
    sinks: Sequence[Sink[_Result]],
    start: Callable[[], tuple[Detector, Results[_Result]]],
    *,
    reads_here: bool,
) -> None:
    total, record = len(reader.inputs), sinks[-1]
    for mistake in mistakes:
        say(mistake)
    message = record.nothing_left() if total else None
    if message is not None and all(len(sink.begin()) == total for sink in sinks[:-1]):
        say(message)
        raise typer.Exit(1 if mistakes else 0)
    done = set.intersection(*(set(sink.begin()) for sink in sinks))
    reader.todo = [position for position in range(total) if position not in done]
    if reads_here and not done and not reader.finds_an_image():
        _end_without_results(sinks, [*mistakes, *reader.failures])

    detector: Detector | None = None
    interrupted: KeyboardInterrupt | None = None
    try:
        detector, results = start()
        for position, image, result in results:
            for sink in sinks:
                sink.accept(position, image, result)
            done.add(position)
    except KeyboardInterrupt as error:
        interrupted = error

    failures = [*mistakes, *reader.failures]
    if not done and not interrupted:
        _end_without_results(sinks, failures)
    ending = Ending.WITH_FAILURES if failures else Ending.COMPLETE
    if done and detector is not None:
        _finish(sinks, detector, sorted(done), Ending.INTERRUPTED if interrupted else ending)
    if interrupted:
        remedy = " Continue with --resume." if record.lasts else ""
        say(f"Interrupted after {len(done)} of {count(total, 'image')}.{remedy}")
        raise typer.Exit(interrupt_status(interrupted))
    list_failures(failures, total + len(mistakes))
    if failures:
        raise typer.Exit(1)


def _finish(sinks: Sequence[Sink[_Result]], detector: Detector, done: Sequence[int], ending: Ending) -> None:
    """Finishes the sinks and says what they have written."""
    written = [part for sink in reversed(sinks) for part in sink.finish(detector, done, ending)]
    if written:
        say("; ".join(written) + ".")
    if left_over := sinks[-1].left_over:
        images = count(left_over, "image")
        say(f"Left out: the results of {images} of the earlier run that this run does not name.")


def _end_without_results(sinks: Sequence[Sink[_Result]], failures: Sequence[str]) -> NoReturn:
    for sink in sinks:
        sink.abort()
    if len(failures) > 1:
        say("No image could be read.")
    raise typer.Exit(2)
