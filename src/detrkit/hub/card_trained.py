"""The cards of models that ``detrkit train`` made: fine-tuned ones, and those that come with detrkit."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from detrkit.common.errors import CheckpointError
from detrkit.common.schema import JsonObject
from detrkit.common.text import code, markdown, percent
from detrkit.evaluation.coco import STATISTICS
from detrkit.families import FAMILIES, Family
from detrkit.hub.card_facts import Facts
from detrkit.hub.cards import (
    Card,
    Results,
    backbone_title,
    bullets,
    class_list,
    common_failures,
    resize_text,
    table,
    variant_texts,
)
from detrkit.results.detection_config import DetectionConfig

_NUMBERS = ("PQ", "SQ", "RQ", "AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR100")


def trained_card(
    title: str,
    config: JsonObject,
    recipe: JsonObject,
    row: Mapping[str, float],
    *,
    dataset: str,
    images: int,
) -> str:
    """The card of a model that was just trained.

    Args:
        title: Name of the model, usually of its folder.
        config: The model's configuration.
        recipe: The training recipe's fields.
        row: The evaluation of the weights that are saved, a row of the log; numbers in [0, 1].
        dataset: Name of what it was evaluated on.
        images: Number of images in it.
    """
    family = FAMILIES[config["model_type"]]
    numbers = {name: row[name] for name in _NUMBERS if row.get(name, -1) >= 0}
    on_hub = not recipe["from_scratch"] and "/" in recipe["model"] and not Path(recipe["model"]).exists()
    return Card(
        title=title,
        model=title,
        family=family,
        masks=recipe["masks"],
        front_matter={"base_model": recipe["model"]} if on_hub else {},
        results=Results(numbers=numbers, dataset={"dataset_type": "coco-format", "dataset_name": dataset}),
        summary=f"{family.title} for {len(config['id2label'])} classes, trained with `detrkit train`.",
        own_settings=True,
        network=[_network(config)],
        variants=variant_texts(family, config, recipe["masks"]),
        training=[_procedure(family, recipe, row["epoch"])],
        result_texts=[
            f"On {code(dataset)} ({images} images), in percent:",
            table(list(numbers), [[percent(value) for value in numbers.values()]]),
        ],
        failures=common_failures(family, _queries(config), config.get("class_targets")),
    ).render()


def _network(config: JsonObject) -> str:
    backbone = config["backbone"] or config["backbone_config"]["model_type"]
    return (
        f"The backbone is {backbone_title(backbone)}. The Transformer has a width of {config['d_model']}, "
        f"{config['encoder_layers']} encoder layers, {config['decoder_layers']} decoder layers and "
        f"{_queries(config)} object queries. The model has {class_list(config['id2label'])}."
    )


def _queries(config: JsonObject) -> int:
    queries: int = config["two_stage_num_proposals" if config.get("two_stage") else "num_queries"]
    return queries


def _procedure(family: Family, recipe: JsonObject, epoch: float) -> str:
    rate = family.learning_rate if recipe["learning_rate"] is None else recipe["learning_rate"]
    clipped = f", gradients clipped to a norm of {recipe['clip_norm']:g}" if recipe["clip_norm"] else ""
    averaged = (
        f", and an average of the weights with decay {recipe['ema_decay']:g}" if recipe["ema_decay"] else ""
    )
    return (
        f"Trained {_start(recipe)} with `detrkit train` for {recipe['epochs']} epochs with batches of "
        f"{recipe['batch_size']} images: AdamW with a learning rate of {rate:g}, weight decay "
        f"{recipe['weight_decay']:g}{clipped}, a {recipe['schedule']} schedule, `{recipe['augmentation']}` "
        f"augmentation{averaged}. The weights are those of epoch {epoch:.0f}, which was the best on the "
        "validation split. `recipe.json` contains all options, and `metrics.csv` the metrics of each epoch."
    )


def _start(recipe: JsonObject) -> str:
    if recipe.get("backbone_weights"):
        return f"with backbone weights from {code(Path(recipe['backbone_weights']).name)}"
    if recipe["from_scratch"]:
        return f"from {'an ImageNet backbone' if recipe['pretrained_backbone'] else 'random weights'}"
    # The path of a local model means nothing to others, and may contain the user's name.
    model = recipe["model"]
    return f"from {code(Path(model).resolve().name if Path(model).exists() else model)}"


# The models that come with detrkit.

FILES = (
    *("config.json", "preprocessor_config.json", "detection_config.json", "recipe.json", "metrics.csv"),
    "evaluation.json",
)
FINE_TUNING_FILE = "fine_tuning.json"
"""What was done to the weights after the run of ``recipe.json``, if anything."""
IMAGE_SIZE = (480, 640)
"""Height and width in pixels of the blood-cell images."""

_DECISIONS = ("precision", "recall", "F1")
_SIZES = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge")

_SUMMARY = """\
A small {title} that detects red blood cells, white blood cells and platelets in microscope images of blood
smears. It is part of detrkit, so that you can try everything without a download. It is not a medical
device."""

_USES = (
    "For learning how detrkit works, for tests and demonstrations, and as an example of a model that "
    "`detrkit train` made from 205 images.",
    "Not for diagnosis or for counting cells of patients. It was trained on images of one data set with one "
    "staining method, one magnification and one size. On images from other microscopes, detections may be "
    "wrong or missing.",
)

_DATA = """\
[BCCD](https://github.com/Shenggan/BCCD_Dataset), copyright 2017 shenggan, MIT licence: photographs of
blood smears, 640x480, with boxes for the classes Platelets, RBC (red blood cells) and WBC (white blood
cells). The data set's own splits are used: 205 images with 2,804 boxes to train and 87 with 1,137 to
validate. The test split was not used."""

_FINE_TUNING = """\
These weights were then fine-tuned on the same images with {queries} instead of {queries_before} queries,
in {runs}, by a script that uses the parts of `detrkit train`: AdamW with weight decay, a cosine schedule,
augmentation by flips, 90-degree rotations, brightness, contrast and saturation, and a frozen stem and
first stage of the backbone."""

_FINE_TUNING_RUN = """\
{steps} steps ({epochs:.0f} epochs) with batches of {batch_size} images: a learning rate of
{learning_rate:g} ({backbone_learning_rate:g} for the backbone), crops of {least:g} to {greatest:g} times
the image's sides, an average of the weights with decay {ema_decay:g}{targets}. {kept}"""

_IOU_TARGETS = ", and scores trained to predict the IoU of their boxes (`--class-targets iou`)"

_RESULTS_NOTE = """\
COCO calls an object small below 32x32 pixels and large above 96x96. The settings were chosen on the same
images, so the numbers are slightly better than they would be on new images."""

_CHARTS = """\
`loss.png`, `ap.png` and `metrics.csv` show the run before the fine-tuning."""

_OTHER_IMAGES = "**Other images**: detections in images that are not blood smears are meaningless."


def bundled_card(folder: Path, facts: Facts) -> str:
    """The card of the blood-cell model, which has the name of its folder.

    All numbers are read from the files beside the model: those of the training run, and the
    ``evaluation.json`` of ``detrkit evaluate``.

    Raises:
        CheckpointError: A file that the card needs is missing or invalid.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]}, which its model card needs")
    try:
        config, processor, detection, recipe, evaluation = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in FILES
            if name.endswith(".json")
        )
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            evaluations = [row for row in csv.DictReader(file) if row.get("AP")]
        best = max(evaluations, key=lambda row: float(row["AP"]))
        training = [
            _DATA,
            _procedure(FAMILIES[config["model_type"]], recipe, float(best["epoch"])),
        ]
        if (folder / FINE_TUNING_FILE).is_file():
            runs = json.loads((folder / FINE_TUNING_FILE).read_text(encoding="utf-8"))
            training += _fine_tuning(runs, recipe["queries"])
        decisions = _decisions(detection)
        return _bundled(folder.name, config, processor["size"], evaluation, training, decisions, facts)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the files of {folder} do not make a model card: {error!r}") from error


def _fine_tuning(runs: Sequence[JsonObject], queries_before: int) -> list[str]:
    """The parts of a card that say what was done to the weights after the run of the recipe."""
    listed = []
    for run in runs:
        least, greatest = run["augmentation"]["window"]
        targets = _IOU_TARGETS if run.get("class_targets") == "iou" else ""
        listed.append(_FINE_TUNING_RUN.format(**run, least=least, greatest=greatest, targets=targets))
    count = {1: "one run", 2: "two runs", 3: "three runs"}.get(len(runs), f"{len(runs)} runs")
    start = _FINE_TUNING.format(queries=runs[-1]["queries"], queries_before=queries_before, runs=count)
    end = f"`{FINE_TUNING_FILE}` contains the settings, and `fine_tuning.csv` the losses. {_CHARTS}"
    return [start, bullets(listed), end]


def _bundled(
    name: str,
    config: JsonObject,
    size: Mapping[str, int],
    evaluation: JsonObject,
    training: Sequence[str],
    decisions: Sequence[str],
    facts: Facts,
) -> str:
    family, boxes = FAMILIES[config["model_type"]], evaluation["boxes"]
    rows = [
        ("all", boxes),
        *((markdown(each["name"]), each) for each in boxes["per_class"] if each["objects"]),
    ]
    return Card(
        title=name,
        model=name,
        family=family,
        masks=False,
        front_matter={"license": "apache-2.0", "datasets": ["bccd"]},
        results=Results(
            numbers={number: boxes[number] for number in STATISTICS if boxes[number] >= 0},
            dataset={"dataset_type": "bccd", "dataset_name": "BCCD (validation)"},
        ),
        summary=_SUMMARY.format(title=family.title),
        network=[_network(config)],
        variants=variant_texts(family, config, masks=False),
        licence="The weights have the same licence as detrkit: Apache 2.0.",
        uses=_USES,
        own_settings=True,
        transformers_calls=False,
        training=training,
        preprocessing=[
            f"{resize_text(size)}, scaled to [0, 1] and normalised with ImageNet's mean and standard "
            "deviation."
        ],
        result_texts=[
            f"In percent, on the {evaluation['images']} images of the validation split, with the overlap "
            "filter of the model's detection settings:",
            table(["class", *_SIZES], [[each, *(percent(row[n]) for n in _SIZES)] for each, row in rows]),
            *decisions,
            _RESULTS_NOTE,
        ],
        size=[
            table(
                ["", "counted or measured by us"],
                [row[:2] for row in (*facts.size_rows(), *facts.speed_rows())],
            )
        ],
        failures=[
            *_weakest(boxes["per_class"]),
            _OTHER_IMAGES,
            *common_failures(family, _queries(config), config.get("class_targets")),
        ],
    ).render()


def _decisions(detection: JsonObject) -> list[str]:
    """What the model's detection settings are, and what they lead to."""
    settings = DetectionConfig.from_dict(detection)
    across = " of any class" if settings.class_agnostic else " of one class"
    overlap = (
        f" Of two boxes{across} with an IoU above {settings.overlap:g}, the one with the lower score is "
        "dropped."
        if settings.overlap is not None
        else ""
    )
    measured = settings.chosen["measured"]
    how = ", cross-validated with five parts" if measured["cross_fitted"] else ""
    return [
        f"The default settings are in `detection_config.json`: {settings.describe()}.{overlap} With them, "
        f"and an IoU of 0.5 for a correct detection, in percent over all classes{how}:",
        table(list(_DECISIONS), [[percent(measured[name]) for name in _DECISIONS]]),
    ]


def _weakest(per_class: Iterable[JsonObject]) -> Iterable[str]:
    known = sorted((each for each in per_class if each["AP"] >= 0), key=lambda each: each["AP"])
    if len(known) > 1:
        weakest, best = known[0], known[-1]
        yield (
            f"**{weakest['name']}**: their AP is the lowest, {percent(weakest['AP'])}. The AP of "
            f"{best['name']} is {percent(best['AP'])}."
        )
