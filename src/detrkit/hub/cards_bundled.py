"""The card of a model that comes with the package: a detector trained on blood cells by detrkit itself.

All numbers are read from the files beside the model: ``config.json``, ``preprocessor_config.json``,
``recipe.json`` and ``metrics.csv`` of the run that made it, and ``evaluation.json`` of ``detrkit evaluate``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from detrkit.common.errors import CheckpointError
from detrkit.evaluation.coco import STATISTICS
from detrkit.families import FAMILIES
from detrkit.hub import card_texts as texts
from detrkit.hub.cards import (
    PIPELINE_TAGS,
    Facts,
    backbone_title,
    bullets,
    citation,
    failures_of_family,
    front_matter,
    how_to_use,
    join_sections,
    percent,
    size_rows,
    speed_rows,
    table,
)

FILES = ("config.json", "preprocessor_config.json", "recipe.json", "metrics.csv", "evaluation.json")
IMAGE_SIZE = (480, 640)
"""Height and width in pixels of the data set's images."""

_MAIN = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge")
_FAMILY = "deformable_detr"

_SUMMARY = """\
A small Deformable DETR that finds red blood cells, white blood cells and platelets in microscope images
of blood smears. It comes with detrkit, so that everything can be tried without a download; it is not a
medical device."""

_USES = """\
For learning how detrkit works, for tests and demonstrations, and as an example of what `detrkit train`
makes of 205 images."""

_LIMITS = """\
Not for diagnosis or for counting cells of patients. It has seen images of one data set with one way of
staining, one magnification and one size; on other microscopes it may find nothing, or anything."""

_DATA = """\
[BCCD](https://github.com/Shenggan/BCCD_Dataset), copyright 2017 shenggan, MIT licence: photographs of
blood smears, 640x480, with boxes for the classes Platelets, RBC (red blood cells) and WBC (white blood
cells). The data set's own splits are used: 205 images with 2,804 boxes to train and 87 with 1,137 to
validate. Its test split was left alone."""

_RESULTS_NOTE = """\
COCO calls an object small below 32x32 pixels and large above 96x96. The epoch that is kept was chosen
by its AP on these same images, so the numbers are a little better than those of new images would be."""

_OTHER_IMAGES = (
    "**Other images**: it knows nothing but cells, and on other photographs its detections mean nothing."
)


