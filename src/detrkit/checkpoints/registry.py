"""The released checkpoints of the DETR family: names, files, published numbers, architecture.

Numbers are those of the original repositories' READMEs and, where ``paper_numbers`` is set, of the papers; on
COCO val2017 where ``benchmark`` is COCO's. The models that come with this package and need no download are
listed here too. This module does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from detrkit.common.errors import CheckpointError
from detrkit.common.files import PRETRAINED
from detrkit.common.text import did_you_mean

Task = Literal["detection", "panoptic"]

# One component of "org/name" as the Hub spells it.
_HUB_NAME = r"[A-Za-z0-9][\w.\-]*"


@dataclass(frozen=True, kw_only=True)
class ReleasedCheckpoint:
    """One checkpoint that the authors of a paper released.

    Attributes:
        name: Short name, which the command line and the converter take.
        hub_id: Repository on the Hugging Face Hub; None if the checkpoint was never uploaded.
        family: ``model_type`` of its family.
        backbone: Such as "resnet50".
        dilation: Whether the backbone's last stage trades its stride for a dilation (DC5).
        url: Address of the original file.
        benchmark: Key of what it was trained and measured on (:data:`detrkit.hub.card_texts.BENCHMARKS`).
        ap: Published box AP, in percent, averaged over IoU .50 to .95; None where it was not published.
        ap50: The same at an IoU of .50, ``ap75`` at .75.
        ap_small: The same for objects below 32x32 pixels; ``ap_large`` for those above 96x96, ``ap_medium``
            for those between; None where it was not published.
        mask_ap: Published mask AP in percent (panoptic checkpoints).
        pq: Published panoptic quality in percent (panoptic checkpoints).
        params: Published number of parameters, in millions.
        gflops: Published cost of one image, in GFLOPs.
        speed: Published speed on a V100.
        num_labels: Outputs of the class head, no-object not counted.
        num_queries: Object queries, or proposals of a two-stage model.
        num_feature_levels: Feature maps that the encoder attends to.
        with_box_refine: Whether each decoder layer corrects the boxes of the one before.
        two_stage: Whether the queries come from the encoder's proposals.
        longest_edge: Length in pixels to which the longer edge of an image is resized; None for the family's
            own rule.
        no_object_weight: Weight of the no-object class in training, where it is not the family's.
        labels: Names of the categories, where they are not COCO's.
        training: How it was trained, in a sentence, where that is not as others of the family were.
        training_cost: What the authors state of the hardware and time of its training, in sentences.
        paper_numbers: Where in the paper AP50, AP75 and AP by size are; if empty, all are in the README.
    """

    name: str
    hub_id: str | None
    family: str
    task: Task = "detection"
    backbone: str
    dilation: bool = False
    url: str
    benchmark: str = "coco"
    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    mask_ap: float | None = None
    pq: float | None = None
    params: float | None = None
    gflops: float | None = None
    speed: str = ""
    num_labels: int = 91
    num_queries: int = 300
    num_feature_levels: int = 1
    with_box_refine: bool = False
    two_stage: bool = False
    longest_edge: int | None = None
    no_object_weight: float | None = None
    labels: tuple[str, ...] = ()
    training: str = ""
    training_cost: str = ""
    paper_numbers: str = ""


def _checkpoint(
    name: str,
    url: str,
    ap: tuple[float, float | None, float | None, float | None],
    params: float | None,
    gflops: float | None,
    **more: Any,
) -> ReleasedCheckpoint:
    """A row of the tables below; ``ap`` is that of all, small, medium and large objects."""
    return ReleasedCheckpoint(
        name=name,
        url=url,
        backbone="resnet101" if "resnet-101" in name else "resnet50",
        dilation="-dc5" in name,
        params=params,
        gflops=gflops,
        ap=ap[0],
        ap_small=ap[1],
        ap_medium=ap[2],
        ap_large=ap[3],
        **more,
    )


_DETR = "https://dl.fbaipublicfiles.com/detr"
_CONDITIONAL = "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0/ConditionalDETR"
_REFINED = {"with_box_refine": True}
_DETR_HOURS = (
    "The table in the README of Deformable DETR gives {} GPU hours for 500 epochs of this model. DETR's own "
    "README gives 28 minutes an epoch on 8 V100 GPUs for the ResNet-50 model."
)
_COST_R50, _COST_DC5 = _DETR_HOURS.format("2,000"), _DETR_HOURS.format("7,000")
_COST_CONDITIONAL = "The README gives about 30 hours on 8 V100 GPUs."
_GPU_HOURS = "The README gives {} GPU hours on V100 GPUs."
_TABLES = "https://huggingface.co/bsmock"
_TABLE_PARTS = (
    *("table", "table column", "table row", "table column header"),
    *("table projected row header", "table spanning cell"),
)
_TRAINED_AGAIN = "Trained as the authors' [later paper](https://arxiv.org/abs/2303.00716) describes."
_STRUCTURE: dict[str, Any] = {"num_queries": 125, "longest_edge": 1000}

# fmt: off
_RELEASED = (
    *(
        _checkpoint(
            name, f"{_DETR}/{file}.pth", ap, params, gflops,
            family="detr", hub_id=f"facebook/{name}", num_queries=100, speed=f"{seconds} s an image",
            paper_numbers="Table 1", **more,
        )
        for name, file, ap, params, gflops, seconds, more in (
            ("detr-resnet-50", "detr-r50-e632da11", (42.0, 20.5, 45.8, 61.1), 41, 86, "0.036",
             {"ap50": 62.4, "ap75": 44.2, "training_cost": _COST_R50}),
            ("detr-resnet-50-dc5", "detr-r50-dc5-f0fb7ef5", (43.3, 22.5, 47.3, 61.1), 41, 187, "0.083",
             {"ap50": 63.1, "ap75": 45.9, "training_cost": _COST_DC5}),
            ("detr-resnet-101", "detr-r101-2c7b67e5", (43.5, 21.9, 48.0, 61.8), 60, 152, "0.050",
             {"ap50": 63.8, "ap75": 46.4}),
            ("detr-resnet-101-dc5", "detr-r101-dc5-a2e86def", (44.9, 23.7, 49.5, 62.3), 60, 253, "0.097",
             {"ap50": 64.7, "ap75": 47.7}),
        )
    ),
    *(
        _checkpoint(
            name, f"{_DETR}/{file}.pth", (ap, None, None, None), None, None,
            family="detr", task="panoptic", benchmark="coco-panoptic", hub_id=f"facebook/{name}",
            num_labels=250, num_queries=100, mask_ap=mask_ap, pq=pq,
        )
        for name, file, ap, mask_ap, pq in (
            ("detr-resnet-50-panoptic", "detr-r50-panoptic-00ce5173", 38.8, 31.1, 43.4),
            ("detr-resnet-50-dc5-panoptic", "detr-r50-dc5-panoptic-da08f1b1", 40.2, 31.9, 44.6),
            ("detr-resnet-101-panoptic", "detr-r101-panoptic-40021d53", 40.1, 33.0, 45.1),
        )
    ),
    *(
        _checkpoint(
            name, f"{_CONDITIONAL}_{file}_epoch50.pth", ap, params, gflops,
            family="conditional_detr", hub_id=hub_id, training_cost=cost,
        )
        for name, file, ap, params, gflops, hub_id, cost in (
            ("conditional-detr-resnet-50", "r50", (41.0, 20.6, 44.3, 59.3), 44, 90,
             "microsoft/conditional-detr-resnet-50", _COST_CONDITIONAL),
            ("conditional-detr-resnet-50-dc5", "r50dc5", (43.7, 23.9, 47.6, 60.1), 44, 195, None, ""),
            ("conditional-detr-resnet-101", "r101", (42.8, 21.7, 46.6, 60.9), 63, 156, None, ""),
            ("conditional-detr-resnet-101-dc5", "r101dc5", (45.0, 26.1, 48.9, 62.8), 63, 262, None, ""),
        )
    ),
    *(
        _checkpoint(
            name, f"https://drive.google.com/file/d/{file}/view", ap, params, gflops,
            family="deformable_detr", hub_id=f"SenseTime/{name}", speed=f"{rate} images a second",
            num_feature_levels=levels, training_cost=_GPU_HOURS.format(hours), **more,
        )
        for name, file, ap, params, gflops, rate, hours, levels, more in (
            ("deformable-detr-single-scale", "1WEjQ9_FgfI5sw5OZZ4ix-OKk-IJ_-SDU",
             (39.4, 20.6, 43.0, 55.5), 34, 78, "27.0", 160, 1, {}),
            ("deformable-detr-single-scale-dc5", "1m_TgMjzH7D44fbA-c_jiBZ-xf-odxGdk",
             (41.5, 24.1, 45.3, 56.0), 34, 128, "22.1", 215, 1, {}),
            ("deformable-detr", "1nDWZWHuRwtwGden77NLM9JoWe-YisJnA",
             (44.5, 27.1, 47.6, 59.6), 40, 173, "15.0", 325, 4, {}),
            ("deformable-detr-with-box-refine", "1JYKyRYzUH7uo9eVfDaVCiaIGZb5YTCuI",
             (46.2, 28.3, 49.2, 61.5), 41, 173, "15.0", 325, 4, _REFINED),
            ("deformable-detr-with-box-refine-two-stage", "15I03A7hNTpwuLNdfuEmW9_taZMNVssEp",
             (46.9, 29.6, 50.1, 61.6), 41, 173, "14.5", 340, 4, _REFINED | {"two_stage": True}),
        )
    ),
    *(
        ReleasedCheckpoint(
            name=f"table-transformer-{name}", hub_id=f"microsoft/table-transformer-{name}",
            family="table-transformer", backbone="resnet18", url=f"{_TABLES}/{file}.pth", benchmark=benchmark,
            no_object_weight=0.4, num_labels=len(labels), labels=labels, **more,
        )
        for name, file, benchmark, labels, more in (
            ("detection", "tatr-pubtables1m-v1.0/resolve/main/pubtables1m_detection_detr_r18",
             "pubtables-1m-detection", ("table", "table rotated"),
             {"num_queries": 15, "longest_edge": 800, "ap": 97.0, "ap50": 99.5, "ap75": 98.9}),
            ("structure-recognition", "tatr-pubtables1m-v1.0/resolve/main/pubtables1m_structure_detr_r18",
             "pubtables-1m-structure", _TABLE_PARTS, _STRUCTURE | {"ap": 90.2, "ap50": 97.0, "ap75": 94.1}),
            *(
                (f"structure-recognition-v1.1-{data.lower()}",
                 f"TATR-v1.1-{data}/resolve/main/TATR-v1.1-{data}-msft", benchmark, _TABLE_PARTS,
                 _STRUCTURE | {"training": _TRAINED_AGAIN})
                for data, benchmark in (
                    ("Pub", "pubtables-1m-structure"), ("Fin", "fintabnet-c"), ("All", "tables-combined"),
                )
            ),
        )
    ),
)
# fmt: on

#: Every released checkpoint by its short name.
REGISTRY: dict[str, ReleasedCheckpoint] = {entry.name: entry for entry in _RELEASED}

#: Checkpoints that are on the Hub and not converted here: short name to Hub id. These are two-stage
#: Deformable DETRs with box refinement for the 1,203 categories of LVIS, by facebookresearch/Detic.
HUB_ONLY: dict[str, str] = {
    name: f"facebook/{name}" for name in ("deformable-detr-detic", "deformable-detr-box-supervised")
}

#: Models that come with the package: short name to folder.
BUNDLED: dict[str, Path] = {
    folder.parent.name: folder.parent for folder in sorted(PRETRAINED.glob("*/config.json"))
}

_BY_HUB_ID = {entry.hub_id: entry for entry in _RELEASED if entry.hub_id is not None}


def is_released(name: str) -> bool:
    """Whether a name is the Hub id of a released checkpoint, and no folder is called so."""
    return name in _BY_HUB_ID and not Path(name).is_dir()


def find_checkpoint(name: str) -> ReleasedCheckpoint:
    """The released checkpoint with this short name or Hub id.

    Raises:
        CheckpointError: No checkpoint has this name; the message suggests similar names.
    """
    entry = REGISTRY.get(name) or _BY_HUB_ID.get(name)
    hub_id = HUB_ONLY.get(name.removeprefix("facebook/"))
    if hub_id is not None:
        raise CheckpointError(
            f"{hub_id} is already in the Hub's format; there is no original checkpoint to convert"
        )
    if entry is None:
        raise CheckpointError(f"no released checkpoint is called {name!r}{_suggestion(name, REGISTRY)}")
    return entry


def resolve_model(model: str) -> str:
    """What ``from_pretrained`` should be given for a model that a user named.

    A folder and a Hub id ("facebook/detr-resnet-50") stay as they are. The short name of a released
    checkpoint ("detr-resnet-50") becomes its Hub id, that of a model in the package ("blood-cells") its
    folder.

    Raises:
        CheckpointError: The name is none of these, is a file rather than a folder, or is a checkpoint that is
            not on the Hub and has to be converted first.
    """
    path = Path(model)
    # Path("") is the working directory, which nobody means by an empty name.
    if model and _holds(path.is_dir):
        return model
    if model and _holds(path.is_file):
        raise CheckpointError(
            f"{model} is a file, not a model folder; convert an original checkpoint first: "
            "detrkit convert CHECKPOINT OUTPUT --model NAME"
        )
    if model in BUNDLED:
        return str(BUNDLED[model])
    if model in HUB_ONLY:
        return HUB_ONLY[model]
    if model in REGISTRY:
        entry = REGISTRY[model]
        if entry.hub_id is not None:
            return entry.hub_id
        raise CheckpointError(
            f"{entry.name} is not on the Hub; download {entry.url} and convert it: "
            f"detrkit convert CHECKPOINT OUTPUT --model {entry.name}"
        )
    if re.fullmatch(f"{_HUB_NAME}/{_HUB_NAME}", model):
        return model
    if "/" in model or os.sep in model:
        raise CheckpointError(f"model folder not found: {model!r}")
    raise CheckpointError(
        f"{model!r} is neither a model folder, a Hub id like facebook/detr-resnet-50, "
        f"nor a model's short name{_suggestion(model, (*BUNDLED, *REGISTRY, *HUB_ONLY))}"
    )


def _suggestion(name: str, names: Iterable[str]) -> str:
    """Names and Hub ids that come close, or the command that lists all of them."""
    return did_you_mean(name, (*names, *_BY_HUB_ID, *HUB_ONLY.values()), most=3) or "; see: detrkit models"


def _holds(test: Callable[[], bool]) -> bool:
    """Whether a test of a path succeeds; it does not for invalid paths (too long, a NUL)."""
    try:
        return test()
    except (OSError, ValueError):
        return False
