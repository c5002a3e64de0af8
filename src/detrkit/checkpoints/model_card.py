"""The model card (README.md) of a converted checkpoint."""

from __future__ import annotations

from detrkit.checkpoints.original import Architecture
from detrkit.checkpoints.registry import FAMILY_TITLES, ReleasedCheckpoint

_PIPELINE_TAGS = {"detection": "object-detection", "panoptic": "image-segmentation"}

_TEMPLATE = """\
---
library_name: detrkit
license: apache-2.0
pipeline_tag: {pipeline_tag}
tags:
- {pipeline_tag}
- vision
- {family}
---

# {title}

{family_title} with a {backbone} backbone, {num_labels} categories and {num_queries} object queries. The \
weights are those of `{source}`, a checkpoint of the [original implementation]({repository}); detrkit \
changed their names and their file format, not their values.

## How to use

```python
from detrkit import Detector

detector = Detector.from_pretrained("{title}")  # the folder this card lies in
detections = detector("photo.jpg")
```

or `detrkit detect photo.jpg --model {title}`.

## Published results

{results}
"""


def model_card(entry: ReleasedCheckpoint, architecture: Architecture, *, title: str, source: str) -> str:
    """The card's text: front matter for the Hub, then what the model is and how to use it.

    Args:
        entry: The released checkpoint that the weights were converted as.
        architecture: What the tensors say; decides whether published numbers may stand on the card.
        title: Name of the model, usually of its folder.
        source: File name of the original checkpoint.
    """
    return _TEMPLATE.format(
        pipeline_tag=_PIPELINE_TAGS[entry.task],
        family=entry.family.replace("_", "-"),
        title=title,
        family_title=FAMILY_TITLES[entry.family],
        backbone=backbone_title(architecture.backbone) + (" (DC5)" if entry.dilation else ""),
        num_labels=architecture.num_labels,
        num_queries=architecture.num_queries or entry.num_queries,
        source=source,
        repository=entry.repository,
        results=_results(entry) if _looks_released(entry, architecture) else _NO_RESULTS,
    )


_NO_RESULTS = (
    "None: the tensors differ in number or size from every released checkpoint of this architecture."
)


def _results(entry: ReleasedCheckpoint) -> str:
    numbers = {
        "box AP": entry.ap,
        "small objects": entry.ap_small,
        "medium": entry.ap_medium,
        "large": entry.ap_large,
        "mask AP": entry.mask_ap,
        "PQ": entry.pq,
    }
    listed = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items() if value is not None)
    return (
        f"{listed} on COCO val2017. These numbers are published, not re-measured: the authors give them for "
        f"[{entry.name}]({entry.url}), and they hold here only if that is the file which was converted."
    )


def _looks_released(entry: ReleasedCheckpoint, architecture: Architecture) -> bool:
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