def bundled_card(folder: Path, facts: Facts) -> str:
    """The card of the blood-cell model.

    Args:
        folder: The model's folder; its name is the model's name.
        facts: What was counted and measured of the model.

    Raises:
        CheckpointError: A file that the card needs is missing, or is not what it should be.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]}, which its model card needs")
    try:
        config, processor, recipe, evaluation = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in FILES
            if name.endswith(".json")
        )
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("AP")]
        return _card(folder.name, config, processor, recipe, evaluation, rows, facts)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the files of {folder} do not make a model card: {error!r}") from error


def _card(
    name: str,
    config: Mapping[str, Any],
    processor: Mapping[str, Any],
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    rows: list[dict[str, str]],
    facts: Facts,
) -> str:
    boxes = evaluation["boxes"]
    backbone = config["backbone"] or config["backbone_config"]["model_type"]
    queries = config["two_stage_num_proposals"] if config["two_stage"] else config["num_queries"]
    sections = [
        _front_matter(name, boxes),
        f"# {name}",
        _SUMMARY,
        "## Model description",
        f"The backbone is {backbone_title(backbone)}; a Transformer of width {config['d_model']} with "
        f"{config['encoder_layers']} encoder and {config['decoder_layers']} decoder layers follows, with "
        f"{queries} object queries and {len(config['id2label'])} classes: "
        f"{', '.join(config['id2label'].values())}.",
        FAMILIES["deformable_detr"].description,
        *([texts.MULTI_SCALE] if config["num_feature_levels"] > 1 else []),
        *([texts.BOX_REFINE] if config["with_box_refine"] else []),
        *([texts.TWO_STAGE] if config["two_stage"] else []),
        f"Paper: [{FAMILIES['deformable_detr'].paper.title}]({FAMILIES['deformable_detr'].paper.url}). "
        "Licence of the "
        "weights: Apache 2.0, as detrkit's.",
        "## Intended uses and limits",
        _USES,
        _LIMITS,
        "## How to use",
        how_to_use("deformable_detr", "detection", name, as_transformers=False),
        "## Training",
        _DATA,
        *_procedure(recipe, rows),
        "## Preprocessing",
        f"An image is resized to a shorter side of {processor['size']['shortest_edge']} pixels "
        "(longer side at most "
        f"{processor['size']['longest_edge']}), scaled to [0, 1] and normalised with ImageNet's "
        "mean and deviation.",
        "## Results",
        f"In percent, on the {evaluation['images']} images of the validation split:",
        *_results(boxes),
        _RESULTS_NOTE,
        "## Size and speed",
        table(
            ["", "counted or measured by us"], [row[:2] for row in (*size_rows(facts), *speed_rows(facts))]
        ),
        "## Where it fails",
        bullets(
            [
                *_weakest(boxes["per_class"]),
                _OTHER_IMAGES,
                f"**More objects than queries**: it can report at most {queries} objects of an image.",
                *failures_of_family(_FAMILY),
            ]
        ),
        "## How to cite",
        citation("deformable_detr"),
    ]
    return join_sections(sections)


def _front_matter(name: str, boxes: Mapping[str, Any]) -> str:
    task = PIPELINE_TAGS["detection"]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="bccd",
            dataset_name="BCCD (validation)",
            metric_type="mAP" if number == "AP" else number.lower(),
            metric_name=number,
            metric_value=round(boxes[number], 4),
        )
        for number in STATISTICS
        if boxes[number] >= 0
    ]
    return front_matter(name, task, _FAMILY, license="apache-2.0", datasets=["bccd"], eval_results=results)


def _procedure(recipe: Mapping[str, Any], rows: list[dict[str, str]]) -> Iterable[str]:
    best = max(rows, key=lambda row: float(row["AP"]))
    # The name of a local model would tell nobody anything.
    start = "From random weights" if recipe["from_scratch"] else "From the weights of an earlier run"
    rate = "2e-4" if recipe["learning_rate"] is None else f"{recipe['learning_rate']:g}"  # the family's
    yield (
        f"{start} with `detrkit train`, {recipe['epochs']} epochs of batches of {recipe['batch_size']} "
        f"images: AdamW with a learning rate of {rate}, weight decay {recipe['weight_decay']:g}, gradients "
        f"clipped to a norm of {recipe['clip_norm']:g}, a {recipe['schedule']} schedule, "
        f"`{recipe['augmentation']}` augmentation, and an average of the weights with decay "
        f"{recipe['ema_decay']:g}. The weights are those after epoch {float(best['epoch']):.0f}, the best on "
        "the validation split. All options are in `recipe.json`, the course of the run is in `metrics.csv`."
    )


def _results(boxes: Mapping[str, Any]) -> Iterable[str]:
    rows = [
        ["all", *_numbers(boxes)],
        *([c["name"], *_numbers(c)] for c in boxes["per_class"] if c["objects"]),
    ]
    yield table(["class", *_MAIN], rows)


def _weakest(per_class: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    known = sorted((c for c in per_class if c["AP"] >= 0), key=lambda c: c["AP"])
    if len(known) > 1:
        low, high = percent([100 * known[0]["AP"], 100 * known[-1]["AP"]])
        weakest, best = known[0]["name"], known[-1]["name"]
        yield f"**{weakest}** are the weakest class: their AP is {low}, that of {best} {high}."


def _numbers(stats: Mapping[str, Any]) -> list[str]:
    """In percent; a dash for a size that no object has."""
    return [percent([100 * stats[name]])[0] if stats[name] >= 0 else "-" for name in _MAIN]
