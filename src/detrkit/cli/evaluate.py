"""``detrkit evaluate``: AP and panoptic quality of a model on an annotated data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli import options
from detrkit.cli.output import check_save_dir
from detrkit.common.errors import DetrkitError
from detrkit.common.files import content_hash, write_json
from detrkit.common.outputs import check_outputs, document_output
from detrkit.common.terminal import count, print_table, say

if TYPE_CHECKING:
    from detrkit.evaluation import Evaluation


Annotations = Annotated[
    Path | None, typer.Option(help="COCO instances JSON, or with --panoptic-dir a COCO panoptic JSON.")
]
ImageFolder = Annotated[Path | None, typer.Option(help="Folder of the images.")]
Predictions = Annotated[
    Path | None,
    typer.Option(
        help="Evaluate these results instead of a model: a COCO results file, or with --panoptic-dir the "
        "panoptic.json of detrkit segment."
    ),
]
PanopticDir = Annotated[
    Path | None,
    typer.Option(help="Folder of the panoptic PNG files; evaluates panoptic quality instead of boxes."),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all metrics here; - for stdout.")]
SaveDir = Annotated[
    Path | None,
    typer.Option(
        help="Write the detections as COCO results here, and precision-recall curves and confusion matrices "
        "as CSV and PNG files; with --errors the worst mistakes as an image."
    ),
]
PerClass = Annotated[
    bool,
    typer.Option("--per-class", rich_help_panel="Report", help="Also print the metrics of each category."),
]
Errors = Annotated[
    bool,
    typer.Option(
        "--errors", help="Also sort the mistakes into kinds, with the AP50 that each costs (as TIDE does)."
    ),
]
Layers = Annotated[
    bool,
    typer.Option(
        "--layers", help="Also evaluate the boxes of each decoder layer, with and without the overlap filter."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only this many images, from the first.")]
Masks = Annotated[
    bool | None,
    typer.Option(
        "--masks/--no-masks",
        help="Evaluate masks as well as boxes.  [default: if model and annotations have masks]",
    ),
]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop if the data set has problems, instead of leaving out entries."),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw", help="Ignore the settings chosen for the model: no overlap filter, no calibration."
    ),
]
SegmentThreshold = Annotated[
    float,
    typer.Option(
        "--threshold",
        "-t",
        min=0,
        max=1,
        help="Minimum score of a segment for panoptic quality. AP uses all boxes and masks.",
    ),
]


def evaluate(
    annotations: Annotations = None,
    model: options.OptionalModel = None,
    images: ImageFolder = None,
    data: options.Data = None,
    split: options.Split = None,
    predictions: Predictions = None,
    panoptic_dir: PanopticDir = None,
    json_file: JsonFile = None,
    save_dir: SaveDir = None,
    overwrite: options.Overwrite = False,
    per_class: PerClass = False,
    errors: Errors = False,
    layers: Layers = False,
    batch_size: options.BatchSize = 1,
    limit: Limit = None,
    masks: Masks = None,
    max_objects: options.MaxObjects = None,
    queries: options.Queries = None,
    overlap: options.Overlap = None,
    tiles: options.Tiles = None,
    raw: Raw = False,
    threshold: SegmentThreshold = 0.85,
    strict: Strict = False,
    engine: options.Engine = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    ray: options.Ray = None,
    ray_workers: options.RayWorkers = None,
    ray_cpus: options.RayCpus = None,
    debug: options.Debug = False,
) -> None:
    """Evaluate a model on an annotated data set.

    Prints COCO's twelve metrics for boxes, and for masks if model and annotations have them; with
    `--panoptic-dir`, the panoptic quality. Classes are matched with the data set's categories by name. With
    `--ray`, the model runs on the machines of a Ray cluster.
    """
    from detrkit.checkpoints.identity import model_files, run_info
    from detrkit.checkpoints.registry import resolve_model

    read = [annotations, predictions, images, panoptic_dir, *model_files(model)]
    _check_outputs(json_file, save_dir, read, panoptic=panoptic_dir is not None, overwrite=overwrite)
    if (data is None) == (annotations is None):
        raise DetrkitError("pass either --data PATH, or --annotations FILE (and --images DIR)")
    if data is not None and (images or panoptic_dir or predictions):
        raise DetrkitError("--data replaces --images, --annotations and --panoptic-dir; leave them out")
    if data is None and split is not None:
        raise DetrkitError("--split requires --data")
    if predictions is not None:
        assert annotations is not None
        if layers:
            raise DetrkitError(
                "--layers runs a model; leave out --predictions, and pass --model and --images"
            )
        if model is not None or images is not None:
            raise DetrkitError("--predictions replaces a model; leave out --model and --images")
        from detrkit.evaluation import evaluate_predictions

        evaluation = evaluate_predictions(annotations, predictions, panoptic_dir=panoptic_dir, errors=errors)
    elif model is None or (images is None and data is None):
        raise DetrkitError("pass --model and --images to run a model, or --predictions to read its results")
    else:
        resolve_model(model)  # before any work: a misspelt name, with a suggestion
        from detrkit.evaluation import evaluate_dataset
        from detrkit.inference.tiles import read_tiles

        setup: dict[str, Any] = {"engine": engine, "device": device, "dtype": dtype, "revision": revision}
        setup |= {"queries": queries, "ray": ray, "workers": ray_workers, "cpus": ray_cpus}
        choices: dict[str, Any] = {"limit": limit, "masks": masks}
        choices |= {"batch_size": batch_size, "threshold": threshold, "max_objects": max_objects}
        choices |= {"overlap": overlap, "raw": raw, "strict": strict, "errors": errors, "layers": layers}
        choices["tiles"] = read_tiles(tiles)
        detector = options.load_detector(model, debug=debug, **setup)
        if panoptic_dir is not None and not detector.has_masks:
            raise DetrkitError("this model detects boxes only; leave out --panoptic-dir")
        dataset = options.open_data(data, split, images, annotations, panoptic_dir)
        evaluation = evaluate_dataset(detector, dataset, **choices)
    if save_dir is not None:
        evaluation.save(save_dir)
    if json_file is not None:
        settings: dict[str, Any] = {"dtype": dtype, "raw": raw, "queries": queries}
        if annotations is not None:
            settings["annotations"] = content_hash(annotations)
        if panoptic_dir is not None:
            settings["threshold"] = threshold
        info = run_info("evaluate", model, engine=engine, revision=revision, **settings)
        about = {"info": info, "model": model, "annotations": str(annotations or data)}
        write_json({**about, **evaluation.to_dict()}, json_file)
    if json_file is None or str(json_file) != "-":
        _print_numbers(evaluation, per_class)
    _summarise(evaluation, save_dir, json_file)


def _check_outputs(
    json_file: Path | None,
    save_dir: Path | None,
    inputs: Sequence[Path | None],
    *,
    panoptic: bool,
    overwrite: bool,
) -> None:
    from detrkit.evaluation.charts import check_charts_available, evaluation_outputs

    check_save_dir(save_dir)
    outputs = [] if json_file is None else [document_output("--json", json_file)]
    outputs += [] if save_dir is None else evaluation_outputs(save_dir, panoptic=panoptic)
    check_outputs(outputs, inputs, overwrite=overwrite)
    if save_dir is not None and not panoptic:
        check_charts_available()


def _print_numbers(evaluation: Evaluation, per_class: bool) -> None:
    from detrkit.evaluation.coco import statistics_table

    detected = [result for result in (evaluation.boxes, evaluation.masks) if result is not None]
    if detected:
        print_table(statistics_table(*detected))
    if evaluation.panoptic is not None:
        print_table(evaluation.panoptic.table())
    if evaluation.errors is not None:
        print_table(evaluation.errors.table())
    if evaluation.layers is not None:
        print_table(evaluation.layers.table())
    if per_class:
        for result in (*detected, evaluation.panoptic):
            if result is not None:
                print_table(result.category_table())


def _summarise(evaluation: Evaluation, save_dir: Path | None, json_file: Path | None) -> None:
    seconds = evaluation.seconds_per_image
    parts = [count(evaluation.images, "image") + ("" if seconds is None else f", {seconds:.3f} s each")]
    config = evaluation.detection_config
    if config is not None and config.overlap is not None and config.overlap < 1:
        parts.append(f"boxes that overlap a better one by more than IoU {config.overlap:g} left out")
    if json_file is not None and str(json_file) != "-":
        parts.append(f"metrics in {json_file}")
    if save_dir is not None:
        parts.append(f"results and charts in {save_dir}")
    say("; ".join(parts) + ".")
