"""From a checkpoint of an original repository to a model folder that ``from_pretrained`` loads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from detrkit.checkpoints.cost import CARD_SIZE, Cost, count_cost
from detrkit.checkpoints.registry import REGISTRY, ReleasedCheckpoint, find_checkpoint
from detrkit.common.errors import CheckpointError, DetrkitError
from detrkit.common.files import atomic_folder
from detrkit.common.randomness import same_randomness
from detrkit.conversion.labels import label_names
from detrkit.conversion.original import Architecture, check_fits, hub_state_dict, read_architecture
from detrkit.conversion.reading import read_checkpoint
from detrkit.families import FAMILIES
from detrkit.hub.card_facts import Facts, read_facts
from detrkit.hub.card_released import converted_card
from detrkit.hub.cards import backbone_title
from detrkit.models.base import DetrFamilyPreTrainedModel
from detrkit.models.configuration import DetrFamilyConfig
from detrkit.processing.options import COCO_PANOPTIC

# What both the tensors and the registry say; they have to agree.
_SHARED_FACTS = ("family", "task", "backbone", "num_feature_levels", "with_box_refine", "two_stage")
_SIZES = ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim")

# Largest change of the outputs when a model is written and read back: kernels round differently on memory
# of another alignment. A lost option, such as the dilation, changes them by far more.
_OUTPUT_TOLERANCE = 1e-4


def convert_checkpoint(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    name: str,
    *,
    verify: bool = True,
) -> Path:
    """Converts an original checkpoint into a model folder.

    The number of categories, queries, layers and channels is read from the tensors, so checkpoints that
    were fine-tuned from a released one convert under its name.

    Args:
        checkpoint: File of the original repository, as ``torch.save`` or safetensors wrote it.
        output: Folder to write: config.json, preprocessor_config.json, model.safetensors and README.md.
        name: Which released checkpoint this is, or has the architecture of (``REGISTRY``). Decides what the
            tensors do not show: whether the backbone is dilated (DC5).
        verify: Load the folder back before it gets its name, and compare every tensor and the outputs on a
            random image.

    Returns:
        The folder.

    Raises:
        CheckpointError: The file cannot be read, contradicts ``name``, or does not fit its architecture.
        DetrkitError: The folder cannot be written; no part of it is left.
    """
    entry = find_checkpoint(name)
    tensors = read_checkpoint(checkpoint)
    architecture = read_architecture(tensors, entry.family)
    _check_agreement(architecture, entry)
    with same_randomness():  # weights that are replaced at once
        model, processor = _build(architecture, entry)
    weights = {key: value.float() for key, value in hub_state_dict(tensors, architecture).items()}
    weights = _without_copies(weights, model)
    check_fits(weights, model.state_dict(), architecture)
    model.load_state_dict(weights)
    model.eval()

    output = Path(output)
    released = architecture == released_architecture(entry)
    facts = read_facts(entry.name) if released else Facts(cost=_count_cost(model))
    title, file = output.resolve().name, Path(checkpoint).name
    card = converted_card(entry, facts, title, file, architecture, released=released)
    with atomic_folder(output) as folder:
        _write(folder, model, processor, card)
        if verify:
            _verify(folder, model, weights)
    return output


def _count_cost(model: DetrFamilyPreTrainedModel) -> Cost:
    # Learned positions reach no further than 50 places of the feature map.
    learned = model.config.position_embedding_type == "learned"
    return count_cost(type(model), model.config, (600, 800) if learned else CARD_SIZE)


def _build(
    architecture: Architecture, entry: ReleasedCheckpoint
) -> tuple[DetrFamilyPreTrainedModel, BaseImageProcessor]:
    family = FAMILIES[architecture.family]
    panoptic = architecture.task == "panoptic"
    config_class = family.load(family.config)
    config = config_class(**_options(architecture, entry, config_class))
    model = family.load_model_class(masks=panoptic)(config)
    options: dict[str, Any] = {"format": COCO_PANOPTIC} if panoptic else {}
    if entry.longest_edge is not None:
        # As ``MaxResize`` in inference.py of microsoft/table-transformer, by Pillow's default filter.
        options |= {"size": {"longest_edge": entry.longest_edge}, "resample": Resampling.BICUBIC}
    return model, family.load(family.processor)(**options)


def _options(
    architecture: Architecture, entry: ReleasedCheckpoint, config_class: type[DetrFamilyConfig]
) -> dict[str, Any]:
    own = ("num_feature_levels", "with_box_refine", "two_stage", "normalize_before")  # of some families
    names = label_names(architecture.num_labels, architecture.task)
    trained = {}
    if architecture.num_labels == entry.num_labels:  # what other classes were trained with is not known
        names = entry.labels or names
        if entry.no_object_weight is not None:
            trained["eos_coefficient"] = entry.no_object_weight
    return {
        "backbone": architecture.backbone,
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "dilation": entry.dilation,
        "position_embedding_type": architecture.position_embedding_type,
        "num_queries": architecture.num_queries or entry.num_queries,
        "encoder_attention_heads": architecture.attention_heads,
        "decoder_attention_heads": architecture.attention_heads,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        **trained,
        **_take(_SIZES, architecture),
        **_take([name for name in own if hasattr(config_class, name)], architecture),
    }


def _without_copies(weights: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Leaves out the second names of shared tensors, after checking that the tensors are equal."""
    copies = model.second_names(model.state_dict())
    for second, first in copies.items():
        if second in weights and not torch.equal(weights[second], weights.get(first, weights[second])):
            raise CheckpointError(f"{second} and {first} must be identical in this architecture, but differ")
    # A file may hold a shared tensor under its second name alone.
    found = {first: weights[second] for second, first in copies.items() if second in weights}
    return {**found, **{name: tensor for name, tensor in weights.items() if name not in copies}}


