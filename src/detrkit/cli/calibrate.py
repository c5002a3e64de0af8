"""``detrkit calibrate``: thresholds, overlap filter and calibrated scores, chosen on annotated images."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detrkit.cli import options
from detrkit.cli.calibrate_speed import check_speed, find_speed, summarise_speed
from detrkit.common.errors import DetrkitError
from detrkit.common.files import atomic_folder
from detrkit.common.outputs import Output, check_outputs
from detrkit.common.screening import DETECTION_CONFIG, check_folder
from detrkit.common.terminal import count, print_table, say

if TYPE_CHECKING:
    from detrkit.benchmark.speed_points import Speeds
    from detrkit.evaluation.calibrate import Calibration

_MARK = b'"threshold": '
_CARD = "README.md"

OutputFolder = Annotated[
    Path,
    typer.Option(
        help="Folder for the model with its settings and the charts; the model's own folder gets only these."
    ),
]
ImageFolder = Annotated[Path | None, typer.Option(help="Folder of the images.")]
Annotations = Annotated[Path | None, typer.Option(help="COCO JSON of the images' objects.")]
Precision = Annotated[
    float | None,
    typer.Option(help="Minimum precision: find as many objects as it allows, instead of maximising F1."),
]
Recall = Annotated[
    float | None,
    typer.Option(
        help="Minimum recall: find this share of the objects, with as few false detections as possible."
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        help="Guarantee --recall on new images from the same source, with this confidence, such as 0.95."
    ),
]
Scores = Annotated[
    str,
    typer.Option(help="How scores are calibrated: temperature, isotonic, none, or auto, the best of them."),
]
PerClass = Annotated[
    bool | None,
    typer.Option(
        "--per-class/--one-threshold",
        help="Whether each class gets its own threshold.  [default: if that is better]",
    ),
]
MaxMs = Annotated[
    float | None,
    typer.Option(
        help="Most milliseconds per image on this machine: also choose input size, decoder layers, queries, "
        "engine and precision, for the best AP within it."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only this many images, from the first.")]
Strict = Annotated[
    bool,
    typer.Option("--strict", help="Stop if the data set has problems, instead of leaving out entries."),
]


def calibrate(
    model: options.Model,
    output: OutputFolder,
    images: ImageFolder = None,
    annotations: Annotations = None,
    data: options.Data = None,
    split: options.Split = None,
    precision: Precision = None,
    recall: Recall = None,
    confidence: Confidence = None,
    scores: Scores = "auto",
    per_class: PerClass = None,
    max_ms: MaxMs = None,
    batch_size: options.BatchSize = 1,
    limit: Limit = None,
    strict: Strict = False,
    engine: options.Engine = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Choose a model's detection settings on annotated images.

    Chooses the overlap filter, the threshold and curves that calibrate the scores, and stores them with the
    model as detection_config.json, which every command uses. Prints what they are worth, measured on images
    that they were not chosen on, and writes charts. Use images that the model was not trained on.

    With `--max-ms`, also looks for the most accurate way to run the model in so many milliseconds per image
    on this machine, and writes a model that runs so. Each row of its table is measured in a fresh process.
    """
    from detrkit.checkpoints.registry import resolve_model
    from detrkit.evaluation.calibrate import calibrate_detector
    from detrkit.evaluation.calibration_charts import comparison_table, threshold_table
    from detrkit.evaluation.charts import check_charts_available
    from detrkit.evaluation.choosing import Wishes

    name = resolve_model(model)  # before any work: a misspelt name, with a suggestion
    if (data is None) == (annotations is None or images is None):
        raise DetrkitError("pass either --data PATH, or --images DIR and --annotations FILE")
    if data is None and split is not None:
        raise DetrkitError("--split requires --data")
    wishes = Wishes(
        precision=precision, recall=recall, confidence=confidence, scores=scores, per_class=per_class
    )
    if max_ms is not None:
        check_speed(name, max_ms, wishes, output)
    _check_files(name, output, [images, annotations], overwrite=overwrite)
    check_charts_available()

    setup: dict[str, Any] = {"engine": engine, "device": device, "dtype": dtype, "revision": revision}
    reading: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "strict": strict}
    speeds = None
    if max_ms is None:
        detector = options.load_detector(model, debug=debug, **setup)
        dataset = options.open_data(data, split, images, annotations)
        found = calibrate_detector(detector, dataset, wishes, **reading)
    else:
        dataset = options.open_data(data, split, images, annotations)
        speeds = find_speed(name, dataset, wishes, max_ms, setup, reading, debug=debug)
        found = speeds.found
    in_place = _is_own_folder(name, output)
    _write(name, revision, output, found, speeds)
    if speeds is not None:
        print_table(speeds.table())
    print_table(comparison_table(found))
    print_table(threshold_table(found))
    _summarise(found, output, in_place=in_place)
    if speeds is not None:
        summarise_speed(speeds)


def _is_own_folder(name: str, output: Path) -> bool:
    from detrkit.checkpoints.loading import is_folder

    return is_folder(name) and output.exists() and output.samefile(name)


