"""The builder of model cards: front matter, sections, snippets and tables of every card are rendered here.

What goes into a card comes from :mod:`~detrkit.hub.card_released` (released and converted checkpoints) and
:mod:`~detrkit.hub.card_trained` (fine-tuned models and those that come with detrkit).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from detrkit.common.schema import JsonObject
from detrkit.common.text import markdown
from detrkit.families import Family, family_of, has_masks
from detrkit.hub import card_texts as texts

_METRIC_TYPES = {"AP": "mAP", "mask AP": "mask-mAP", "PQ": "pq"}


@dataclass(frozen=True, kw_only=True)
class Results:
    """Numbers for the Hub's ``model-index``."""

    numbers: Mapping[str, float]  # name -> value in [0, 1]
    dataset: Mapping[str, str]  # as EvalResult describes it: dataset_type, dataset_name, ...


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model card says. A section without content is left out.

    Sections are sequences of paragraphs, code blocks and tables.

    Attributes:
        model: What the snippets load: a Hub id, a folder or a short name.
        front_matter: More entries of the Hub's ``ModelCardData``.
        results: Measured or published numbers.
        summary: What the model is.
        network: The network, as far as it differs from others of the family.
        variants: Options of the configuration that cards describe.
        uses: What the model is for, and its limits.
        get: How to get the model before it can be used.
        own_settings: Whether detection settings are stored with the model, so that calls name no threshold.
        transformers_calls: Whether to show the calls of Transformers, which do not take short names.
        result_texts: The numbers in tables, and where they come from.
        more_use: What else can be done with the model.
        failures: Where the model fails, one item each.
        impact: What is known of the cost of training and of running the model.
        written_by: Who wrote the card.
    """

    title: str
    model: str
    family: Family
    masks: bool
    front_matter: Mapping[str, Any] = field(default_factory=dict)
    results: Results | None = None
    summary: str
    network: Sequence[str] = ()
    variants: Sequence[str] = ()
    licence: str = ""
    uses: Sequence[str] = texts.OTHER_USES
    get: Sequence[str] = ()
    own_settings: bool = False
    transformers_calls: bool = True
    training: Sequence[str] = ()
    preprocessing: Sequence[str] = ()
    result_texts: Sequence[str] = ()
    size: Sequence[str] = ()
    more_use: Sequence[str] = ()
    failures: Sequence[str] = ()
    impact: Sequence[str] = ()
    written_by: str = ""

    def render(self) -> str:
        """The README.md."""
        paper = self.family.paper
        source = f"Paper: [{paper.title}]({paper.url}), {paper.venue} {paper.year}. {self.licence}"
        sections = {
            "Model description": [
                *self.network,
                self.family.description,
                *self._drawing(),
                *self.variants,
                source,
            ],
            "Intended uses and limits": self.uses,
            "How to use": [*self.get, *self._snippets(), *self.more_use],
            "Training": self.training,
            "Preprocessing": self.preprocessing,
            "Results": self.result_texts,
            "Size and speed": self.size,
            "Where it fails": [bullets(self.failures)] if self.failures else [],
            "Environmental impact": self.impact,
            "How to cite": [_citation(self.family)],
        }
        parts = [self._front_matter(), f"# {markdown(self.title)}", self.summary]
        parts += [self.written_by] if self.written_by else []
        for heading, section in sections.items():
            parts += [f"## {heading}", *section] if section else []
        return "\n\n".join(map(_wrap, parts)) + "\n"

    def _drawing(self) -> list[str]:
        """A drawing of the architecture, on cards of the Hub's models; others may be read offline."""
        family = self.family
        return [f"![Architecture of {family.title}]({family.drawing})"] if self.written_by else []

    def _front_matter(self) -> str:
        task = "image-segmentation" if self.masks else "object-detection"
        results = None
        if self.results is not None:
            results = [
                EvalResult(
                    task_type=task,
                    metric_type=_METRIC_TYPES.get(name, name.lower()),
                    metric_name=name,
                    metric_value=round(value, 4),
                    **self.results.dataset,
                )
                for name, value in self.results.numbers.items()
            ]
        data = ModelCardData(
            model_name=self.title,
            library_name="detrkit",
            pipeline_tag=task,
            tags=[task, "vision", self.family.option_name],
            eval_results=results,
            **self.front_matter,
        )
        return f"---\n{data.to_yaml()}\n---"

    def _snippets(self) -> list[str]:
        family = self.family
        # A sigmoid gives lower scores than a softmax.
        threshold = 0.7 if family.class_scores == "softmax" else 0.5
        own = self.own_settings
        snippets = [
            (_SEGMENT if self.masks else _DETECT).format(
                model=self.model,
                argument="" if own else f", threshold={threshold}",
                option="" if own else f" --threshold {threshold}",
            )
        ]
        if self.transformers_calls:
            snippets.append(
                _TRANSFORMERS.format(
                    model=self.model,
                    model_class=family.segmenter if self.masks else family.detector,
                    processor=family.processor,
                    results=(_SEGMENT_RESULTS if self.masks else _DETECT_RESULTS).format(threshold=threshold),
                )
            )
            if own and not self.masks:
                snippets.append(_OWN_SETTINGS)
        return snippets


def card_with_note(card: str, note: str) -> str:
    """A card with a note before its text, which says how its model differs from the one that it describes.

    Args:
        card: A README.md, with or without front matter.
        note: One paragraph of Markdown.
    """
    front = re.match(r"---\n.*?\n---\n+", card, re.DOTALL)
    start = front.end() if front else 0
    return f"{card[:start]}> {note}\n\n{card[start:]}"


