"""The card of a released checkpoint, and of a checkpoint that was converted as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from detrkit.checkpoints.registry import ReleasedCheckpoint
from detrkit.common.text import code, percent
from detrkit.families import FAMILIES
from detrkit.hub.card_facts import Facts
from detrkit.hub.card_texts import BENCHMARKS
from detrkit.hub.cards import (
    Card,
    Results,
    backbone_title,
    common_failures,
    resize_text,
    table,
    variant_texts,
)

if TYPE_CHECKING:
    from detrkit.conversion.original import Architecture

# The examples of the cards on the Hub.
_SAMPLES = "https://huggingface.co/datasets/mishig/sample_images/resolve/main"
_WIDGET = [
    {"src": f"{_SAMPLES}/{file}.jpg", "example_title": title}
    for file, title in (
        ("savanna", "Savanna"),
        ("football-match", "Football match"),
        ("airport", "Airport"),
    )
]

_WRITTEN_BY = (
    "The authors of the model did not write a model card. The authors of detrkit wrote this one, based on "
    "the paper, the original repository and their own measurements."
)

_LICENCES = {"apache-2.0": "Apache 2.0", "mit": "MIT"}

# The detections that the cards on the Hub give for COCO image 39769: threshold, then name, score and box.
_KNOWN_IMAGE = "http://images.cocodataset.org/val2017/000000039769.jpg"
_KNOWN_OUTPUTS = {
    "detr-resnet-101": (
        0.9,
        (
            ("cat", 0.998, (344.06, 24.85, 640.34, 373.74)),
            ("remote", 0.997, (328.13, 75.93, 372.81, 187.66)),
            ("remote", 0.997, (39.34, 70.13, 175.56, 118.78)),
            ("cat", 0.998, (15.36, 51.75, 316.89, 471.16)),
            ("couch", 0.995, (-0.19, 0.71, 639.73, 474.17)),
        ),
    ),
    "conditional-detr-resnet-50": (
        0.7,
        (
            ("remote", 0.833, (38.31, 72.1, 177.63, 118.45)),
            ("cat", 0.831, (9.2, 51.38, 321.13, 469.0)),
            ("cat", 0.804, (340.3, 16.85, 642.93, 370.95)),
        ),
    ),
}


def released_card(entry: ReleasedCheckpoint, facts: Facts) -> str:
    """The card of a released checkpoint."""
    get = [] if entry.hub_id else _conversion(entry)
    source = f"[this file]({entry.url})"
    return _released(entry, facts, entry.name, entry.hub_id or entry.name, source, get).render()


def converted_card(
    entry: ReleasedCheckpoint,
    facts: Facts,
    title: str,
    file: str,
    architecture: Architecture,
    *,
    released: bool,
) -> str:
    """The card of a checkpoint that was converted as the released one in ``entry``.

    Args:
        entry: The released checkpoint.
        facts: What was counted and measured of the converted one.
        title: Name of the model, usually of its folder.
        file: Name of the original checkpoint's file.
        architecture: What the tensors of that file say.
        released: Whether they can be the released ones. If not, the card claims neither published numbers
            nor training data for them.
    """
    if released:
        held = f"They apply here only if {code(file)} is that file."
        return _released(entry, facts, title, title, code(file), held=held).render()
    family = FAMILIES[entry.family]
    masks = entry.task == "panoptic"
    return Card(
        title=title,
        model=title,
        family=family,
        masks=masks,
        summary=_summary(entry, code(file), architecture),
        variants=variant_texts(family, vars(entry), masks),
        training=["The data and the training of this checkpoint are unknown."],
        preprocessing=[_preprocessing("Images are resized to the size in `preprocessor_config.json`")],
        result_texts=[
            "None. This is not a released checkpoint: the number or the sizes of its tensors differ."
        ],
        size=[table(["", "counted by us"], [row[:2] for row in facts.size_rows()])],
        failures=_failures(entry, architecture.num_queries or entry.num_queries, published=False),
    ).render()


def _released(
    entry: ReleasedCheckpoint,
    facts: Facts,
    title: str,
    model: str,
    source: str,
    get: Iterable[str] = (),
    held: str = "",
) -> Card:
    """What the cards of a release say, be it on the Hub or converted.

    ``source`` is the original file, ``held`` says under which condition the published numbers hold.
    """
    family, benchmark = FAMILIES[entry.family], BENCHMARKS[entry.benchmark]
    masks = entry.task == "panoptic"
    numbers = _published(entry)
    size = family.load(family.processor)().size
    if entry.longest_edge is not None:
        size = {"longest_edge": entry.longest_edge}
    as_family = family.published_mask_training if masks else family.published_training
    return Card(
        title=title,
        model=model,
        family=family,
        masks=masks,
        front_matter={
            "license": family.licence,
            "datasets": [benchmark.dataset],
            **({"widget": _WIDGET} if benchmark.dataset == "coco" else {}),
        },
        results=None
        if not numbers
        else Results(
            numbers={name: value / 100 for name, value in numbers.items()},
            dataset={
                "dataset_type": benchmark.dataset,
                "dataset_name": benchmark.title,
                "dataset_split": benchmark.split,
                "source_name": "the authors' README",
                "source_url": family.repository,
            },
        ),
        summary=_summary(entry, source),
        variants=variant_texts(family, vars(entry), masks),
        licence=f"Licence: {_LICENCES[family.licence]}.",
        uses=benchmark.uses,
        get=list(get),
        more_use=_more_use(entry),
        training=[
            benchmark.data,
            *([entry.training] if entry.training else [as_family, benchmark.augmentation]),
            entry.training_cost or "The hardware and the duration of the training were not published.",
        ],
        impact=_impact(entry),
        written_by=_WRITTEN_BY,
        preprocessing=[_preprocessing(resize_text(size))],
        result_texts=[*_results(entry, numbers, held), *_reproduction(entry, model)],
        size=list(_size_and_speed(entry, facts)),
        failures=_failures(entry, entry.num_queries, published=True),
    )


def _more_use(entry: ReleasedCheckpoint) -> list[str]:
    model = entry.hub_id or entry.name
    more = [
        "To see what the model attends to in an image:",
        f"```bash\ndetrkit explain photo.jpg --model {model} --save-dir out\n```",
    ]
    if entry.family == "detr" and entry.hub_id:
        more.append(
            'If the repository on the Hub has a branch `no_timm`, `revision="no_timm"` loads the same '
            "weights with Transformers' own backbone, which does not need timm."
        )
    return more


def _impact(entry: ReleasedCheckpoint) -> list[str]:
    published = (
        "The section *Training* contains the published training cost. Carbon emissions, energy, region and "
        "cloud provider were not published."
        if entry.training_cost
        else "Training cost, carbon emissions, energy, region and cloud provider were not published."
    )
    return [
        f"{published} The section *Size and speed* contains the cost of running the model. Fine-tuning costs "
        "far less than training from scratch."
    ]


def _summary(entry: ReleasedCheckpoint, source: str, architecture: Architecture | None = None) -> str:
    family = FAMILIES[entry.family]
    labels = architecture.num_labels if architecture else entry.num_labels
    queries = (architecture.num_queries if architecture else None) or entry.num_queries
    backbone = f"{backbone_title(entry.backbone)}{' (DC5)' if entry.dilation else ''}"
    return (
        f"{family.title} with a {backbone} backbone, {labels} categories and {queries} object queries. The "
        f"weights are those of {source}, a checkpoint of the [original implementation]({family.repository}). "
        "Only their names and the file format were changed, not their values."
    )


def _conversion(entry: ReleasedCheckpoint) -> list[str]:
    file = entry.url.rsplit("/", 1)[-1]
    return [
        f"This checkpoint is not on the Hub. Download [the authors' file]({entry.url}) and convert it:",
        f"```bash\ndetrkit convert {file} {entry.name} --model {entry.name}\n```",
    ]


def _preprocessing(resized: str) -> str:
    return (
        f"{resized}, scaled to [0, 1] and normalised with ImageNet's mean (0.485, 0.456, 0.406) and standard "
        "deviation (0.229, 0.224, 0.225) of red, green and blue. Images of a batch are padded on the right "
        "and at the bottom; a mask marks the padding."
    )


def _published(entry: ReleasedCheckpoint) -> dict[str, float]:
    numbers = {
        "AP": entry.ap,
        "AP50": entry.ap50,
        "AP75": entry.ap75,
        "APsmall": entry.ap_small,
        "APmedium": entry.ap_medium,
        "APlarge": entry.ap_large,
        "mask AP": entry.mask_ap,
        "PQ": entry.pq,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _results(entry: ReleasedCheckpoint, numbers: dict[str, float], held: str) -> Iterable[str]:
    if not numbers:
        yield "The authors' README gives no AP for this checkpoint."
        return
    yield f"In percent, on {BENCHMARKS[entry.benchmark].images}:"
    headings = [f"box {name}" if name.startswith("AP") else name for name in numbers]
    yield table(headings, [[percent(value / 100) for value in numbers.values()]])
    sizes = (
        "COCO calls an object small below 32x32 pixels and large above 96x96."
        if entry.ap_small is not None
        else "Numbers by size of object were not published."
    )
    yield (
        f"{sizes} These are published numbers; detrkit did not measure them again. {_sources(entry)} {held} "
        "detrkit's tests compare the model with the original implementation on the same weights."
    )


def _sources(entry: ReleasedCheckpoint) -> str:
    """Which number comes from where."""
    family = FAMILIES[entry.family]
    readme = f"[README of the original repository]({family.repository})"
    if not entry.paper_numbers:
        return f"They are from the {readme}, for [{entry.name}]({entry.url})."
    return (
        f"The AP is from the {readme}, for [{entry.name}]({entry.url}). AP50, AP75 and the AP by size are "
        f"from {entry.paper_numbers} of the [paper]({family.paper.url})."
    )


def _reproduction(entry: ReleasedCheckpoint, model: str) -> Iterable[str]:
    yield "To measure them:"
    options = BENCHMARKS[entry.benchmark].options
    if FAMILIES[entry.family].class_scores == "sigmoid":
        options += " --max-objects 100"  # as many pairs of query and class as the originals evaluate
    yield f"```bash\ndetrkit evaluate --model {model} {options}\n```"
    if entry.name in _KNOWN_OUTPUTS:
        threshold, found = _KNOWN_OUTPUTS[entry.name]
        yield (
            f"For a quick check: the card on the Hub lists these detections above {threshold} in [this image "
            f"of COCO]({_KNOWN_IMAGE}) (640x480)."
        )
        yield table(
            ["class", "score", "left", "top", "right", "bottom"],
            [[name, f"{score:.3f}", *(f"{edge:.2f}" for edge in box)] for name, score, box in found],
        )


def _size_and_speed(entry: ReleasedCheckpoint, facts: Facts) -> Iterable[str]:
    parameters = "" if entry.params is None else f"{entry.params:g} M"
    cost = "" if entry.gflops is None else f"{entry.gflops:g} G"
    rows = facts.size_rows(parameters, cost)
    rows += [["speed on a V100", "", entry.speed]] if entry.speed else []
    rows += facts.speed_rows()
    columns = 3 if parameters or cost or entry.speed else 2
    headings = ["", "counted or measured by us", "published"]
    if rows:
        yield table(headings[:columns], [row[:columns] for row in rows])
    if entry.task == "panoptic":
        yield "The multiply-adds include a mask for every query; `segment` computes fewer masks."
    if cost:
        yield (
            "The published cost is a mean over COCO's images, which differ in size; the counted cost is for "
            "one size."
        )


def _failures(entry: ReleasedCheckpoint, queries: int, *, published: bool) -> list[str]:
    small = (
        f"**Small objects**: the AP is {entry.ap_small} for small and {entry.ap_large} for large objects."
        if published and entry.ap_small is not None
        else "**Small objects** are missed more often than large ones."
    )
    padding = (
        "DC5 models of DETR lose about 10 AP if images of different sizes are padded into a batch of two; "
        "for other families the loss is unknown. Use a batch size of 1, or batch only images of the same "
        "size, as `Detector` does."
        if entry.dilation
        else "the scores of an image change slightly if it is padded in a batch with larger images. "
        "`Detector` batches only images of the same size."
    )
    coarse = (
        "**Thin and tiny segments**: masks are predicted at a quarter of the image's resolution and "
        "enlarged, so the masks of wires and poles, and all borders, are coarse."
    )
    return [
        f"{small} For very large images, use `--tiles`.",
        *common_failures(FAMILIES[entry.family], queries),
        f"**Padding**: {padding}",
        *([coarse] if entry.task == "panoptic" else []),
    ]
