"""Model cards: the README.md of a released checkpoint, of one that was converted, and of the bundled model.

Words are in ``card_texts``, published numbers in the registry, counted and measured ones in
``card_facts.json``, which ``model_cards/generate.py`` writes.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from detrkit.checkpoints.registry import ReleasedCheckpoint, Task
from detrkit.families import FAMILIES
from detrkit.hub import card_texts as texts

if TYPE_CHECKING:
    from detrkit.checkpoints.cost import Cost
    from detrkit.conversion.original import Architecture

FACTS_FILE = Path(__file__).with_name("card_facts.json")
PIPELINE_TAGS = {"detection": "object-detection", "panoptic": "image-segmentation"}

# Seconds or images a second on a V100, as the authors' READMEs have them.
_PUBLISHED_SPEEDS = {
    "detr-resnet-50": "0.036 s an image",
    "detr-resnet-50-dc5": "0.083 s an image",
    "detr-resnet-101": "0.050 s an image",
    "detr-resnet-101-dc5": "0.097 s an image",
    "deformable-detr-single-scale": "27.0 images a second",
    "deformable-detr-single-scale-dc5": "22.1 images a second",
    "deformable-detr": "15.0 images a second",
    "deformable-detr-with-box-refine": "15.0 images a second",
    "deformable-detr-with-box-refine-two-stage": "14.5 images a second",
}

# AP50 and AP75, which the authors give for one checkpoint only.
_PUBLISHED_THRESHOLDS = {"detr-resnet-50": {"AP50": 62.3, "AP75": 44.3}}

# What the cards on the Hub find in COCO image 39769: threshold, then name, score and box of each object.
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

_METRIC_TYPES = {"AP": "mAP", "mask AP": "mask-mAP", "PQ": "pq"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A measured speed.

    Attributes:
        engine: What ran the model: "torch", "onnx", ...
        stage: "forward" for the model alone, "end to end" from picture to boxes.
        device: Processor and number of threads, in words.
        size: Size of the image, such as "800x1066".
        seconds: Time for one image.
    """

    engine: str
    stage: str
    device: str
    size: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was counted and measured of a model.

    Attributes:
        cost: What was counted; None where it was not.
        speeds: What was measured; nothing where it was not.
    """

    cost: Cost | None = None
    speeds: tuple[Speed, ...] = ()


def read_facts(name: str) -> Facts:
    """The facts of a model that has a card, by its short name; empty for any other."""
    from detrkit.checkpoints.cost import Cost

    entry = json.loads(FACTS_FILE.read_text(encoding="utf-8")).get(name, {})
    return Facts(
        cost=Cost(**entry["cost"]) if "cost" in entry else None,
        speeds=tuple(Speed(**speed) for speed in entry.get("speeds", ())),
    )


def released_card(
    entry: ReleasedCheckpoint,
    facts: Facts,
    *,
    title: str | None = None,
    source: str | None = None,
    architecture: Architecture | None = None,
) -> str:
    """The card of a released checkpoint, or of a checkpoint that was converted as one.

    Args:
        entry: The released checkpoint.
        facts: What was counted and measured of it.
        title: Name of the model, usually of its folder; by default the checkpoint's short name.
        source: File name of the original checkpoint, where it was converted from one.
        architecture: What the tensors of that file say. Where they cannot be the released ones, the card
            claims neither published numbers nor training data for them.
    """
    released = architecture is None or looks_released(entry, architecture)
    model = title or entry.hub_id or entry.name
    sections = [
        _front_matter(entry, title or entry.name, released),
        f"# {title or entry.name}",
        _summary(entry, architecture, source),
        "## Model description",
        _description(entry, released),
        "## Intended uses and limits",
        *(
            (texts.COCO_USES[entry.task], texts.COCO_LIMITS)
            if released
            else (texts.OTHER_USES, texts.OTHER_LIMITS)
        ),
        "## How to use",
        *([] if source or entry.hub_id else [_how_to_get(entry)]),
        how_to_use(entry.family, entry.task, model),
        "## Training",
        *(_training(entry) if released else [_UNKNOWN_TRAINING]),
        "## Preprocessing",
        _preprocessing(released),
        "## Results",
        *(_results(entry, model, source) if released else [_NO_RESULTS]),
        "## Size and speed",
        *_size_and_speed(entry if released else None, facts, masks=entry.task == "panoptic"),
        "## Where it fails",
        _failures(entry, architecture, released),
        "## How to cite",
        citation(entry.family),
    ]
    return join_sections(sections)


def join_sections(sections: Iterable[str]) -> str:
    """The text of a card; paragraphs are wrapped, everything else stays as it is."""
    return "\n\n".join(_wrap(section.strip()) for section in sections) + "\n"


def _wrap(section: str) -> str:
    if section.startswith(("---", "#", "|", "- ", "```")) or "```" in section:
        return section
    return "\n\n".join(_paragraph(part) for part in section.split("\n\n"))


def plain_card(config: Mapping[str, Any], title: str) -> str:
    """The card of a model of which nothing is known but its configuration.

    Args:
        config: What ``config.json`` holds.
        title: Name of the model.
    """
    family: str = config["model_type"]
    task: Task = "panoptic" if "Segmentation" in (config.get("architectures") or [""])[0] else "detection"
    names = list((config.get("id2label") or {}).values())
    classes = f"{len(names)} classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
    return join_sections(
        [
            front_matter(title, PIPELINE_TAGS[task], family),
            f"# {title}",
            f"{FAMILIES[family].title} for {classes}. Its data, training and accuracy are not known here.",
            "## Model description",
            FAMILIES[family].description,
            "## Intended uses and limits",
            texts.OTHER_USES,
            texts.OTHER_LIMITS,
            "## How to use",
            how_to_use(family, task, title),
            "## How to cite",
            citation(family),
        ]
    )


def _front_matter(entry: ReleasedCheckpoint, title: str, released: bool) -> str:
    task = PIPELINE_TAGS[entry.task]
    results = [
        EvalResult(
            task_type=task,
            dataset_type="coco",
            dataset_name="COCO 2017 (val)",
            dataset_split="validation",
            metric_type=_METRIC_TYPES.get(name, name.lower()),
            metric_name=name,
            metric_value=round(value / 100, 3),
            source_name="the authors' README",
            source_url=entry.repository,
        )
        for name, value in _published(entry).items()
    ]
    if not released:  # whoever trained it decides on its licence
        return front_matter(title, task, entry.family)
    return front_matter(
        title, task, entry.family, license="apache-2.0", datasets=["coco"], eval_results=results
    )


def front_matter(title: str, task: str, family: str, **entries: Any) -> str:
    """The YAML block that the Hub reads.

    Args:
        title: Name of the model.
        task: The Hub's name of the task.
        family: ``model_type`` of the configuration.
        **entries: Further entries of ``ModelCardData``; None for one that is not known.
    """
    data = ModelCardData(
        model_name=title,
        library_name="detrkit",
        pipeline_tag=task,
        tags=[task, "vision", family.replace("_", "-")],
        **entries,
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(entry: ReleasedCheckpoint, architecture: Architecture | None, source: str | None) -> str:
    backbone = backbone_title(architecture.backbone if architecture else entry.backbone)
    labels = architecture.num_labels if architecture else entry.num_labels
    queries = _queries(entry, architecture)
    of_file = f"`{source}`" if source else f"[this file]({entry.url})"
    return (
        f"{FAMILIES[entry.family].title} with a {backbone}{' (DC5)' if entry.dilation else ''} "
        f"backbone, {labels} "
        f"categories and {queries} object queries. The weights are those of {of_file}, a checkpoint of the "
        f"[original implementation]({entry.repository}); detrkit changed their names and their file "
        "format, not "
        "their values."
    )


def _description(entry: ReleasedCheckpoint, released: bool) -> str:
    paper = FAMILIES[entry.family].paper
    licence = " Licence: Apache 2.0." if released else ""
    parts = [FAMILIES[entry.family].description]
    if FAMILIES[entry.family].multi_scale:
        parts.append(texts.SINGLE_SCALE if entry.num_feature_levels == 1 else texts.MULTI_SCALE)
    parts += [texts.BOX_REFINE] if entry.with_box_refine else []
    parts += [texts.TWO_STAGE] if entry.two_stage else []
    parts += [texts.DC5] if entry.dilation else []
    parts += [texts.PANOPTIC] if entry.task == "panoptic" else []
    parts.append(f"Paper: [{paper.title}]({paper.url}), {paper.venue} {paper.year}.{licence}")
    return "\n\n".join(parts)


def _how_to_get(entry: ReleasedCheckpoint) -> str:
    file = entry.url.rsplit("/", 1)[-1]
    return (
        f"This checkpoint is not on the Hub. Download [the authors' file]({entry.url}) and convert it:\n\n"
        f"```bash\ndetrkit convert {file} {entry.name} --model {entry.name}\n```"
    )


_DETECT = """\
```python
from detrkit import Detector

detector = Detector.from_pretrained("{model}")
detections = detector("photo.jpg", threshold={threshold})
for detection in detections:
    print(detection.name, round(detection.score, 3), detection.box)
detections.draw("photo.jpg").save("photo_boxes.jpg")
```