def _own_files(name: str) -> list[Path]:
    """The files of a model's folder but for its settings; none of a Hub id."""
    from detrkit.checkpoints.identity import model_files

    return [path for path in model_files(name) if path.name != DETECTION_CONFIG]


def _check_files(name: str, output: Path, inputs: list[Path | None], *, overwrite: bool) -> None:
    """Refuses, before any work, to write over files that are not ours, or beside an exported model."""
    from detrkit.checkpoints.loading import is_exported
    from detrkit.evaluation.calibration_charts import calibration_outputs

    own, notices = _own_files(name), _notices(name)
    outputs = [Output("--output", output / DETECTION_CONFIG, _MARK), *calibration_outputs(output)]
    if not _is_own_folder(name, output):
        if is_exported(str(output)) and not is_exported(name):
            raise DetrkitError(
                f"{output} contains an exported model, which would stay in use beside a copy of {name}; "
                "choose another folder"
            )
        copied = (*_copied(own), *notices)
        outputs += [Output("--output", output / path.name, _MARK, DETECTION_CONFIG) for path in copied]
    check_outputs(outputs, [*own, *notices, *inputs], overwrite=overwrite)


def _write(name: str, revision: str | None, output: Path, found: Calibration, speeds: Speeds | None) -> None:
    """Writes settings and charts, and the model unless it is there: its copy, or the one for a time."""
    from detrkit.evaluation.calibration_charts import save_calibration

    in_place = _is_own_folder(name, output)
    with atomic_folder(output) as folder:
        if speeds is not None:
            for path in speeds.chosen.folder.path.iterdir():
                shutil.copyfile(path, folder / path.name)
            speeds.save(folder)
        elif not in_place:
            _copy_model(name, revision, _own_files(name), folder)
        if not in_place:
            _copy_notices(name, _notices(name), found, folder)
        found.config.save_pretrained(folder)
        save_calibration(found, folder)


def _copied(own: list[Path]) -> list[Path]:
    """The files that the copy of a model will have."""
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    return [*(own or map(Path, files)), Path(_CARD)]


def _copy_model(name: str, revision: str | None, own: list[Path], folder: Path) -> None:
    """Copies a model's files into a folder, or saves the model of a Hub id there."""
    from detrkit.checkpoints.loading import load_pretrained
    from detrkit.models.adapters import base_of_adapter

    if own and base_of_adapter(Path(name)) is None:
        for path in own:
            shutil.copyfile(path, folder / path.name)
        return
    model, processor = load_pretrained(name, revision)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _notices(name: str) -> list[Path]:
    """What a model's folder says of its origin and licence, without its card; empty for a Hub id."""
    kinds = ("NOTICE", "LICENSE", "LICENCE", "COPYING")
    folder = Path(name)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.is_file() and path.stem.upper() in kinds]


def _copy_notices(name: str, notices: list[Path], found: Calibration, folder: Path) -> None:
    """Copies notices and card, with a note in the card that its numbers are not those of the new settings."""
    from detrkit.hub.cards import card_with_note, plain_card

    for path in notices:
        shutil.copyfile(path, folder / path.name)
    card = Path(name) / _CARD
    title = Path(name).name if Path(name).is_dir() else name
    text = (
        card.read_text(encoding="utf-8")
        if card.is_file()
        else plain_card(check_folder(folder)["config.json"], title)
    )
    data = Path(found.config.chosen["data"]).name
    speed = found.config.chosen.get("speed")
    run = "" if speed is None else f", run as `--max-ms {speed['max_ms']:g}` chose (see `speed.csv`),"
    note = (
        f"This is a copy of `{title}`{run} with other detection settings: `detrkit calibrate` chose those in "
        f"`{DETECTION_CONFIG}` on {count(len(found.raw.objects), 'image')} of `{data}`. "
        "`operating_points.csv` has the numbers with these settings. All settings and numbers below are the "
        "original's."
    )
    (folder / _CARD).write_text(card_with_note(text, note), encoding="utf-8")


def _summarise(found: Calibration, output: Path, *, in_place: bool) -> None:
    config = found.config
    images = count(len(found.raw.objects), "image")
    overlap = "no overlap filter"
    if config.overlap is not None:
        across = " across classes" if config.class_agnostic else ""
        overlap = f"overlap filter at IoU {config.overlap:g}{across}"
    scores = "scores calibrated" if config.calibration else "scores as they are"
    say(f"Chosen on {images}: {config.describe()}, {overlap}, {scores}.")
    wishes = found.wishes
    if wishes.confidence is not None:
        say(
            f"With confidence {wishes.confidence:g}, the recall on new images from the same source is at "
            f"least {wishes.recall:g}. This holds only if the model was not trained on any of the {images}."
        )
    else:
        say(
            "Precision, recall, F1, AP and errors are measured on images that were not used to choose the "
            "settings."
        )
    if in_place and (output / _CARD).is_file():
        say(
            f"{output / _CARD} still describes the earlier settings; correct it before you publish the model."
        )
    where = "the model" if in_place else "the model and its charts"
    say(f"Wrote {where} in {output}. Try: detrkit detect IMAGE --model {output}")
