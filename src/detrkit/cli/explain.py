"""``detrkit explain``: drawings of what a detector attends to, and of where its queries find objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrkit.cli import options
from detrkit.cli.output import check_save_dir, drawing_names, save_image
from detrkit.cli.reading import ImageReader
from detrkit.common.errors import ImageError, SettingError
from detrkit.common.outputs import check_outputs, image_output
from detrkit.common.terminal import count, say
from detrkit.inference.inputs import ImageInput, find_images, standard_input

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.detector import Detector


MaxDetections = Annotated[
    int, typer.Option(min=1, help="Maximum number of objects to show, highest scores first.")
]
Points = Annotated[
    list[str] | None,
    typer.Option(
        metavar="X,Y",
        help="Show the encoder's attention at this point, in pixels of the image; can be repeated.  "
        "[default: the centres of the objects]",
    ),
]
Layer = Annotated[
    int, typer.Option(help="Layer of encoder and decoder, from 0; negative numbers count from the end.")
]
Queries = Annotated[
    str | None,
    typer.Option(
        metavar="IMAGES", help="Show where each query finds objects in these images: a folder or pattern."
    ),
]


def explain(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="File, URL, or - for stdin.")],
    save_dir: Annotated[Path, typer.Option(help="Write the drawings here.")],
    model: options.Model = "detr-resnet-50",
    threshold: options.ObjectThreshold = None,
    detections: MaxDetections = 8,
    point: Points = None,
    layer: Layer = -1,
    queries: Queries = None,
    tiles: options.NoTiles = None,
    device: options.Device = None,
    batch_size: options.BatchSize = 1,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    exif_orientation: options.ExifOrientation = False,
    max_pixels: options.MaxPixels = None,
    max_bytes: options.MaxBytes = None,
    allow_private_addresses: options.AllowPrivate = False,
    debug: options.Debug = False,
) -> None:
    """Draw what a detector attends to in an image.

    Writes NAME_decoder.png, what the query of each detected object attends to; NAME_encoder.png, what the
    encoder attends to from chosen points; and with `--queries`, NAME_queries.png, where each query finds
    objects in many images. Images of `--queries` that cannot be read are reported and left out.
    """
    from detrkit.attention.maps import check_points
    from detrkit.checkpoints.identity import model_files
    from detrkit.checkpoints.registry import resolve_model
    from detrkit.inference.prepared import read_image

    image = standard_input(image)
    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    check_save_dir(save_dir)
    inputs, mistakes = find_images([queries]) if queries is not None else ([], [])
    if mistakes:
        raise ImageError(mistakes[0])
    stem = str(save_dir / Path(drawing_names([ImageInput(image)])[0]).stem)
    kinds = ("decoder", "encoder", *(["queries"] if inputs else []))
    read = [ImageInput(image).path, *(item.path for item in inputs), *model_files(model)]
    outputs = [image_output("--save-dir", Path(f"{stem}_{kind}.png")) for kind in kinds]
    check_outputs(outputs, read, overwrite=overwrite)
    limits = options.image_limits(max_pixels, max_bytes, allow_private_addresses)
    loaded = read_image(image, exif_orientation=exif_orientation, limits=limits)
    points = check_points([_parse_point(text) for text in point or ()], (loaded.height, loaded.width))

    detector = options.load_detector(model, debug=debug, engine="torch", device=device, revision=revision)
    detector = options.without_tiles(detector, tiles)
    drawings = _draw_attention(detector, loaded, threshold, layer, detections, points, required=not inputs)
    written = []
    for name, drawing in drawings:
        written.append(Path(f"{stem}_{name}.png"))
        save_image(drawing, written[-1])
    failed = 0
    if inputs:
        written.append(Path(f"{stem}_queries.png"))
        reader = ImageReader(inputs, exif_orientation=exif_orientation, debug=debug, limits=limits)
        save_image(_draw_queries(detector, reader, threshold, batch_size), written[-1])
        failed = len(reader.failures)
    say(f"{count(len(written), 'drawing')}: {', '.join(map(str, written))}.")
    if failed:
        say(f"{failed} of {len(inputs)} images of --queries could not be read.")
        raise typer.Exit(1)


def _draw_attention(
    detector: Detector,
    image: Image,
    threshold: float | None,
    layer: int,
    most: int,
    points: Sequence[Sequence[float]],
    *,
    required: bool,
) -> Iterator[tuple[str, Image]]:
    """Name and drawing of the decoder's attention to the objects, and of the encoder's from points.

    Args:
        detector: The model.
        image: The image.
        threshold: Only objects with a higher score are shown.
        layer: Layer of encoder and decoder.
        most: Maximum number of objects.
        points: X and y of each point in pixels; the centres of the objects if empty.
        required: Whether it is an error if nothing is detected and no point given.
    """
    from detrkit.attention.drawing import draw_attention, draw_panels
    from detrkit.attention.maps import NothingDetectedError, decoder_attention, encoder_attention

    try:
        found = decoder_attention(detector, image, threshold, layer=layer)[:most]
    except NothingDetectedError as error:
        if required and not points:
            raise
        say(f"{error}.")
    else:
        yield "decoder", draw_attention(image, found)
        # A box may extend beyond the image, and so may its centre.
        points = points or found.points.clip(0, image.size).tolist()
    if points:
        yield "encoder", draw_panels(image, encoder_attention(detector, image, points, layer=layer))


def _draw_queries(detector: Detector, reader: ImageReader, threshold: float | None, batch_size: int) -> Image:
    """Draws where in the images each query finds objects."""
    from detrkit.attention.drawing import draw_queries
    from detrkit.attention.maps import query_statistics
    from detrkit.results.detection_config import DEFAULT_THRESHOLD

    images = (image for _, image in reader)
    least = DEFAULT_THRESHOLD if threshold is None else threshold  # of queries, not of decisions
    statistics = query_statistics(detector, images, least, batch_size, total=len(reader.inputs))
    return draw_queries(statistics)


def _parse_point(text: str) -> tuple[float, float]:
    """X and Y of "X,Y", in pixels."""
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(f"--point must be X,Y in pixels, such as --point 320,240, not {text!r}") from error
    return x, y
