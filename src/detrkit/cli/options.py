"""The options that several commands share, and what they ask for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from detrkit.common.limits import ImageLimits
from detrkit.common.terminal import quiet_libraries

Debug = Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")]
Images = Annotated[list[str], typer.Argument(metavar="IMAGES", help="Files, folders, patterns or addresses.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")]
Engine = Annotated[
    str | None,
    typer.Option(
        help="What runs the model: torch, compile, onnx or openvino.  "
        "[default: what the folder was exported for, or torch]"
    ),
]

Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")
]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
BatchSize = Annotated[
    int,
    typer.Option(min=1, help="Most images at once; only images of the same processed size share a batch."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
ExifOrientation = Annotated[
    bool,
    typer.Option(
        "--exif-orientation/--no-exif-orientation",
        help="Turn images as their EXIF entry says; results then refer to the turned image.",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1, help="Most pixels of an image; larger ones are refused unread.  [default: 178956970]"
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(min=1, help="Most bytes of an image from an address or a pipe.  [default: 268435456]"),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private-addresses",
        help="Fetch images from this computer and from private networks too, not only from the internet.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="[ADDRESS]",
        help="Work on the machines of a Ray cluster: host:port, ray://host:port, or nothing for the one that "
        "RAY_ADDRESS names or that runs here (started if there is none).",
    ),
]
RayWorkers = Annotated[
    int | None,
    typer.Option(min=1, help="Most processes on the Ray cluster.  [default: as many as there is room for]"),
]
RayCpus = Annotated[
    int | None,
    typer.Option(min=1, help="Cores of each.  [default: those of the smallest machine, up to 8]"),
]


def image_limits(max_pixels: int | None, max_bytes: int | None, allow_private_addresses: bool) -> ImageLimits:
    """The limits that options ask for; what is not asked for is as usual."""
    given: dict[str, Any] = {"max_pixels": max_pixels, "max_bytes": max_bytes}
    given["allow_private"] = allow_private_addresses or None
    return ImageLimits(**{name: value for name, value in given.items() if value is not None})


def name_ray_address(arguments: list[str]) -> list[str]:
    """Puts the address behind a ``--ray`` that has none, so that what follows it can be an image."""
    from detrkit.inference.cluster import AUTO, is_ray_address

    named = []
    for i, argument in enumerate(arguments):
        named.append(argument)
        if argument == "--ray" and not is_ray_address(arguments[i + 1] if i + 1 < len(arguments) else ""):
            named.append(AUTO)
    return named


def load_ray_detector(
    model: str, address: str, *, debug: bool, workers: int | None, cpus: int | None, **settings: Any
) -> Any:
    """A ``RayDetector`` without the libraries' chatter."""
    if not debug:
        quiet_libraries()
    from detrkit.inference.cluster import RayDetector

    return RayDetector(model, address=address, workers=workers, cpus=cpus, **settings)


def load_detector(model: str, *, debug: bool, **settings: Any) -> Any:
    """``Detector.from_pretrained`` without the libraries' chatter."""
    if not debug:
        quiet_libraries()
    from detrkit.inference.detector import Detector

    return Detector.from_pretrained(model, **settings)