or on the command line

```bash
detrkit detect photo.jpg --model {model} --threshold {threshold} --save-dir out
```

Boxes are left, top, right and bottom edge in pixels of the photo."""

_DETECT_AS_TRANSFORMERS = """\
Or with the calls of Transformers:

```python
import torch
from PIL import Image

from detrkit import {prefix}ForObjectDetection, {prefix}ImageProcessor

image = Image.open("photo.jpg").convert("RGB")
name = "{model}"
processor = {prefix}ImageProcessor.from_pretrained(name)
model = {prefix}ForObjectDetection.from_pretrained(name)
with torch.inference_mode():
    outputs = model(**processor(images=image, return_tensors="pt"))
sizes = torch.tensor([image.size[::-1]])
results = processor.post_process_object_detection(outputs, threshold={threshold}, target_sizes=sizes)[0]
```"""

_SEGMENT = """\
```python
from detrkit import Detector

segmenter = Detector.from_pretrained("{model}")
segmentation = segmenter.segment("photo.jpg")
for segment in segmentation.segments:
    print(segment)
segmentation.draw("photo.jpg").save("photo_segments.jpg")
```

or on the command line

```bash
detrkit segment photo.jpg --model {model} --save-dir out
```"""

_SEGMENT_AS_TRANSFORMERS = """\
Or with the calls of Transformers:

