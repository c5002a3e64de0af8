"""``detrkit evaluate``: how well a model finds the objects of an annotated data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli.options import (
    Debug,
    Engine,
    Ray,
    RayCpus,
    RayWorkers,
    load_detector,
    load_ray_detector,
)
from detrkit.cli.output import check_json_file, check_save_dir
from detrkit.common.errors import DetrkitError
from detrkit.common.files import write_json
from detrkit.common.terminal import count, print_table, say

if TYPE_CHECKING:
    from detrkit.evaluation import Evaluation


def evaluate(
    annotations: Annotated[
        Path, typer.Option(help="COCO instances JSON, or with --panoptic-dir a COCO panoptic JSON.")
    ],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Instead of running a model on images, read its COCO results, or the panoptic.json of: "
            "detrkit segment --save-dir."
        ),
    ] = None,
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
    engine: Engine = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: a GPU where there is one]")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_cpus: RayCpus = None,
    debug: Debug = False,
) -> None:
    """Measure a model on an annotated data set.

    Prints COCO's twelve numbers for boxes, and for masks where model and annotations have them; with
    `--panoptic-dir` the panoptic quality. Classes are matched with the data set's categories by name. With
    `--ray` the model runs on the machines of a Ray cluster.
    """
    from detrkit.checkpoints.registry import resolve_model

    check_json_file(json_file)
    check_save_dir(save_dir, [])
    if save_dir is not None and panoptic_dir is None:
        from detrkit.evaluation.charts import check_charts_available

        check_charts_available()

    if predictions is not None:
        if model is not None or images is not None:
            raise DetrkitError("--predictions stands for a model's results; leave out --model and --images")
        from detrkit.evaluation import evaluate_predictions

        evaluation = evaluate_predictions(annotations, predictions, panoptic_dir=panoptic_dir)
    elif model is None or images is None:
        raise DetrkitError("give --model and --images to run a model, or --predictions to read its results")
    else:
        resolve_model(model)  # before any work: a misspelt name, with a suggestion
        from detrkit.evaluation import evaluate_detector

        setup: dict[str, Any] = {"engine": engine, "device": device, "dtype": dtype, "revision": revision}
        if ray is None:
            detector = load_detector(model, debug=debug, **setup)
        else:
            setup |= {"workers": ray_workers, "cpus": ray_cpus}
            detector = load_ray_detector(model, ray, debug=debug, **setup)
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
        sources = {"model": model, "annotations": str(annotations)}
        write_json({**sources, **evaluation.to_dict()}, json_file)
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
    seconds = evaluation.seconds_per_image
    parts = [count(evaluation.images, "image") + ("" if seconds is None else f", {seconds:.3f} s each")]
    if json_file is not None and str(json_file) != "-":
        parts.append(f"numbers in {json_file}")
    if save_dir is not None:
        parts.append(f"results and pictures in {save_dir}")
    say("; ".join(parts) + ".")