def released_architecture(entry: ReleasedCheckpoint) -> Architecture:
    """What the tensors of a released checkpoint say, without its file: the sizes are a family's defaults."""
    family = FAMILIES[entry.family]
    config = family.load(family.config)()
    return Architecture(
        num_labels=entry.num_labels,
        num_queries=None if entry.two_stage else entry.num_queries,
        normalize_before=config.normalize_before,
        **_take(_SHARED_FACTS, entry),
        **_take(_SIZES, config),
    )


def released_model(entry: ReleasedCheckpoint) -> tuple[DetrFamilyPreTrainedModel, BaseImageProcessor]:
    """The model of a released checkpoint without values (on the meta device), and its image processor."""
    with torch.device("meta"):
        return _build(released_architecture(entry), entry)


def _check_agreement(architecture: Architecture, entry: ReleasedCheckpoint) -> None:
    facts = _take(_SHARED_FACTS, architecture)
    if _take(_SHARED_FACTS, entry) == facts:
        return
    fitting = [other for other in REGISTRY.values() if _take(_SHARED_FACTS, other) == facts]
    # Dilation leaves no trace in the tensors, so the name decides.
    fitting = [other for other in fitting if other.dilation == entry.dilation] or fitting
    names = " or ".join(other.name for other in fitting)
    remedy = f"convert it as {names}" if fitting else "no released checkpoint has this architecture"
    raise CheckpointError(f"the checkpoint is {_describe(architecture)}, not {entry.name}; {remedy}")


def _take(names: Iterable[str], source: object) -> dict[str, Any]:
    """Attributes by their names."""
    return {name: getattr(source, name) for name in names}


def _describe(architecture: Architecture) -> str:
    """For example "Deformable DETR with a ResNet-50 backbone, 4 feature levels and box refinement"."""
    parts = [f"a {backbone_title(architecture.backbone)} backbone"]
    if FAMILIES[architecture.family].multi_scale:
        levels = architecture.num_feature_levels
        parts.append("a single feature level" if levels == 1 else f"{levels} feature levels")
    parts += ["box refinement"] if architecture.with_box_refine else []
    parts += ["two stages"] if architecture.two_stage else []
    parts += ["a mask head (panoptic)"] if architecture.task == "panoptic" else []
    *first, last = parts
    return f"{FAMILIES[architecture.family].title} with {', '.join(first) + ' and ' if first else ''}{last}"


def _write(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor, card: str) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


@torch.inference_mode()
def _verify(folder: Path, model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Loads a written folder and checks that it is the model, tensor by tensor and by what it predicts."""
    reloaded = type(model).from_pretrained(folder).eval()
    found = reloaded.state_dict()
    changed = [key for key in weights if key not in found or not _same_bits(found[key], weights[key])]
    if changed:
        raise DetrkitError(f"verification failed: {changed[0]} was not read back as it was written")
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    expected, actual = model(image), reloaded(image)
    for key in ("logits", "pred_boxes", "pred_masks"):
        if expected.get(key) is None:
            continue
        if not expected[key].isfinite().all():
            raise CheckpointError(
                f"the checkpoint's weights give infinite or undefined {key} on a random image"
            )
        if not torch.allclose(actual[key], expected[key], rtol=_OUTPUT_TOLERANCE, atol=_OUTPUT_TOLERANCE):
            raise DetrkitError(
                f"verification failed: the written model gives different {key} on a random image"
            )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