```python
import torch
from PIL import Image

from detrkit import DetrForSegmentation, DetrImageProcessor

image = Image.open("photo.jpg").convert("RGB")
processor = DetrImageProcessor.from_pretrained("{model}")
model = DetrForSegmentation.from_pretrained("{model}")
with torch.inference_mode():
    outputs = model(**processor(images=image, return_tensors="pt"))
sizes = [image.size[::-1]]
result = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0]
```

`result["segmentation"]` has the id of each pixel's segment, `result["segments_info"]` tells the segments."""


_SNIPPETS: dict[Task, tuple[str, str]] = {
    "detection": (_DETECT, _DETECT_AS_TRANSFORMERS),
    "panoptic": (_SEGMENT, _SEGMENT_AS_TRANSFORMERS),
}


def how_to_use(family: str, task: Task, model: str, *, as_transformers: bool = True) -> str:
    """The snippets of a card.

    Args:
        family: ``model_type`` of the configuration.
        task: "detection" or "panoptic".
        model: What the snippets load: a Hub id, a folder or a short name.
        as_transformers: Whether to show the calls of Transformers too, which take no short names.
    """
    snippets = _SNIPPETS[task] if as_transformers else _SNIPPETS[task][:1]
    # A sigmoid gives lower scores than a softmax.
    threshold = 0.7 if FAMILIES[family].class_scores == "softmax" else 0.5
    prefix = FAMILIES[family].class_prefix
    return "\n\n".join(snippets).format(model=model, prefix=prefix, threshold=threshold)


_UNKNOWN_TRAINING = "Nothing is known here of the data and the training of this checkpoint."


def _training(entry: ReleasedCheckpoint) -> list[str]:
    panoptic = entry.task == "panoptic"
    return [
        texts.COCO_PANOPTIC if panoptic else texts.COCO_DETECTION,
        texts.PANOPTIC_TRAINING if panoptic else FAMILIES[entry.family].published_training,
        texts.AUGMENTATION,
    ]


