"""``detrkit evaluate``: how well a model finds the objects of an annotated data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detrkit.cli.console import Debug, complain, load_detector, print_table
from detrkit.cli.output import check_json_file, write_json
from detrkit.errors import DetrkitError

if TYPE_CHECKING:
    from detrkit.evaluation import Evaluation


def evaluate(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")
    ],
    images: Annotated[Path, typer.Option(help="Folder of the images.")],
    annotations: Annotated[
        Path, typer.Option(help="COCO instances JSON, or with --panoptic-dir a COCO panoptic JSON.")
    ],
    panoptic_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the panoptic PNG files: evaluate panoptic quality instead of boxes."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here; - for stdout.")
    ] = None,
    save_dir: Annotated[
        Path | None,
        typer.Option(
            help="Write the detections as COCO results here, and precision-recall curves and confusion "
            "matrices as CSV and PNG."
        ),
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Print the numbers of each category too.")
    ] = False,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Most images at once; only images of the same processed size share a batch."
        ),
    ] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only use the first so many images.")] = None,
    masks: Annotated[
        bool | None,
        typer.Option(
            "--masks/--no-masks",
            help="Evaluate masks as well as boxes.  [default: where model and annotations have them]",
        ),
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            "-t",
            min=0,
            max=1,
            help="Least score of a segment for panoptic quality; boxes and masks always count, as COCO asks.",
        ),
    ] = 0.85,
    engine: Annotated[str, typer.Option(help="What runs the model: torch.")] = "torch",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    debug: Debug = False,
) -> None:
    """Measure a model on an annotated data set.

    Prints COCO's twelve numbers for boxes, and for masks where model and annotations have them; with
    `--panoptic-dir` the panoptic quality. Classes are matched with the data set's categories by name.
    """
    from detrkit.checkpoints.registry import resolve_model

    resolve_model(model)  # before any work: a misspelt name, with a suggestion
    check_json_file(json_file)
    if save_dir is not None:
        if save_dir.exists() and not save_dir.is_dir():
            raise DetrkitError(f"--save-dir needs a folder, but {save_dir} is a file")
        if panoptic_dir is None:
            from detrkit.evaluation.charts import check_charts_available

            check_charts_available()
    from detrkit.evaluation import evaluate_detector

    detector = load_detector(model, debug=debug, engine=engine, device=device, dtype=dtype, revision=revision)
    evaluation = evaluate_detector(
        detector,
        images,
        annotations,
        panoptic_dir=panoptic_dir,
        batch_size=batch_size,
        limit=limit,
        masks=masks,
        threshold=threshold,
    )
    if save_dir is not None:
        evaluation.save(save_dir)
    if json_file is not None:
        write_json({"model": model, "annotations": str(annotations), **evaluation.to_dict()}, json_file)
    if json_file is None or str(json_file) != "-":
        _print_numbers(evaluation, per_class)
    _summarise(evaluation, save_dir, json_file)


def _print_numbers(evaluation: Evaluation, per_class: bool) -> None:
    from detrkit.evaluation.coco import statistics_table

    detected = [result for result in (evaluation.boxes, evaluation.masks) if result is not None]
    if detected:
        print_table(statistics_table(*detected))
    if evaluation.panoptic is not None:
        print_table(evaluation.panoptic.table())
    if per_class:
        for result in (*detected, evaluation.panoptic):
            if result is not None:
                print_table(result.category_table())


def _summarise(evaluation: Evaluation, save_dir: Path | None, json_file: Path | None) -> None:
    images = "1 image" if evaluation.images == 1 else f"{evaluation.images} images"
    parts = [f"{images}, {evaluation.seconds_per_image:.3f} s each"]
    if json_file is not None and str(json_file) != "-":
        parts.append(f"numbers in {json_file}")
    if save_dir is not None:
        parts.append(f"results and pictures in {save_dir}")
    complain("; ".join(parts) + ".")
