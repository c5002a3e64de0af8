"""``detrkit detect``: boxes in images, as a table, a COCO document or drawings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli import options
from detrkit.cli.reading import ImageReader, Results
from detrkit.cli.result_files import DetectionTable, ResultFiles, ResultPaths
from detrkit.cli.run import run_images
from detrkit.cli.sinks import Drawings, Sink
from detrkit.cli.video_sink import VideoDrawings
from detrkit.common.errors import DetrkitError
from detrkit.common.limits import ImageLimits
from detrkit.common.text import short_name
from detrkit.inference.inputs import Fingerprints, ImageInput, every_frame, find_images
from detrkit.inference.video_names import is_live

if TYPE_CHECKING:
    from detrkit.inference.detector import Detector
    from detrkit.results.detections import Detections


def detect(
    images: options.Images,
    recursive: options.Recursive = False,
    model: options.Model = "detr-resnet-50",
    threshold: options.ObjectThreshold = None,
    overlap: options.Overlap = None,
    class_agnostic: options.ClassAgnostic = None,
    max_objects: options.MaxObjects = None,
    queries: options.Queries = None,
    tiles: options.Tiles = None,
    engine: options.Engine = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    batch_size: options.BatchSize = 1,
    revision: options.Revision = None,
    save_dir: Annotated[Path | None, typer.Option(help="Write the images with drawn boxes here.")] = None,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write one COCO document here, or one line for each image (.jsonl); - for stdout."
        ),
    ] = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Write a table here, one row for each object; - for stdout.")
    ] = None,
    counts_file: Annotated[
        Path | None,
        typer.Option(
            "--counts", help="Write a table here, one row for each image, one column for each class."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same output files.")
    ] = False,
    ray: options.Ray = None,
    ray_workers: options.RayWorkers = None,
    ray_cpus: options.RayCpus = None,
    overwrite: options.Overwrite = False,
    exif_orientation: options.ExifOrientation = False,
    frames: options.Frames = "first",
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Process only every Nth frame of a video.")
    ] = 1,
    track: Annotated[
        bool, typer.Option("--track", help="Follow objects from frame to frame, and number them.")
    ] = False,
    max_pixels: options.MaxPixels = None,
    max_bytes: options.MaxBytes = None,
    allow_private_addresses: options.AllowPrivate = False,
    debug: options.Debug = False,
) -> None:
    """Find the objects in images and videos.

    Prints a table. With `--json`, `--csv` or `--counts`, writes files instead: one COCO document (images,
    categories, annotations), a table of objects, a table of counts. Videos are files, numbers of cameras and
    RTSP addresses; each frame is an image. Ctrl-C ends a camera.

    Images that cannot be read are reported and left out. An interrupted run writes the results so far; with
    the same files, `--resume` continues a run however it ended. With `--ray`, the images are shared among the
    machines of a Ray cluster.
    """
    from detrkit.checkpoints.identity import run_info
    from detrkit.checkpoints.loading import read_detection_config
    from detrkit.checkpoints.opening import open_processor
    from detrkit.checkpoints.registry import resolve_model
    from detrkit.inference.tiles import read_tiles, with_tiles

    inputs, mistakes = find_images(images, videos=True, recursive=recursive)
    name = resolve_model(model)  # before any work: a misspelt name, with a suggestion
    paths = ResultPaths(json_file, csv_file, counts_file)
    if resume and not paths:
        raise DetrkitError("--resume requires --json FILE, --csv FILE or --counts FILE, which it continues")
    if ray is not None and save_dir is not None:
        raise DetrkitError("--ray does not write drawings; leave out --save-dir, or --ray")
    if ray is not None and any(item.source.startswith(("/dev/", "/proc/self/")) for item in inputs):
        raise DetrkitError("--ray does not read standard input; name files or URLs, or leave out --ray")
    limits = options.image_limits(max_pixels, max_bytes, allow_private_addresses)
    if frames == "all":
        if ray is not None:
            raise DetrkitError("--ray reads first frames only; leave out --frames, or --ray")
        inputs = every_frame(inputs, limits)
    in_time = _check_videos(inputs, every=every, track=track, ray=ray)
    # The settings of the model are read here and now, so that the document tells them.
    config = read_detection_config(name, revision).with_options(
        threshold=threshold, overlap=overlap, class_agnostic=class_agnostic, max_objects=max_objects
    )
    config = with_tiles(config, read_tiles(tiles), partial(open_processor, name, revision))
    fingerprints = Fingerprints(inputs, limits)
    sinks, names = _drawings(save_dir, inputs, limits, resume=resume)
    if not paths:
        sinks.append(DetectionTable(config.describe()))
    else:
        shared: dict[str, Any] = {**config.decisions(), "queries": queries, "dtype": dtype}
        shared["exif_orientation"] = exif_orientation
        info = run_info("detect", model, engine=engine, revision=revision, **shared, **in_time)
        how: dict[str, Any] = {"threshold": config.describe(), "tracks": track, "resume": resume}
        sinks.append(ResultFiles(paths, inputs, info, fingerprints, names, **how))
    reader = ImageReader(
        inputs, exif_orientation=exif_orientation, debug=debug, limits=limits, every=every, track=track
    )
    reader.fingerprints = fingerprints if paths else None

    def start() -> tuple[Detector, Results[Detections]]:
        setup: dict[str, Any] = {"engine": engine, "device": device, "dtype": dtype, "revision": revision}
        setup |= {"ray": ray, "workers": ray_workers, "cpus": ray_cpus, "limits": limits, "queries": queries}
        detector = options.load_detector(model, debug=debug, **setup).with_config(config)
        if ray is not None:
            return detector, reader.cluster_results(detector, batch_size=batch_size)
        stream = partial(detector.stream, masks=False, batch_size=batch_size)
        return detector, reader.results(stream, "Detecting")

    run_images(reader, mistakes, sinks, start, model=model, overwrite=overwrite, reads_here=ray is None)


def _drawings(
    save_dir: Path | None, inputs: Sequence[ImageInput], limits: ImageLimits, *, resume: bool
) -> tuple[list[Sink[Detections]], list[str] | None]:
    """The sinks that draw, and the names of the drawings."""
    if save_dir is None:
        return [], None
    drawings = Drawings(save_dir, inputs, resume=resume)
    sinks: list[Sink[Detections]] = []
    if not all(item.video for item in inputs):
        sinks.append(drawings)
    if any(item.video for item in inputs):
        sinks.append(VideoDrawings(save_dir, inputs, drawings.names, limits))
    return sinks, drawings.names


def _check_videos(
    inputs: Sequence[ImageInput], *, every: int, track: bool, ray: str | None
) -> dict[str, object]:
    """Checks what is said of videos; gives what results depend on, by the names for a document's ``info``."""
    videos = [item for item in inputs if item.video]
    if every > 1 and not videos:
        raise DetrkitError("--every is for videos; name one, or leave it out")
    if not videos and all(item.frame is None for item in inputs):
        if track:
            raise DetrkitError(
                "--track follows objects through a video, or through an animation with --frames all; name one"
            )
        return {}
    if not videos:
        return {"track": track}
    if ray is not None:
        raise DetrkitError("--ray reads images only; leave out the videos, or --ray")
    if endless := [item for item in inputs[:-1] if item.video and is_live(item.source)]:
        raise DetrkitError(
            f"{short_name(endless[0].source)} is a camera or stream, which does not end; name one only, as "
            "the last input"
        )
    from detrkit.inference.video import import_av

    import_av()  # before any work
    return {"every": every, "track": track}