def _preprocessing(released: bool) -> str:
    size = (
        "An image is resized to a shorter side of 800 pixels, or less where the longer side would exceed 1333"
        if released
        else "An image is resized as `preprocessor_config.json` says"
    )
    return (
        f"{size}, scaled to [0, 1] and normalised with ImageNet's mean (0.485, 0.456, 0.406) and "
        "deviation (0.229, "
        "0.224, 0.225) of red, green and blue. Images of a batch are padded on the right and at the "
        "bottom, and a mask "
        "tells the model which pixels are padding."
    )


_NO_RESULTS = (
    "None: the tensors differ in number or size from every released checkpoint of this architecture."
)


def _published(entry: ReleasedCheckpoint) -> dict[str, float]:
    numbers = {
        "AP": entry.ap,
        **_PUBLISHED_THRESHOLDS.get(entry.name, {}),
        "APsmall": entry.ap_small,
        "APmedium": entry.ap_medium,
        "APlarge": entry.ap_large,
        "mask AP": entry.mask_ap,
        "PQ": entry.pq,
    }
    return {name: value for name, value in numbers.items() if value is not None}


def _results(entry: ReleasedCheckpoint, model: str, source: str | None) -> Iterable[str]:
    numbers = _published(entry)
    yield "In percent, on the 5,000 images of COCO's 2017 validation split:"
    yield table(
        [f"box {name}" if name.startswith("AP") else name for name in numbers], [percent(numbers.values())]
    )
    sizes = (
        "COCO calls an object small below 32x32 pixels and large above 96x96. "
        if entry.ap_small is not None
        else "Numbers by size of object were not published. "
    )
    held = "" if source is None else f" They hold here only if `{source}` is that file."
    yield (
        f"{sizes}These numbers are published, not re-measured: the authors give them for "
        f"[{entry.name}]({entry.url})."
        f"{held} detrkit's tests compare the model with the original implementation on equal weights."
    )
    masks = " --panoptic-dir panoptic_val2017" if entry.task == "panoptic" else ""
    annotations = "panoptic_val2017.json" if entry.task == "panoptic" else "instances_val2017.json"
    yield "To measure them:"
    data = f"--images val2017 --annotations {annotations}{masks}"
    yield f"```bash\ndetrkit evaluate --model {model} {data}\n```"
    known = _KNOWN_OUTPUTS.get(entry.name)
    if known is not None:
        threshold, found = known
        yield (
            f"For a quick check: in [this image of COCO]({_KNOWN_IMAGE}), 640x480, the card on the "
            "Hub tells these "
            f"detections above {threshold}."
        )
        yield table(
            ["class", "score", "left", "top", "right", "bottom"],
            [[name, f"{score:.3f}", *(f"{edge:.2f}" for edge in box)] for name, score, box in found],
        )


def _size_and_speed(entry: ReleasedCheckpoint | None, facts: Facts, masks: bool) -> Iterable[str]:
    published = {"parameters": "", "cost": "", "speed": ""}
    if entry is not None:
        published = {
            "parameters": "" if entry.params is None else f"{entry.params:g} M",
            "cost": "" if entry.gflops is None else f"{entry.gflops:g} G",
            "speed": _PUBLISHED_SPEEDS.get(entry.name, ""),
        }
    rows = size_rows(facts, published["parameters"], published["cost"])
    if published["speed"]:
        rows.append(["speed on a V100", "", published["speed"]])
    rows += speed_rows(facts)
    headings = ["", "counted or measured by us", "published"]
    if not any(published.values()):
        headings, rows = headings[:2], [row[:2] for row in rows]
    yield table(headings, rows)
    if masks:
        yield "The multiply-adds include a mask for every query; `segment` makes only those that it needs."
    if published["cost"]:
        yield "The published cost is a mean over COCO's images, which differ in size; ours is for one size."


def size_rows(facts: Facts, published_parameters: str = "", published_cost: str = "") -> list[list[str]]:
    """Rows of a table: parameters, multiply-adds, bytes; what was counted, then what was published."""
    cost = facts.cost
    if cost is None:
        return []
    size = f"{cost.height}x{cost.width}"
    rows = [
        ["parameters", f"{cost.parameters / 1e6:.1f} M", published_parameters],
        [f"multiply-adds (MAC), {size}", f"{cost.macs / 1e9:.1f} G", published_cost],
    ]
    if cost.sampling_macs:
        rows.append(["and of the samples of deformable attention", f"{cost.sampling_macs / 1e9:.2f} G", ""])
    return [*rows, ["model.safetensors, float32", f"{cost.bytes / 1e6:.0f} MB", ""]]


