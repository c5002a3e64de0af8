"""``detrkit segment``: panoptic segmentations as COCO panoptic files, pictures or a table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Revision,
    image_limits,
    load_detector,
)
from detrkit.cli.output import check_save_dir, picture_names, save_picture
from detrkit.cli.run import ImageRun
from detrkit.common.errors import DetrkitError
from detrkit.common.files import write_json
from detrkit.common.terminal import count, list_failures, print_table, say
from detrkit.inference.inputs import ImageInput, file_names, find_images, image_ids
from detrkit.results.journal import Journal

if TYPE_CHECKING:
    from detrkit.inference.detector import Detector
    from detrkit.results.panoptic import PanopticSegmentation

DOCUMENT = "panoptic.json"
PNG_FOLDER = "panoptic"
PICTURE_FOLDER = "pictures"
_JOURNAL = "unfinished.jsonl"


def segment(
    images: Images,
    model: Model = "detr-resnet-50-panoptic",
    threshold: Annotated[
        float, typer.Option("--threshold", "-t", min=0, max=1, help="Keep only segments with a higher score.")
    ] = 0.85,
    engine: Engine = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = 1,
    revision: Revision = None,
    save_dir: Annotated[
        Path | None,
        typer.Option(help=f"Write {DOCUMENT}, {PNG_FOLDER}/*.png and {PICTURE_FOLDER}/ with drawings here."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run into --save-dir ended.")
    ] = False,
    exif_orientation: ExifOrientation = False,
    max_pixels: MaxPixels = None,
    max_bytes: MaxBytes = None,
    allow_private_addresses: AllowPrivate = False,
    debug: Debug = False,
) -> None:
    """Give every pixel of images to an object or a kind of background.

    Prints a table; with `--save-dir`, writes a COCO panoptic document, a PNG file of segment ids for each
    image and drawings instead, which `detrkit evaluate --panoptic-dir` and panopticapi read. Images that
    cannot be read are reported and left out; the exit status is then 1, and 2 when none could be read. An
    interrupted run (exit status 130) is finished with `--resume`.
    """
    from detrkit.checkpoints.registry import resolve_model

    inputs, mistakes = find_images(images)
    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    if resume and save_dir is None:
        raise DetrkitError("--resume goes on with a run that has a --save-dir; name it")
    check_save_dir(save_dir and save_dir / PICTURE_FOLDER, inputs)
    check_save_dir(save_dir and save_dir / PNG_FOLDER, inputs)
    for mistake in mistakes:
        say(mistake)

    settings = {
        "model": model,
        "threshold": threshold,
        "dtype": dtype,
        "exif_orientation": exif_orientation,
    }
    output = None if save_dir is None else _Output(save_dir, inputs, settings, resume)
    todo = [i for i in range(len(inputs)) if output is None or i not in output.done]
    run = ImageRun(
        [inputs[i] for i in todo],
        exif_orientation=exif_orientation,
        debug=debug,
        limits=image_limits(max_pixels, max_bytes, allow_private_addresses),
    )
    readable = run.read()
    first = next(readable, None)
    if first is None and not (output and output.done):
        if len(mistakes) + len(run.failures) > 1:
            say("No image could be read.")
        raise typer.Exit(2)

    results: list[PanopticSegmentation] = []
    try:
        detector = load_detector(
            model, debug=debug, engine=engine, device=device, dtype=dtype, revision=revision
        )
        stream = partial(detector.stream_segments, threshold=threshold, batch_size=batch_size)
        found = run.results(stream, itertools.chain([first] if first else [], readable), "Segmenting")
        for place, image, segmentation in found:
            if output is None:
                results.append(segmentation)
            else:
                output.add(todo[place], image, segmentation)
    except KeyboardInterrupt:
        _print_results(results)
        finished = len(results) if output is None else len(output.done)
        remedy = "" if output is None else "; finish with --resume"
        say(f"Interrupted after {finished} of {len(inputs)} images{remedy}.")
        raise typer.Exit(130) from None

    if output is None:
        _print_results(results)
        say(f"{count(sum(map(len, results)), 'segment')} in {count(len(results), 'image')}.")
    else:
        say(output.finish(detector))
    list_failures([*mistakes, *run.failures], len(inputs) + len(mistakes))
    if mistakes or run.failures:
        raise typer.Exit(1)


class _Output:
    """The files of a run.

    Attributes:
        done: Position of an image among the inputs -> its entries of the document.
    """

    def __init__(
        self, folder: Path, inputs: Sequence[ImageInput], settings: dict[str, Any], resume: bool
    ) -> None:
        self.folder = folder
        self.inputs = inputs
        self.ids, self.names = image_ids(inputs), file_names(inputs)
        self.pictures = picture_names(inputs)
        self.journal = Journal(folder / _JOURNAL, settings)
        self.done: dict[int, dict[str, Any]] = {}
        entries = self._read_earlier() if resume else []
        positions = {(self.ids[i], self.names[i]): i for i in range(len(inputs))}
        for entry in entries:
            position = positions.get((entry["image"]["id"], entry["image"]["file_name"]))
            if position is not None and (folder / PNG_FOLDER / entry["annotation"]["file_name"]).is_file():
                self.done[position] = entry
        self.journal.start(list(self.done.values()))

    def _read_earlier(self) -> list[dict[str, Any]]:
        entries = [entry for _, entry in self.journal.entries()]
        document = self.folder / DOCUMENT
        if not entries and document.is_file():
            try:
                finished = json.loads(document.read_bytes())
                self.journal.check(finished.get("info"), document)
                annotations = {entry["image_id"]: entry for entry in finished["annotations"]}
                entries = [{"image": i, "annotation": annotations[i["id"]]} for i in finished["images"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DetrkitError(
                    f"cannot resume: {document} is not a document of detrkit segment; start anew without "
                    "--resume"
                ) from error
        return entries

    def add(self, position: int, image: Any, segmentation: PanopticSegmentation) -> None:
        """Writes an image's files, then its entry: an entry stands for files that are whole."""
        picture = Path(self.pictures[position])
        png = f"{picture.stem}.png"
        height, width = segmentation.image_size
        save_picture(segmentation.draw(image), self.folder / PICTURE_FOLDER / picture)
        save_picture(segmentation.to_png(), self.folder / PNG_FOLDER / png)
        entry = {
            "image": {
                "id": self.ids[position],
                "file_name": self.names[position],
                "width": width,
                "height": height,
            },
            "annotation": segmentation.to_coco(self.ids[position], png),
        }
        self.journal.add(entry)
        self.done[position] = entry

    def finish(self, detector: Detector) -> str:
        """Writes the document; returns a summary."""
        entries = [self.done[position] for position in sorted(self.done)]
        segments = [segment for entry in entries for segment in entry["annotation"]["segments_info"]]
        document = {
            "info": self.journal.settings,
            "images": [entry["image"] for entry in entries],
            "annotations": [entry["annotation"] for entry in entries],
            "categories": detector.categories({segment["category_id"] for segment in segments}),
        }
        write_json(document, self.folder / DOCUMENT)
        self.journal.remove()
        found = f"{count(len(segments), 'segment')} in {count(len(entries), 'image')}"
        return f"{found}; {DOCUMENT}, {PNG_FOLDER} and {PICTURE_FOLDER} in {self.folder}."


def _print_results(results: Sequence[PanopticSegmentation]) -> None:
    if not results:
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("image", overflow="fold")
    for heading in ("segment", "kind"):
        table.add_column(heading)
    for heading in ("score", "pixels", "share"):
        table.add_column(heading, justify="right")
    for found in results:
        source = Text(found.source or "")
        for name, entry in zip(found.names, found.segments):
            kind = "thing" if entry["isthing"] else "stuff"
            share = f"{100 * entry['area'] / found.ids.size:.1f}%"
            table.add_row(source, Text(name), kind, f"{entry['score']:.3f}", str(entry["area"]), share)
        if not found.segments:
            table.add_row(source, Text("(nothing)", style="dim"))
    print_table(table)
