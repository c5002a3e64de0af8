"""``detrkit data``: looks at a data set, splits it, or changes its format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrkit.cli import options
from detrkit.cli.help import Command, Group, print_help
from detrkit.common.errors import SettingError
from detrkit.common.outputs import COMMENT, JPEG_MARK, Output, check_outputs
from detrkit.common.terminal import count, make_table, print_table, say

if TYPE_CHECKING:
    from detrkit.data.checks import DatasetReport
    from detrkit.data.coco import DetectionDataset

app = typer.Typer(
    cls=Group,
    callback=print_help,
    invoke_without_command=True,
    help="Look at a data set, split it, or change its format.",
)

_SIZES = {"small": 32**2, "medium": 96**2}  # COCO's limits of an object's area in pixels

Path_ = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A YOLO data.yaml, a folder or JSON file of COCO, a Pascal VOC folder, or a Hugging Face "
        "data set.",
    ),
]
NewFolder = Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write, new or empty.")]
ImageFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the images of DATA, a COCO JSON file, if it is not beside it."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop if there are problems, with exit status 2.")]
Format = Annotated[str, typer.Option("--to", help="coco, yolo or voc.")]


@app.command(cls=Command)
def check(
    data: Path_,
    images: ImageFolder = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Write a contact sheet of annotated images here, a JPEG file.")
    ] = None,
    check_images: Annotated[
        bool,
        typer.Option(
            "--check-images",
            help="Decode every image, to find damaged ones, and those of one split in another.",
        ),
    ] = False,
    strict: Strict = False,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Print the counts, sizes and problems of a data set.

    Training and evaluation read the data set as it is after this check.
    """
    from detrkit.data.checks import check_dataset

    if sheet is not None:
        if sheet.suffix.lower() not in (".jpg", ".jpeg"):
            raise SettingError(f"--sheet must be a JPEG file, not {sheet}")
        check_outputs([Output("--sheet", sheet, JPEG_MARK)], [images, data], overwrite=overwrite)
    reports = {
        split: check_dataset(dataset, strict=strict, decode=check_images)
        for split, dataset in _splits(data, images).items()
    }
    for split, report in reports.items():
        _print_report(split, report)
    _warn_of_shared_images({split: report.dataset for split, report in reports.items()}, check_images)
    if sheet is not None:
        from detrkit.common.files import atomic_file
        from detrkit.data.contact_sheet import contact_sheet

        first = next(iter(reports.values())).dataset
        with atomic_file(sheet) as temporary:
            contact_sheet(first).save(temporary, quality=90, comment=COMMENT)
        say(f"Contact sheet in {sheet}.")


@app.command(cls=Command)
def split(
    data: Path_,
    output: NewFolder,
    val_fraction: Annotated[
        float, typer.Option(min=0.0001, max=0.9, help="Share of the images that become validation images.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    to: Format = "coco",
    images: ImageFolder = None,
    strict: Strict = False,
    debug: options.Debug = False,
) -> None:
    """Split a data set into training and validation images, every class with its share."""
    from detrkit.data.checks import check_dataset
    from detrkit.data.splitting import split_dataset
    from detrkit.data.writing import check_output

    check_output(output, to)
    found = _splits(data, images)
    whole = next((found[name] for name in ("all", "train") if name in found), None)
    if whole is None or len(found) > 1:
        raise SettingError(
            f"{data} has the splits {', '.join(found)} already; pass one of its annotation files"
        )
    train, val = split_dataset(
        check_dataset(_keep_masks(whole), strict=strict).dataset, val_fraction, seed=seed
    )
    _write({"train": train, "val": val}, output, to)


@app.command(cls=Command)
def convert(
    data: Path_,
    output: NewFolder,
    to: Format,
    images: ImageFolder = None,
    strict: Strict = False,
    debug: options.Debug = False,
) -> None:
    """Write a data set in another format, with all its splits and copies of its images."""
    from detrkit.data.checks import check_dataset
    from detrkit.data.writing import check_output

    check_output(output, to)
    found = {
        name: check_dataset(_keep_masks(dataset), strict=strict).dataset
        for name, dataset in _splits(data, images).items()
    }
    _write({"train" if name == "all" else name: dataset for name, dataset in found.items()}, output, to)


def _splits(data: str, images: Path | None) -> dict[str, DetectionDataset]:
    """All splits that a data set has."""
    from detrkit.data.coco import DetectionDataset
    from detrkit.data.layouts import WHOLE, open_any, open_split
    from detrkit.data.yolo import SPLITS

    if images is not None:
        return {WHOLE: DetectionDataset.from_coco(images, data)}
    found = {split: open_split(data, split) for split in (*SPLITS, WHOLE)}
    there = {split: dataset for split, dataset in found.items() if dataset is not None}
    return there or {WHOLE: open_any(data, *SPLITS, WHOLE)}  # the error says what is expected


def _warn_of_shared_images(splits: dict[str, DetectionDataset], decode: bool) -> None:
    """Says which images two splits share."""
    from itertools import combinations

    from detrkit.data.shared_images import describe_shared_images

    for names in combinations(splits, 2):
        first, second = (splits[name] for name in names)
        for line in describe_shared_images(first, second, names=names, decode=decode):
            say(line, title="Warning")


def _keep_masks(dataset: DetectionDataset) -> DetectionDataset:
    from dataclasses import replace

    return replace(dataset, return_masks=dataset.panoptic_dir is None and dataset.has_segmentations)


def _write(splits: dict[str, DetectionDataset], output: Path, to: str) -> None:
    from detrkit.data.writing import write_dataset

    left_out = write_dataset(splits, output, to)
    for split, crowds in left_out.items():
        if crowds:
            say(f"Left out of {split}: {count(crowds, 'crowd')}, which {to} cannot hold.")
    parts = (f"{split} {count(len(dataset), 'image')}" for split, dataset in splits.items())
    say(f"Wrote {output}: {', '.join(parts)}. Try: detrkit data check {output}")


def _print_report(split: str, report: DatasetReport) -> None:
    dataset = report.dataset
    print(f"{split}: {report}" if split != "all" else str(report))
    heights, widths = zip(*dataset.sizes)
    frame = ", read upright by EXIF" if dataset.upright else ""
    print(
        f"format {dataset.format}; images from {min(widths)}x{min(heights)} to "
        f"{max(widths)}x{max(heights)} pixels{frame}"
    )
    table = make_table(["class"], ["objects", "images", *_SIZES, "large"])
    for category, name in dataset.category_names.items():
        entries = [
            (row["image_id"], entry)
            for row in dataset.document["annotations"]
            for entry in (row["segments_info"] if dataset.panoptic_dir is not None else [row])
            if entry["category_id"] == category and not entry.get("iscrowd")
        ]
        areas = [entry["area"] for _, entry in entries]
        small, medium = (sum(area < limit for area in areas) for limit in _SIZES.values())
        numbers = (
            len(entries),
            len({image for image, _ in entries}),
            small,
            medium - small,
            len(areas) - medium,
        )
        table.add_row(name, *map(str, numbers))
    print_table(table)
