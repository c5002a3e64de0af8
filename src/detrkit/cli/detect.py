"""``detrkit detect``: boxes in images, as a table, a COCO document or pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli.console import (
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
    Revision,
    complain,
    count,
    image_limits,
    load_detector,
    print_table,
)
from detrkit.cli.inputs import ImageInput, file_names, find_images, image_ids
from detrkit.cli.output import check_json_file, check_save_dir, save_picture, write_json
from detrkit.cli.run import ImageRun

if TYPE_CHECKING:
    from detrkit.detections import Detections


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
    exif_orientation: ExifOrientation = False,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    allow_private_addresses: AllowPrivate = False,
    debug: Debug = False,
) -> None:
    """Find the objects in images.

    Prints a table; with `--json`, writes one COCO document (images, categories, annotations) instead. Images
    that cannot be read are reported and left out; the exit status is then 1, and 2 when none could be read.
    When interrupted, the results so far are still written, and the exit status is 130.
    """
    from detrkit.checkpoints.registry import resolve_model

    inputs, mistakes = find_images(images)
    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    check_json_file(json_file)
    check_save_dir(save_dir, inputs)
    for mistake in mistakes:
        complain(mistake)

    limits = image_limits(max_pixels, max_bytes, allow_private_addresses)
    run = ImageRun(inputs, exif_orientation=exif_orientation, debug=debug, limits=limits)
    readable = run.read()
    first = next(readable, None)
    if first is None:
        if len(mistakes) + run.failed > 1:
            complain("No image could be read.")
        raise typer.Exit(2)

    interrupted = False
    results: list[tuple[int, Detections]] = []
    names: dict[int, str] = {}
    try:
        detector = load_detector(
            model, debug=debug, engine=engine, device=device, dtype=dtype, revision=revision
        )
        names = detector.names
        stream = partial(detector.stream, threshold=threshold, batch_size=batch_size, masks=False)
        for position, image, detections in run.results(
            stream, itertools.chain([first], readable), "Detecting"
        ):
            if save_dir is not None:
                save_picture(detections.draw(image), save_dir / run.picture_names[position])
            results.append((position, detections))
    except KeyboardInterrupt:
        interrupted = True

    if results:
        if json_file is not None:
            write_json(coco_document(inputs, results, names), json_file)
        else:
            _print_results(results)
        _summarise(results, save_dir, json_file)
    if interrupted:
        complain(f"Interrupted after {len(results)} of {len(inputs)} images.")
        raise typer.Exit(130)
    failed = len(mistakes) + run.failed
    if failed:
        complain(f"{failed} of {len(inputs) + len(mistakes)} inputs could not be read.")
        raise typer.Exit(1)


def coco_document(
    inputs: Sequence[ImageInput], results: Sequence[tuple[int, Detections]], names: dict[int, str]
) -> dict[str, list[dict[str, Any]]]:
    """One COCO document for a run.

    Args:
        inputs: All images that the user named; ids and file names do not depend on which could be read.
        results: Position in ``inputs`` and detections of the images that were read.
        names: Class id -> class name of the model.

    Returns:
        ``images``, ``categories`` and ``annotations``. Class ids that COCO left unused ("N/A") are
        only listed when a detection has them.
    """
    ids, base_names = image_ids(inputs), file_names(inputs)
    document: dict[str, list[dict[str, Any]]] = {"images": [], "categories": [], "annotations": []}
    for position, detections in results:
        height, width = detections.image_size
        document["images"].append(
            {"id": ids[position], "file_name": base_names[position], "width": width, "height": height}
        )
        first_id = len(document["annotations"]) + 1
        document["annotations"] += detections.to_coco(image_id=ids[position], first_id=first_id)
    used = {annotation["category_id"] for annotation in document["annotations"]}
    listed = {label: name for label, name in names.items() if name != "N/A" or label in used}
    document["categories"] = [{"id": label, "name": name} for label, name in sorted(listed.items())]
    return document


def _print_results(results: Sequence[tuple[int, Detections]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("image", overflow="fold")
    table.add_column("object")
    for heading in ("score", "x0", "y0", "x1", "y1"):
        table.add_column(heading, justify="right")
    for _, detections in results:
        source = detections.source or ""
        for found in detections:
            corners = (f"{value:.1f}" for value in found.box)
            table.add_row(Text(source), Text(found.name), f"{found.score:.3f}", *corners)
        if len(detections) == 0:
            table.add_row(Text(source), Text("(nothing)", style="dim"))
    print_table(table)


def _summarise(
    results: Sequence[tuple[int, Detections]], save_dir: Path | None, json_file: Path | None
) -> None:
    objects = sum(len(detections) for _, detections in results)
    parts = [f"{count(objects, 'object')} in {count(len(results), 'image')}"]
    if json_file is not None and str(json_file) != "-":
        parts.append(f"results in {json_file}")
    if save_dir is not None:
        parts.append(f"pictures in {save_dir}")
    complain("; ".join(parts) + ".")
