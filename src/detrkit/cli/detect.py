"""``detrkit detect``: boxes in images, as a table, a COCO document or pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from detrkit.cli.options import (
    AllowPrivate,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Engine,
    ExifOrientation,
    Images,
    MaxBytes,
    MaxPixels,
    Model,
    Ray,
    RayCpus,
    RayWorkers,
    Revision,
    image_limits,
    load_detector,
    load_ray_detector,
)
from detrkit.cli.output import check_json_file, check_save_dir, picture_names, save_picture
from detrkit.cli.run import ImageRun
from detrkit.common.errors import DetrkitError
from detrkit.common.terminal import count, list_failures, print_table, say
from detrkit.inference.inputs import file_names, find_images, image_ids
from detrkit.results.coco_document import CocoOutput, is_complete

if TYPE_CHECKING:
    from detrkit.results.detections import Detections


def detect(
    images: Images,
    model: Model = "detr-resnet-50",
    threshold: Annotated[
        float, typer.Option("--threshold", "-t", min=0, max=1, help="Show only objects with a higher score.")
    ] = 0.5,
    engine: Engine = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = 1,
    revision: Revision = None,
    save_dir: Annotated[Path | None, typer.Option(help="Write the pictures with their boxes here.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write one COCO document here; - for stdout.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run into the same --json ended.")
    ] = False,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_cpus: RayCpus = None,
    exif_orientation: ExifOrientation = False,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    allow_private_addresses: AllowPrivate = False,
    debug: Debug = False,
) -> None:
    """Find the objects in images.

    Prints a table; with `--json`, writes one COCO document (images, categories, annotations) instead. Images
    that cannot be read are reported and left out; the exit status is then 1, and 2 when none could be read.
    When interrupted, the results so far are still written, and the exit status is 130; `--resume` with the
    same `--json` goes on from there, or from wherever a run ended for another reason. With `--ray` the work
    is spread over the machines of a Ray cluster.
    """
    from detrkit.checkpoints.registry import resolve_model

    inputs, mistakes = find_images(images)
    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    if resume and json_file is None:
        raise DetrkitError("--resume goes on with a run that has a --json file; name it")
    if ray is not None and save_dir is not None:
        raise DetrkitError("the workers of --ray draw no pictures; leave out --save-dir, or --ray")
    check_json_file(json_file)
    check_save_dir(save_dir, inputs)
    for mistake in mistakes:
        say(mistake)
    ids, files = image_ids(inputs), file_names(inputs)
    if resume and inputs and json_file is not None and is_complete(json_file, ids, files):
        say(f"{json_file} holds all {count(len(inputs), 'image')} already; leave out --resume to start anew.")
        raise typer.Exit(1 if mistakes else 0)

    settings = {
        "model": model,
        "threshold": threshold,
        "dtype": dtype,
        "exif_orientation": exif_orientation,
    }
    pictures = None if save_dir is None else [save_dir / name for name in picture_names(inputs)]
    output: CocoOutput | _Table = _Table()
    if json_file is not None:
        output = CocoOutput(json_file, ids, files, settings, resume=resume, pictures=pictures)
    todo = [position for position in range(len(inputs)) if position not in output.done]
    run = ImageRun(
        [inputs[position] for position in todo],
        exif_orientation=exif_orientation,
        debug=debug,
        limits=image_limits(max_pixels, max_bytes, allow_private_addresses),
    )
    readable = run.read() if ray is None else iter(())
    first = next(readable, None)
    if first is None and not output.done and ray is None:
        _nothing_read(output, [*mistakes, *run.failures], resume)

    interrupted = False
    names: dict[int, str] = {}
    setup: dict[str, Any] = {"engine": engine, "device": device, "dtype": dtype, "revision": revision}
    found: Iterator[tuple[int, Any, Detections]]
    try:
        if ray is None:
            detector = load_detector(model, debug=debug, **setup)
            stream = partial(detector.stream, threshold=threshold, batch_size=batch_size, masks=False)
            found = run.results(stream, itertools.chain([first] if first else [], readable), "Detecting")
        else:
            setup |= {"workers": ray_workers, "cpus": ray_cpus, "limits": run.limits}
            detector = load_ray_detector(model, ray, debug=debug, **setup)
            found = run.ray_results(detector, threshold=threshold, batch_size=batch_size)
        names = detector.names
        for place, image, detections in found:
            if pictures is not None:
                save_picture(detections.draw(image), pictures[todo[place]])
            output.add(todo[place], detections)
    except KeyboardInterrupt:
        interrupted = True

    if output.done and names:
        output.write(names)
        _summarise(output, save_dir, json_file)
    if interrupted:
        remedy = " Go on with --resume." if isinstance(output, CocoOutput) and output.lasts else ""
        say(f"Interrupted after {len(output.done)} of {len(inputs)} images.{remedy}")
        raise typer.Exit(130)
    failures = [*mistakes, *run.failures]
    if not output.done:
        _nothing_read(output, failures, resume)
    if isinstance(output, CocoOutput) and output.left_over:
        say(
            f"Left out: the results of {count(output.left_over, 'image')} of the earlier run that are not "
            "among those of this one."
        )
    elif not (failures and resume):  # who resumes may want to try the images that failed again
        output.close()
    list_failures(failures, len(inputs) + len(mistakes))
    if failures:
        raise typer.Exit(1)


def _nothing_read(output: CocoOutput | _Table, failures: Sequence[str], resume: bool) -> NoReturn:
    if not resume:  # an earlier run's results, whose images may only be out of reach for now
        output.close()
    if len(failures) > 1:
        say("No image could be read.")
    raise typer.Exit(2)


class _Table:
    """The results of a run that ends up as a table.

    Attributes:
        done: Position of an image -> what was found in it.
    """

    def __init__(self) -> None:
        self.done: dict[int, Detections] = {}

    @property
    def objects(self) -> int:
        """How many were found so far."""
        return sum(map(len, self.done.values()))

    def add(self, position: int, detections: Detections) -> None:
        self.done[position] = detections

    def write(self, names: Mapping[int, str]) -> None:
        _print_results([self.done[position] for position in sorted(self.done)])

    def close(self) -> None:
        """There is nothing to leave behind."""


def _print_results(results: Sequence[Detections]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("image", overflow="fold")
    table.add_column("object")
    for heading in ("score", "x0", "y0", "x1", "y1"):
        table.add_column(heading, justify="right")
    for detections in results:
        source = detections.source or ""
        for found in detections:
            corners = (f"{value:.1f}" for value in found.box)
            table.add_row(Text(source), Text(found.name), f"{found.score:.3f}", *corners)
        if len(detections) == 0:
            table.add_row(Text(source), Text("(nothing)", style="dim"))
    print_table(table)


def _summarise(output: CocoOutput | _Table, save_dir: Path | None, json_file: Path | None) -> None:
    parts = [f"{count(output.objects, 'object')} in {count(len(output.done), 'image')}"]
    if json_file is not None and str(json_file) != "-":
        parts.append(f"results in {json_file}")
    if save_dir is not None:
        parts.append(f"pictures in {save_dir}")
    say("; ".join(parts) + ".")
