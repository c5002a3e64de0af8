"""``detrkit segment``: panoptic segmentations as a table, or as COCO panoptic files and drawings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli import options
from detrkit.cli.output import check_save_dir
from detrkit.cli.reading import ImageReader, Results
from detrkit.cli.run import run_images
from detrkit.cli.sinks import (
    DRAWING_FOLDER,
    PANOPTIC_DOCUMENT,
    PNG_FOLDER,
    Drawings,
    PanopticFolder,
    ResultTable,
    Sink,
)
from detrkit.common.errors import DetrkitError
from detrkit.inference.inputs import Fingerprints, every_frame, find_images

if TYPE_CHECKING:
    from detrkit.inference.detector import Detector
    from detrkit.results.panoptic import PanopticSegmentation


def segment(
    images: options.Images,
    recursive: options.Recursive = False,
    model: options.Model = "detr-resnet-50-panoptic",
    threshold: options.Threshold = 0.85,
    tiles: options.NoTiles = None,
    engine: options.Engine = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    batch_size: options.BatchSize = 1,
    revision: options.Revision = None,
    save_dir: Annotated[
        Path | None,
        typer.Option(
            help=f"Write {PANOPTIC_DOCUMENT}, {PNG_FOLDER}/*.png and {DRAWING_FOLDER}/ with drawings here."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same --save-dir.")
    ] = False,
    overwrite: options.Overwrite = False,
    exif_orientation: options.ExifOrientation = False,
    frames: options.Frames = "first",
    max_pixels: options.MaxPixels = None,
    max_bytes: options.MaxBytes = None,
    allow_private_addresses: options.AllowPrivate = False,
    debug: options.Debug = False,
) -> None:
    """Assign every pixel of images to an object or background class.

    Prints a table; with `--save-dir`, writes a COCO panoptic document, a PNG file of segment ids for each
    image, and drawings instead. `detrkit evaluate --panoptic-dir` and panopticapi read these files.

    Images that cannot be read are reported and left out. `--resume` continues an interrupted run.
    """
    from detrkit.checkpoints.identity import run_info
    from detrkit.checkpoints.registry import resolve_model

    inputs, mistakes = find_images(images, recursive=recursive)
    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    if resume and save_dir is None:
        raise DetrkitError("--resume requires --save-dir DIR, the folder to continue")
    limits = options.image_limits(max_pixels, max_bytes, allow_private_addresses)
    inputs = every_frame(inputs, limits) if frames == "all" else inputs
    fingerprints = Fingerprints(inputs, limits)
    sinks: list[Sink[PanopticSegmentation]] = [_table()]
    if save_dir is not None:
        check_save_dir(save_dir)
        shared: dict[str, Any] = {"dtype": dtype, "exif_orientation": exif_orientation}
        info = run_info("segment", model, engine=engine, revision=revision, threshold=threshold, **shared)
        drawings = Drawings(save_dir / DRAWING_FOLDER, inputs, resume=resume)
        sinks = [
            drawings,
            PanopticFolder(save_dir, inputs, info, fingerprints, drawings.names, resume=resume),
        ]
    reader = ImageReader(inputs, exif_orientation=exif_orientation, debug=debug, limits=limits)
    reader.fingerprints = None if save_dir is None else fingerprints

    def start() -> tuple[Detector, Results[PanopticSegmentation]]:
        detector = options.load_detector(
            model, debug=debug, engine=engine, device=device, dtype=dtype, revision=revision
        )
        detector = options.without_tiles(detector, tiles)
        stream = partial(detector.stream_segments, threshold=threshold, batch_size=batch_size)
        return detector, reader.results(stream, "Segmenting")

    run_images(reader, mistakes, sinks, start, model=model, overwrite=overwrite)


def _table() -> ResultTable[PanopticSegmentation]:
    def rows(segmentation: PanopticSegmentation) -> Iterator[Sequence[str]]:
        for name, entry in zip(segmentation.names, segmentation.segments):
            kind = "thing" if entry["isthing"] else "stuff"
            share = f"{100 * entry['area'] / segmentation.ids.size:.1f}%"
            yield name, kind, f"{entry['score']:.3f}", str(entry["area"]), share

    return ResultTable("segment", ["segment", "kind"], ["score", "pixels", "share"], rows)
