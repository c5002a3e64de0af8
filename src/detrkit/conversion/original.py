"""Reads the checkpoints of the original repositories: architecture, and tensors under their Hub names.

The tables of names belong to the families: see :mod:`detrkit.models.original`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torch import Tensor

from detrkit.checkpoints.registry import Task
from detrkit.common.errors import CheckpointError
from detrkit.families import FAMILIES, Family
from detrkit.models.original import MASKS, under

# The number of attention heads leaves no trace in the tensors; every released checkpoint has eight.
_ATTENTION_HEADS = 8

# (whether blocks have a third convolution, blocks in the third stage) -> backbone.
_BACKBONES = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}

# How many names an error message lists.
_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the tensors of an original checkpoint say about its network; sizes as a configuration names them.

    Dilation (DC5), dropout and auxiliary losses leave no trace in the tensors and are not here.

    Attributes:
        family: ``model_type`` of the family.
        backbone: "resnet18" to "resnet152".
        num_labels: Categories, DETR's no-object output not counted.
        num_queries: Object queries; None for a two-stage model, which has no query embeddings.
        attention_heads: Taken to be 8.
        num_feature_levels: Feature maps that the encoder attends to.
        with_box_refine: Whether each decoder layer corrects the boxes of the one before.
        two_stage: Whether the queries come from the encoder's proposals.
        normalize_before: Whether layers are pre-norm, which the norm after the encoder tells.
    """

    family: str
    task: Task
    backbone: str
    num_labels: int
    num_queries: int | None
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    attention_heads: int = _ATTENTION_HEADS
    position_embedding_type: Literal["sine", "learned"] = "sine"
    num_feature_levels: int = 1
    with_box_refine: bool = False
    two_stage: bool = False
    normalize_before: bool = False


def read_architecture(tensors: Mapping[str, Tensor], preferred: str | None = None) -> Architecture:
    """Reads the architecture off the names and shapes of an original checkpoint's tensors.

    ``preferred`` is the ``model_type`` of the family that is meant where the tensors fit several: those of
    Table Transformer are a DETR's with pre-norm layers.

    Raises:
        CheckpointError: The tensors are not an original checkpoint of a known family, lack one that shows
            the architecture, or belong to a variant that is not supported (normalisation before attention).
    """
    panoptic = any(name.startswith("mask_head.") for name in tensors)
    if panoptic:
        tensors = {name.removeprefix("detr."): tensor for name, tensor in tensors.items()}
    family = _read_family(tensors, panoptic, preferred)
    layout = family.original
    ends_with_norm = "transformer.encoder.norm.weight" in tensors
    if ends_with_norm and "transformer.encoder.norm" not in layout.names:
        raise CheckpointError(
            "checkpoints that normalise before attention (trained with --pre_norm) are not supported"
        )
    classes = layout.class_head
    d_model = _size(tensors, classes, dim=1)
    if d_model == 0 or d_model % _ATTENTION_HEADS:
        raise CheckpointError(
            f"{classes} has {d_model} channels, which is not divisible by {_ATTENTION_HEADS} attention heads"
        )
    # A softmax needs an output for no object.
    num_labels = _size(tensors, classes, dim=0) - (family.class_scores == "softmax")
    if num_labels < 1:
        raise CheckpointError(f"{classes} leaves no category to detect")
    two_stage = "transformer.enc_output.weight" in tensors
    return Architecture(
        family=family.model_type,
        task="panoptic" if panoptic else "detection",
        backbone=_read_backbone(tensors),
        num_labels=num_labels,
        num_queries=None if two_stage else _size(tensors, "query_embed.weight", dim=0),
        d_model=d_model,
        encoder_layers=_count(tensors, "transformer.encoder.layers."),
        decoder_layers=_count(tensors, "transformer.decoder.layers."),
        encoder_ffn_dim=_size(tensors, "transformer.encoder.layers.0.linear1.weight", dim=0),
        decoder_ffn_dim=_size(tensors, "transformer.decoder.layers.0.linear1.weight", dim=0),
        position_embedding_type="learned" if "backbone.1.row_embed.weight" in tensors else "sine",
        num_feature_levels=_size(tensors, "transformer.level_embed", dim=0) if family.multi_scale else 1,
        with_box_refine="transformer.decoder.bbox_embed.0.layers.0.weight" in tensors,
        two_stage=two_stage,
        normalize_before=ends_with_norm and True in family.load(family.config).norm_placements,
    )