def plain_card(config: JsonObject, name: str) -> str:
    """The card of a model of which nothing is known but its configuration.

    Args:
        config: What ``config.json`` holds.
        name: Name of the model, with or without an organisation.

    Raises:
        CheckpointError: The model is of no family of detrkit.
    """
    title = name.rpartition("/")[2]
    family = family_of(config.get("model_type"), name)
    classes = class_list(config.get("id2label") or {})
    masks = bool(has_masks(config))
    return Card(
        title=title,
        model=name,
        family=family,
        masks=masks,
        summary=f"{family.title} for {classes}. Its training data, training and accuracy are unknown.",
        variants=variant_texts(family, config, masks),
        failures=common_failures(family),
    ).render()


def class_list(id2label: Mapping[int, str] | Mapping[str, str]) -> str:
    """For example "2 classes: cat, dog"; the first 20 names."""
    names = [markdown(str(name)) for name in id2label.values()]
    return f"{len(names)} classes: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"


def variant_texts(family: Family, options: JsonObject, masks: bool) -> list[str]:
    """Paragraphs on the options of a network; a configuration may lack those of other families."""
    levels = options.get("num_feature_levels", 1)
    found = {
        texts.SINGLE_SCALE: family.multi_scale and levels == 1,
        texts.MULTI_SCALE: family.multi_scale and levels > 1,
        texts.BOX_REFINE: options.get("with_box_refine"),
        texts.TWO_STAGE: options.get("two_stage"),
        texts.DC5: options.get("dilation"),
        texts.PANOPTIC: masks,
    }
    return [text for text, present in found.items() if present]


def resize_text(size: Mapping[str, int]) -> str:
    """How an image is resized, given the ``size`` of an image processor."""
    if "shortest_edge" not in size:
        return f"Images are resized to a longer side of {size['longest_edge']} pixels"
    return (
        f"Images are resized to a shorter side of {size['shortest_edge']} pixels (longer side at most "
        f"{size['longest_edge']})"
    )


def common_failures(
    family: Family, queries: int | None = None, class_targets: str | None = None
) -> list[str]:
    """What to know about the scores and boxes of a family, and about the number of its queries."""
    how = "to predict the IoU of the box" if class_targets == "iou" else "with the focal loss"
    scores = (
        "they are a softmax over the classes, and wrong detections can have high scores."
        if family.class_scores == "softmax"
        else f"each class has a sigmoid, trained {how}. For equally good detections, scores are lower than "
        "DETR's, so DETR's thresholds do not apply. One query can give two classes for one box."
    )
    most = (
        f"**Many objects**: the model detects at most {queries} objects in an image, one for each query. In "
        "crowds it misses some objects even if there are fewer."
    )
    return [
        *([most] if queries else []),
        f"**Scores**: {scores}",
        "**Boxes** can extend slightly beyond the border of the image, as in the original.",
    ]


def backbone_title(backbone: str) -> str:
    """For example "ResNet-50" for resnet50."""
    return backbone.replace("resnet", "ResNet-")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers, to the right."""
    rules = [":---", *["---:"] * (len(headings) - 1)]
    cells = ([cell.replace("|", "\\|") for cell in row] for row in (headings, rules, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


_WIDTH = 118
_WHOLE: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def bullets(items: Iterable[str]) -> str:
    """A list in Markdown; white space in an item does not count."""
    items = (" ".join(item.split()) for item in items)
    return "\n".join(textwrap.fill(f"- {item}", _WIDTH, subsequent_indent="  ", **_WHOLE) for item in items)


def _wrap(part: str) -> str:
    """Wraps paragraphs; everything else stays as it is."""
    if part.startswith(("---", "#", "|", "- ")) or "```" in part:
        return part.strip()
    return textwrap.fill(" ".join(part.split()), _WIDTH, **_WHOLE)


def _citation(family: Family) -> str:
    """The paper in BibTeX."""
    paper = family.paper
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


_DETECT = """\
```python
from detrkit import Detector

detector = Detector.from_pretrained("{model}")
detections = detector("photo.jpg"{argument})
for detection in detections:
    print(detection.name, round(detection.score, 3), detection.box)
detections.draw("photo.jpg").save("photo_boxes.jpg")
```

On the command line:

```bash
detrkit detect photo.jpg --model {model}{option} --save-dir out
```

Boxes are the left, top, right and bottom edges in pixels of the photo."""

_SEGMENT = """\
```python
from detrkit import Detector

segmenter = Detector.from_pretrained("{model}")
segmentation = segmenter.segment("photo.jpg")
for segment in segmentation.segments:
    print(segment)
segmentation.draw("photo.jpg").save("photo_segments.jpg")
```

On the command line:

```bash
detrkit segment photo.jpg --model {model} --save-dir out
```"""

_TRANSFORMERS = """\
With the classes of Transformers:

```python
import torch
from PIL import Image

from detrkit import {model_class}, {processor}

image = Image.open("photo.jpg").convert("RGB")
name = "{model}"
processor = {processor}.from_pretrained(name)
model = {model_class}.from_pretrained(name)
with torch.inference_mode():
    outputs = model(**processor(images=image, return_tensors="pt"))
{results}"""

_OWN_SETTINGS = (
    "This code does not use the model's threshold and overlap filter in `detection_config.json`; `Detector` "
    "and the commands do."
)

_DETECT_RESULTS = """\
sizes = torch.tensor([image.size[::-1]])
results = processor.post_process_object_detection(outputs, threshold={threshold}, target_sizes=sizes)[0]
```"""

_SEGMENT_RESULTS = """\
sizes = [image.size[::-1]]
result = processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes)[0]
```

`result["segmentation"]` contains the segment id of each pixel, and `result["segments_info"]` describes the
segments."""
