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
        f"The backbone is {backbone_title(backbone)}; a Transformer of width {config['d_model']} with "
        f"{config['encoder_layers']} encoder and {config['decoder_layers']} decoder layers follows, with "
        f"{_queries(config)} object queries and {class_list(config['id2label'])}."
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
        f"{_start(recipe)} with `detrkit train`, {recipe['epochs']} epochs of batches of "
        f"{recipe['batch_size']} images: AdamW with a learning rate of {rate:g}, weight decay "
        f"{recipe['weight_decay']:g}{clipped}, a {recipe['schedule']} schedule, `{recipe['augmentation']}` "
        f"augmentation{averaged}. The weights are those after epoch {epoch:.0f}, the best on the validation "
        "split. All options are in `recipe.json`, the course of the run is in `metrics.csv`."
    )


def _start(recipe: JsonObject) -> str:
    if recipe.get("backbone_weights"):
        return f"With backbone weights from {code(Path(recipe['backbone_weights']).name)}"
    if recipe["from_scratch"]:
        return f"From {'an ImageNet backbone' if recipe['pretrained_backbone'] else 'random weights'}"
    # The path of a local model would tell nobody anything, and may hold the user's name.
    model = recipe["model"]
    return f"From {code(Path(model).resolve().name if Path(model).exists() else model)}"


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
A small {title} that detects red blood cells, white blood cells and platelets in microscope images of
blood smears. It comes with detrkit, so that everything can be tried without a download; it is not a
medical device."""

_USES = (
    "For learning how detrkit works, for tests and demonstrations, and as an example of what `detrkit train` "
    "makes of 205 images.",
    "Not for diagnosis or for counting cells of patients. It has seen images of one data set with one way of "
    "staining, one magnification and one size; on images of other microscopes its detections may be wrong or "
    "missing.",
)

_DATA = """\
[BCCD](https://github.com/Shenggan/BCCD_Dataset), copyright 2017 shenggan, MIT licence: photographs of
blood smears, 640x480, with boxes for the classes Platelets, RBC (red blood cells) and WBC (white blood
cells). The data set's own splits are used: 205 images with 2,804 boxes to train and 87 with 1,137 to
validate. Its test split was left alone."""

_FINE_TUNING = """\
These weights were then fine-tuned on the same images, with {queries} queries in place of {queries_before},
by a script on the parts of `detrkit train`, in {runs}: AdamW with weight decay, a cosine schedule, flips and
90-degree rotations, brightness, contrast and saturation, the stem and first stage of the backbone fixed."""

_FINE_TUNING_RUN = """\
{steps} steps ({epochs:.0f} epochs) of {batch_size} images: a learning rate of {learning_rate:g}
({backbone_learning_rate:g} for the backbone), windows of {least:g} to {greatest:g} times the sides, an
average of the weights with decay {ema_decay:g}{targets}. {kept}"""

_IOU_TARGETS = ", and scores trained to be the IoU of their boxes (`--class-targets iou`)"

_RESULTS_NOTE = """\
COCO calls an object small below 32x32 pixels and large above 96x96. The settings were chosen on these same
images, so the numbers are a little better than those on new images would be."""

_OTHER_IMAGES = (
    "**Other images**: it knows nothing but cells; on other photographs its detections mean nothing."
)


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
    end = f"The settings are in `{FINE_TUNING_FILE}`, the losses in `fine_tuning.csv`."
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
        licence="Licence of the weights: Apache 2.0, as detrkit's.",
        uses=_USES,
        own_settings=True,
        transformers_calls=False,
        training=training,
        preprocessing=[
            f"{resize_text(size)}, scaled to [0, 1] and normalised with ImageNet's mean and deviation."
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
        f" Of two boxes{across} that overlap by more than IoU {settings.overlap:g} the better one stays."
        if settings.overlap is not None
        else ""
    )
    measured = settings.chosen["measured"]
    how = ", each fifth of the images with settings chosen on the others" if measured["cross_fitted"] else ""
    return [
        f"Without other options, `detection_config.json` decides: {settings.describe()}.{overlap} With these "
        "settings, and IoU 0.5 for a right detection, in percent over all classes"
        f"{how}:",
        table(list(_DECISIONS), [[percent(measured[name]) for name in _DECISIONS]]),
    ]


def _weakest(per_class: Iterable[JsonObject]) -> Iterable[str]:
    known = sorted((each for each in per_class if each["AP"] >= 0), key=lambda each: each["AP"])
    if len(known) > 1:
        weakest, best = known[0], known[-1]
        yield (
            f"**{weakest['name']}** are the weakest class: their AP is {percent(weakest['AP'])}, that of "
            f"{best['name']} {percent(best['AP'])}."
        )
