"""The options that several commands share, and loading of the model that they name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detrkit.common.errors import SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.terminal import quiet_libraries

if TYPE_CHECKING:
    from detrkit.data.coco import DetectionDataset
    from detrkit.inference.detector import Detector

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Images = Annotated[
    list[str],
    typer.Argument(metavar="IMAGES", help="Files, folders, patterns, URLs, or - for an image on stdin."),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")]
OptionalModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Also read the images in subfolders.")]
Threshold = Annotated[
    float,
    typer.Option(
        "--threshold", "-t", min=0, max=1, help="Keep only objects or segments with a higher score."
    ),
]
ObjectThreshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        "-t",
        min=0,
        max=1,
        help="Keep only objects with a higher score.  [default: as chosen for the model, or 0.5]",
    ),
]
Overlap = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="IoU above which the lower-scored of two boxes is dropped; 1 keeps all.  [default: as "
        "chosen for the model, or 1]",
    ),
]
ClassAgnostic = Annotated[
    bool | None,
    typer.Option(
        "--class-agnostic/--per-class-overlap",
        help="Whether --overlap also drops boxes of another class.  [default: as chosen for the model, or "
        "not]",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        help="What runs the model: torch, compile, onnx or openvino.  "
        "[default: the engine that the folder was exported for, or torch]"
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: a GPU if available]")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
BatchSize = Annotated[
    int,
    typer.Option(
        min=1, help="Maximum number of images at once; only images of the same processed size share a batch."
    ),
]
MaxObjects = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Maximum number of objects per image; the best are kept.  [default: as chosen for the model, or "
        "as many as it has queries]",
    ),
]
Tiles = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE|auto",
        help="Cut larger images into overlapping tiles of this side in pixels, or height x width such as "
        "480x640; auto for tiles like the images that the model was trained on, 0 for none.  [default: as "
        "chosen for the model, or none]",
    ),
]
NoTiles = Annotated[
    Literal["0"] | None,
    typer.Option("--tiles", help="0: look at whole images, although the model's settings ask for tiles."),
]
Queries = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Object queries of a two-stage Deformable DETR: more of them find more in crowds.  [default: as "
        "many as it was trained with]",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
ExifOrientation = Annotated[
    bool,
    typer.Option(
        "--exif-orientation/--no-exif-orientation",
        help="Rotate images as their EXIF orientation says; results then refer to the rotated image.",
    ),
]
Frames = Annotated[
    Literal["first", "all"],
    typer.Option(
        help="Frames of animations and pages of TIFFs to read: the first, with a warning, or all, each as a "
        "separate image."
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Maximum number of pixels of an image; larger ones are not read.  [default: 178956970]"
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Maximum number of bytes of an image from a URL or a pipe.  [default: 268435456]"
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private-addresses",
        help="Also fetch images from this computer and from private networks.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Also replace existing files that detrkit did not write; never an input."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Run on a Ray cluster at host:port or ray://host:port. Without an address: the cluster in "
        "RAY_ADDRESS, or one on this machine, which is started if necessary.",
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option(min=1, help="Maximum number of processes on the Ray cluster.  [default: as many as fit]"),
]
RayCpus = Annotated[
    int | None,
    typer.Option(min=1, help="Cores for each process.  [default: those of the smallest machine, up to 8]"),
]


Data = Annotated[
    str | None,
    typer.Option(
        help="Data set with its annotations: a YOLO data.yaml, a folder or JSON file of COCO, a Pascal VOC "
        "folder, or a Hugging Face data set."
    ),
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of --data: train, val, test or all.  [default: val, test, or all of it]"),
]


def open_data(
    data: str | None,
    split: str | None,
    images: Path | None = None,
    annotations: Path | None = None,
    panoptic_dir: Path | None = None,
) -> DetectionDataset:
    """The data set that options name, unchecked: a split of ``data``, or images and annotations.

    Args:
        data: Value of ``--data``.
        split: Value of ``--split``; by default the split that is meant for evaluation.
        images: Value of ``--images``, without ``--data``.
        annotations: Value of ``--annotations``, without ``--data``.
        panoptic_dir: Value of ``--panoptic-dir``, without ``--data``.

    Raises:
        AnnotationError: It cannot be read.
        SettingError: The split is unknown.
    """
    from detrkit.data.coco import DetectionDataset
    from detrkit.data.layouts import WHOLE, open_any
    from detrkit.data.yolo import SPLITS

    if data is None:
        assert images is not None
        assert annotations is not None
        return DetectionDataset.from_coco(images, annotations, panoptic_dir=panoptic_dir)
    if split is None:
        return open_any(data, "val", "test", WHOLE)
    canonical = next((name for name, aliases in SPLITS.items() if split in aliases), split)
    if canonical not in (*SPLITS, WHOLE):
        raise SettingError(f"--split must be one of {', '.join((*SPLITS, WHOLE))}, not {split!r}")
    return open_any(data, canonical)


def image_limits(max_pixels: int | None, max_bytes: int | None, allow_private_addresses: bool) -> ImageLimits:
    """The limits that options set, with defaults for the others."""
    given: dict[str, Any] = {"max_pixels": max_pixels, "max_bytes": max_bytes}
    given["allow_private"] = allow_private_addresses or None
    return ImageLimits(**{name: value for name, value in given.items() if value is not None})


def name_ray_address(arguments: list[str]) -> list[str]:
    """Inserts the default address after a ``--ray`` without one, so that an image can follow it."""
    if "--ray" not in arguments:
        return arguments  # most runs need not import what follows
    from detrkit.inference.ray_connection import AUTO, is_ray_address

    named = []
    for i, argument in enumerate(arguments):
        named.append(argument)
        if argument == "--ray" and not is_ray_address(arguments[i + 1] if i + 1 < len(arguments) else ""):
            named.append(AUTO)
    return named


def without_tiles(detector: Detector, tiles: str | None) -> Detector:
    """A detector for a command that looks at whole images, with the value of its ``--tiles``."""
    return detector if tiles is None else detector.with_config(detector.detection_config, tiles=0)


def load_detector(
    model: str,
    *,
    debug: bool,
    ray: str | None = None,
    workers: int | None = None,
    cpus: int | None = None,
    **settings: Any,
) -> Any:
    """A ``Detector`` or ``RayDetector``, without messages from the libraries unless debugging.

    Args:
        model: Value of ``--model``.
        debug: Value of ``--debug``.
        ray: Value of ``--ray``; None runs the model in this process.
        workers: Value of ``--ray-workers``.
        cpus: Value of ``--ray-cpus``.
        settings: Engine, device, dtype, revision, queries and limits.
    """
    from detrkit.checkpoints.loading import is_exported
    from detrkit.checkpoints.registry import resolve_model

    if not debug and not is_exported(resolve_model(model)):  # which needs none of them
        quiet_libraries()
    if ray is not None:
        from detrkit.inference.cluster import RayDetector

        return RayDetector(model, address=ray, workers=workers, cpus=cpus, **settings)
    from detrkit.inference.detector import Detector

    return Detector.from_pretrained(model, **settings)