def hub_state_dict(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of an original checkpoint under their Hub names.

    Packed query-key-value projections are cut in three. The counters of batch norms
    (``num_batches_tracked``), which frozen norms have no use for, are dropped.

    Raises:
        CheckpointError: A tensor's name is not in the table of the family.
    """
    rules = _rules(architecture)
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.endswith(".num_batches_tracked"):
            continue
        renamed = [
            (hub, rule.part) for rule in rules if (hub := _rename(_dotted(name), rule.original, rule.hub))
        ]
        if not renamed:
            unknown.append(name)
        for hub, part in renamed:
            converted[hub] = tensor if part is None else _third(name, tensor, part)
    if unknown:
        raise CheckpointError(f"the checkpoint has {_listing('unknown tensor', unknown)}")
    return converted


def check_fits(
    converted: Mapping[str, Tensor], expected: Mapping[str, Tensor], architecture: Architecture
) -> None:
    """Checks that tensors under Hub names are those of a model's state dict, by name and shape.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of the wrong shape. They are called as in the
            original checkpoint.
    """
    missing = [original_name(name, architecture)[0] for name in expected if name not in converted]
    unexpected = [original_name(name, architecture)[0] for name in converted if name not in expected]
    misshaped = []
    for name in converted.keys() & expected.keys():
        found, needed = converted[name].shape, expected[name].shape
        if found != needed:
            original, packed = original_name(name, architecture)
            misshaped.append(f"{original} ({_shape(found, packed)} instead of {_shape(needed, packed)})")
    problems = [
        _listing(kind, names)
        for kind, names in (
            ("missing tensor", missing),
            ("unexpected tensor", unexpected),
            ("tensor of the wrong shape", misshaped),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit its architecture: {'; '.join(problems)}")


@dataclass(frozen=True)
class _Rule:
    """A line of a table; ``part`` is the third of a packed projection that it takes, None for all of it."""

    original: str
    hub: str
    part: int | None = None


def _rules(architecture: Architecture) -> list[_Rule]:
    family = FAMILIES[architecture.family]
    names = family.original.names
    if architecture.task == "panoptic":
        names = under("detr.", family.load_model_class(masks=True).detector_prefix, names) | MASKS
    rules = []
    for original, hub in names.items():
        if "{q,k,v}" in hub:
            rules += [
                _Rule(original, hub.replace("{q,k,v}", letter), part) for part, letter in enumerate("qkv")
            ]
        else:
            rules.append(_Rule(original, hub))
    return rules


def _rename(name: str, source: str, target: str) -> str | None:
    """``name`` taken from one side of a line of a table to the other; None where it is not that line's."""
    match = _pattern(source).fullmatch(name)
    if match is None:
        return None
    *wildcards, leaf = match.groups()
    values = iter(wildcards)
    return re.sub(r"\bN\b|\*", lambda _: next(values), target) + leaf


@cache
def _pattern(source: str) -> re.Pattern[str]:
    module = re.sub(r"\bN\b", r"(\\d+)", re.escape(source)).replace(r"\*", "(.+?)")
    return re.compile(module + r"((?:\.weight|\.bias)?)")


def _dotted(name: str) -> str:
    """Makes a packed projection a module like any other: in_proj_weight is its weight."""
    return re.sub(r"\.in_proj_(weight|bias)$", r".in_proj.\1", name)


def original_name(hub_name: str, architecture: Architecture) -> tuple[str, bool]:
    """The original name of a Hub tensor, and whether it is a third of a packed projection."""
    for rule in _rules(architecture):
        name = _rename(hub_name, rule.hub, rule.original)
        if name is not None:
            return re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", name), rule.part is not None
    return hub_name, False


def _third(name: str, tensor: Tensor, part: int) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[0] == 0 or tensor.shape[0] % 3:
        raise CheckpointError(
            f"{name} of shape {_shape(tensor.shape)} does not split into query, key and value"
        )
    return tensor.chunk(3)[part]


def _read_family(tensors: Mapping[str, Tensor], panoptic: bool, preferred: str | None) -> Family:
    fitting = {
        model_type: family
        for model_type, family in FAMILIES.items()
        if all(name in tensors for name in family.original.markers) and family.has_masks >= panoptic
    }
    if preferred in fitting:
        return fitting[preferred]
    if fitting:
        return max(fitting.values(), key=lambda family: len(family.original.markers))
    hub_names = [name for name in tensors if "backbone.conv_encoder." in name]
    if hub_names:
        raise CheckpointError(
            "the checkpoint has the Hub's tensor names already; from_pretrained loads it as it is, as "
            f"model.safetensors in a folder with a config.json (its first tensor is {hub_names[0]})"
        )
    titles = ", ".join(family.title for family in FAMILIES.values())
    raise CheckpointError(
        f"not an original checkpoint of {titles}: it has {_listing('tensor', list(tensors))}"
    )


def _read_backbone(tensors: Mapping[str, Tensor]) -> str:
    stages = [_count(tensors, f"backbone.0.body.layer{stage}.") for stage in range(1, 5)]
    bottleneck = "backbone.0.body.layer1.0.conv3.weight" in tensors
    backbone = _BACKBONES.get((bottleneck, stages[2]))
    if backbone is None:
        kind = "three" if bottleneck else "two"
        raise CheckpointError(
            f"no known backbone has stages of {'/'.join(map(str, stages))} blocks of {kind} convolutions"
        )
    return backbone


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow ``prefix``."""
    return len({name[len(prefix) :].split(".", 1)[0] for name in tensors if name.startswith(prefix)})


def _size(tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint lacks the tensor {name}, which shows its architecture")
    shape = tensors[name].shape
    if dim >= len(shape):
        raise CheckpointError(f"{name} has too few dimensions: {_shape(shape)}")
    return int(shape[dim])


def _shape(shape: Sequence[int], packed: bool = False) -> str:
    """A shape such as "768 x 256"; that of the whole projection for a third of a packed one."""
    sizes = [shape[0] * 3, *shape[1:]] if packed and len(shape) else shape
    return " x ".join(map(str, sizes)) or "a single number"


def _listing(kind: str, names: Sequence[str]) -> str:
    """For example "7 unknown tensors: a, b, c, d, e and 2 more"; a name that stands twice counts once."""
    names = list(dict.fromkeys(names))
    plural = kind if len(names) == 1 else kind.replace("tensor", "tensors")
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {plural}: {', '.join(names[:_LISTED])}{more}"
