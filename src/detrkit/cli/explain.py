"""``detrkit explain``: pictures of what a detector attends to, and of where its queries fire."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrkit.cli.options import (
    AllowPrivate,
    Debug,
    MaxBytes,
    MaxPixels,
    image_limits,
    load_detector,
)
from detrkit.cli.output import check_save_dir, picture_names, save_picture
from detrkit.cli.run import ImageRun
from detrkit.common.errors import ImageError, SettingError
from detrkit.common.terminal import count, say
from detrkit.inference.inputs import ImageInput, find_images

if TYPE_CHECKING:
    from detrkit.inference.detector import Detector


def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="File or address.")],
    save_dir: Annotated[Path, typer.Option(help="Write the pictures here.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")
    ] = "detr-resnet-50",
    threshold: Annotated[
        float, typer.Option("--threshold", "-t", min=0, max=1, help="Show only objects with a higher score.")
    ] = 0.5,
    detections: Annotated[
        int, typer.Option(min=1, help="Most objects to show, the most confident ones.")
    ] = 8,
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y",
            help="Show the encoder's attention here, in pixels of the image; can be repeated.  "
            "[default: the centres of the objects]",
        ),
    ] = None,
    layer: Annotated[
        int, typer.Option(help="Layer of encoder and decoder, from 0; negative numbers count from the last.")
    ] = -1,
    queries: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="Show which queries fire where in these: a folder or pattern."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Most of the images of --queries that go through the model at once.")
    ] = 1,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    exif_orientation: Annotated[
        bool,
        typer.Option(
            "--exif-orientation/--no-exif-orientation", help="Turn images as their EXIF entry says."
        ),
    ] = False,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    allow_private_addresses: AllowPrivate = False,
    debug: Debug = False,
) -> None:
    """Draw what a detector attends to in an image.

    Writes NAME_decoder.png, what the query of each detected object attends to; NAME_encoder.png, what the
    encoder attends to from chosen points; and with `--queries` NAME_queries.png, where each query found
    objects in many images. Images of `--queries` that cannot be read are reported and left out; the exit
    status is then 1.
    """
    from detrkit.attention.drawing import draw_attention, draw_panels
    from detrkit.attention.maps import (
        NothingDetectedError,
        check_points,
        decoder_attention,
        encoder_attention,
    )
    from detrkit.checkpoints.registry import resolve_model
    from detrkit.inference.prepared import read_image

    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    check_save_dir(save_dir, [])
    inputs, mistakes = find_images([queries]) if queries is not None else ([], [])
    if mistakes:
        raise ImageError(mistakes[0])
    limits = image_limits(max_pixels, max_bytes, allow_private_addresses)
    picture = read_image(image, exif_orientation=exif_orientation, limits=limits)
    points: Sequence[Sequence[float]] = check_points(
        [_parse_point(text) for text in point or ()], (picture.height, picture.width)
    )

    detector = load_detector(model, debug=debug, engine="torch", device=device, revision=revision)
    stem = save_dir / Path(picture_names([ImageInput(image)])[0]).stem
    written = []
    try:
        found = decoder_attention(detector, picture, threshold, layer=layer)[:detections]
    except NothingDetectedError as error:
        if not points and not inputs:
            raise
        say(f"{error}.")
    else:
        written.append(Path(f"{stem}_decoder.png"))
        save_picture(draw_attention(picture, found), written[-1])
        # A box may reach over the border, and so may its centre.
        points = points or found.points.clip(0, picture.size).tolist()
    if points:
        attention = encoder_attention(detector, picture, points, layer=layer)
        written.append(Path(f"{stem}_encoder.png"))
        save_picture(draw_panels(picture, attention), written[-1])
    failed = 0
    if inputs:
        written.append(Path(f"{stem}_queries.png"))
        run = ImageRun(inputs, exif_orientation=exif_orientation, debug=debug, limits=limits)
        _draw_queries(detector, run, threshold, batch_size, written[-1])
        failed = len(run.failures)
    say(f"{count(len(written), 'picture')}: {', '.join(map(str, written))}.")
    if failed:
        say(f"{failed} of {len(inputs)} images of --queries could not be read.")
        raise typer.Exit(1)


def _draw_queries(detector: Detector, run: ImageRun, threshold: float, batch_size: int, path: Path) -> None:
    """Writes the picture of where queries fire in images."""
    from detrkit.attention.drawing import draw_queries
    from detrkit.attention.maps import query_statistics

    pictures = (picture for _, picture in run.read())
    statistics = query_statistics(detector, pictures, threshold, batch_size, total=len(run.inputs))
    save_picture(draw_queries(statistics), path)


def _parse_point(text: str) -> tuple[float, float]:
    """Two numbers with a comma between them."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(f"--point needs X,Y in pixels, such as --point 320,240, not {text!r}") from error
    return x, y
