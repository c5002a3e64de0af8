"""One driver for the commands that find something in many images: from the named images to the outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

import typer

from detrkit.cli.reading import ImageReader, Results
from detrkit.cli.sinks import Ending, Sink
from detrkit.common.outputs import check_outputs
from detrkit.common.terminal import count, interrupt_status, list_failures, say
from detrkit.results.positions import is_frame, place

if TYPE_CHECKING:
    from detrkit.inference.detector import Detector
    from detrkit.results.detections import Detections
    from detrkit.results.panoptic import PanopticSegmentation

_Result = TypeVar("_Result", bound="Detections | PanopticSegmentation")


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
    done = _done_before(reader, sinks)
    if reads_here and not done and not reader.finds_an_image():
        _end_without_results(sinks, [*mistakes, *reader.failures])

    detector: Detector | None = None
    interrupted: KeyboardInterrupt | None = None
    try:
        detector, results = start()
        reader.names = detector.names
        for position, image, result in results:
            for sink in sinks:
                if sink.redraws or position not in done:
                    sink.accept(position, image, result)
            done.add(position)
    except KeyboardInterrupt as error:
        interrupted = error

    failures = [*mistakes, *reader.failures]
    if not done and not interrupted:
        _end_without_results(sinks, failures)
    if interrupted and done and reader.ends_live:  # how the user ends it
        say(f"Stopped after {count(len(done), 'frame')}.")
        interrupted = None
    ending = Ending.WITH_FAILURES if failures else Ending.COMPLETE
    if done and detector is not None:
        ending = Ending.INTERRUPTED if interrupted else ending
        _finish(sinks, detector, sorted(done, key=place), ending)
    if interrupted:
        remedy = " Continue with --resume." if record.lasts else ""
        of = (
            f"{count(len(done), 'image')}" if reader.has_videos else f"{len(done)} of {count(total, 'image')}"
        )
        say(f"Interrupted after {of}.{remedy}")
        raise typer.Exit(interrupt_status(interrupted))
    list_failures(failures, None if reader.has_videos else total + len(mistakes))
    if failures:
        raise typer.Exit(1)


def _done_before(reader: ImageReader, sinks: Sequence[Sink[_Result]]) -> set[int]:
    """Opens the sinks; gives the positions that an earlier run has done, and tells the reader of them."""
    record = sinks[-1]
    others = [set(sink.begin()) for sink in sinks[:-1] if not sink.redraws]
    done = {i for i in record.begin() if is_frame(i) or all(i in begun for begun in others)}
    for sink in sinks[:-1]:
        if sink.redraws:
            sink.begin()
    reader.known = {i for i in done if is_frame(i) or (reader.track and reader.inputs[i].frame is not None)}
    if reader.track or any(sink.redraws for sink in sinks):
        reader.recall = record.recall
    reader.todo = [i for i in range(len(reader.inputs)) if i not in done or i in reader.known]
    return done


def _finish(sinks: Sequence[Sink[_Result]], detector: Detector, done: Sequence[int], ending: Ending) -> None:
    """Finishes the sinks and says what they have written."""
    written = [part for sink in reversed(sinks) for part in sink.finish(detector, done, ending)]
    if written:
        say("; ".join(written) + ".")
    if left_over := sinks[-1].left_over:
        images = count(left_over, "image")
        say(
            f"Left out: the results of {images} of the earlier run that are not among the inputs of this run."
        )


def _end_without_results(sinks: Sequence[Sink[_Result]], failures: Sequence[str]) -> NoReturn:
    for sink in sinks:
        sink.abort()
    if len(failures) > 1:
        say("No image could be read.")
    raise typer.Exit(2)