def speed_rows(facts: Facts) -> list[list[str]]:
    """Rows of a table: one for each measured speed."""
    return [
        [
            f"{speed.engine}, {speed.stage}, {speed.size}, {speed.device}",
            f"{speed.seconds:.3g} s an image",
            "",
        ]
        for speed in facts.speeds
    ]


def _failures(entry: ReleasedCheckpoint, architecture: Architecture | None, released: bool) -> str:
    items = []
    if released and entry.ap_small is not None:
        items.append(
            f"**Small objects**: its AP is {entry.ap_small} for them and {entry.ap_large} for large "
            "ones. Cut very "
            "large images into parts."
        )
    else:
        items.append(
            "**Small objects** are found less often than large ones. Cut very large images into parts."
        )
    queries = _queries(entry, architecture)
    items.append(
        f"**More objects than queries**: it can report at most {queries} objects of an image, and "
        "in crowds it misses "
        "some long before that."
    )
    items += failures_of_family(entry.family)
    items.append(f"**Padding**: {_padding(entry)}")
    if entry.task == "panoptic":
        items.append(
            "**Thin and tiny segments**: masks are made at a quarter of the image's resolution and "
            "enlarged; wires, "
            "poles and borders come out coarse."
        )
    return bullets(items)


def _padding(entry: ReleasedCheckpoint) -> str:
    if not entry.dilation:
        return (
            "images that are padded into a batch with larger ones give slightly other scores than "
            "alone. `Detector` "
            "batches only images of one shape."
        )
    loss = (
        "DC5 models of DETR lose about 10 AP when images of different shapes are padded into a batch of two. "
    )
    other = "" if entry.family == "detr" else "What this model loses is not known. "
    return f"{loss}{other}Use batches of one image, or of images of one shape, which `Detector` sees to."


def failures_of_family(family: str) -> list[str]:
    """What users of a family should know of its scores and boxes."""
    scores = (
        "**Scores**: a softmax over the classes; wrong detections can be confident."
        if FAMILIES[family].class_scores == "softmax"
        else "**Scores**: a sigmoid for each class, trained with the focal loss. They are lower "
        "than DETR's for equally "
        "good detections, so thresholds do not carry over; one query can give two classes for one box."
    )
    return [
        scores,
        "**Boxes** may reach a little over the border of the image, as in the original.",
    ]


def _queries(entry: ReleasedCheckpoint, architecture: Architecture | None) -> int:
    return (architecture.num_queries if architecture else None) or entry.num_queries


def citation(family: str) -> str:
    """The paper in BibTeX."""
    paper = FAMILIES[family].paper
    return textwrap.dedent(
        f"""\
        ```bibtex
        @inproceedings{{{paper.key},
          title = {{{paper.title}}},
          author = {{{paper.authors}}},
          booktitle = {{{paper.venue}}},
          year = {{{paper.year}}},
          url = {{{paper.url}}},
        }}
        ```"""
    )


def looks_released(entry: ReleasedCheckpoint, architecture: Architecture) -> bool:
    """Whether the tensors could be the released ones; all releases have 6 + 6 layers of 256 channels."""
    return (
        architecture.num_labels == entry.num_labels
        and architecture.num_queries in (entry.num_queries, None)
        and architecture.position_embedding_type == "sine"
        and (architecture.d_model, architecture.encoder_layers, architecture.decoder_layers) == (256, 6, 6)
    )


def backbone_title(backbone: str) -> str:
    """For example "ResNet-50" for resnet50."""
    return backbone.replace("resnet", "ResNet-")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers, to the right."""
    rules = [":---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, rules, *rows))


def percent(values: Iterable[float]) -> list[str]:
    """Numbers of percent, with one decimal."""
    return [f"{value:.1f}" for value in values]


def bullets(items: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(textwrap.fill(f"- {item}", _WIDTH, subsequent_indent="  ", **_WHOLE) for item in items)


_WIDTH = 118
_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def _paragraph(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, **_WHOLE)
