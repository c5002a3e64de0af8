"""Preparation of a training run: checked data sets, the model and its image processor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch

from detrkit.checkpoints.identity import model_files
from detrkit.checkpoints.registry import resolve_model
from detrkit.common.errors import AnnotationError, CheckpointError, MissingExtraError, SettingError
from detrkit.common.files import content_hash
from detrkit.common.log import logger
from detrkit.common.outputs import Output, check_outputs
from detrkit.common.quiet import same_environment
from detrkit.common.screening import check_weights_file
from detrkit.common.terminal import say
from detrkit.common.text import did_you_mean, first_line, match_names
from detrkit.data.checks import check_dataset
from detrkit.data.coco import UNUSED_LABEL, DetectionDataset
from detrkit.data.layouts import WHOLE, open_any, open_split
from detrkit.data.shared_images import describe_shared_images
from detrkit.data.splitting import split_dataset
from detrkit.evaluation.categories import classes_by_name, listed_categories
from detrkit.families import FAMILIES, Family
from detrkit.models.detection import ModelWithHeads
from detrkit.models.layers.backbone import ConvEncoder
from detrkit.processing.image_processor import DetrImageProcessorBase
from detrkit.training.backbone_weights import load_backbone_weights, use_pixel_statistics
from detrkit.training.batch_norm import thaw_batch_norm
from detrkit.training.lora import add_adapters, check_installed, with_adapter
from detrkit.training.recipe import TrainingRecipe

RECIPE_FILE = "recipe.json"
SPLIT_FILE = "split.json"

_OUTPUTS = (
    *("config.json", "preprocessor_config.json", "model.safetensors", "README.md", RECIPE_FILE),
    *("metrics.csv", "loss.png", "ap.png", "predictions.png", "detection_config.json", SPLIT_FILE),
)
_LONGEST_EDGE = 5 / 3  # of the shorter edge, as 1333 is of 800


def read_datasets(
    recipe: TrainingRecipe, train: DetectionDataset | None, val: DetectionDataset | None
) -> tuple[DetectionDataset, DetectionDataset]:
    """Reads the data sets that are not given, and checks both.

    Raises:
        AnnotationError: A data set cannot be read or used.
    """
    if train is None or (val is None and recipe.val_fraction is None):
        recipe.check_data()
    train = train or _read_split(recipe, "train")
    val = val or _read_split(recipe, "val")
    assert train is not None  # check_data has seen to it
    check = partial(check_dataset, strict=recipe.strict, decode=recipe.check_images)
    train = check(train).dataset
    if val is None:
        if recipe.val_fraction is None:
            raise SettingError(
                f"{train.source} has no validation images; add --val-fraction 0.2, or pass them separately"
            )
        train, val = split_dataset(train, recipe.val_fraction, seed=recipe.seed)
        _warn_of_shared_images(train, val, recipe)
        return train, val
    if recipe.val_fraction is not None:
        raise SettingError(f"{val.source} has validation images; leave out --val-fraction")
    if val.return_masks and val.panoptic_dir is None and not val.has_segmentations:
        logger.warning("%s has annotations without a segmentation; only boxes are evaluated", val.source)
        val = replace(val, return_masks=False)
    val = check(val).dataset
    _warn_of_shared_images(train, val, recipe)
    return train, val


def _read_split(recipe: TrainingRecipe, split: str) -> DetectionDataset | None:
    """The split that the recipe's options name; None if there are no validation images."""
    if recipe.data is not None:
        if split == "val":
            return open_split(recipe.data, "val", return_masks=recipe.masks)
        return open_any(recipe.data, "train", WHOLE, return_masks=recipe.masks)
    images, annotations, panoptic_dir = (
        getattr(recipe, f"{split}_{name}") for name in ("images", "annotations", "panoptic_dir")
    )
    if images is None:
        return None
    return DetectionDataset.from_coco(
        images, annotations, panoptic_dir=panoptic_dir, return_masks=recipe.masks
    )


def _warn_of_shared_images(train: DetectionDataset, val: DetectionDataset, recipe: TrainingRecipe) -> None:
    """Warns if validation images are training images, whatever their names: the metrics would mislead."""
    names = ("training", "validation")
    for line in describe_shared_images(train, val, names=names, decode=recipe.check_images):
        warnings.warn(line, stacklevel=2)


def check_classes(model: ModelWithHeads, val: DetectionDataset) -> None:
    """Refuses, with an AnnotationError, validation images with objects that the model has no class for."""
    known = set(classes_by_name(model.config.id2label, val.document["categories"]).values())
    missing = [category for category in val.used_categories if category not in known]
    if missing:
        name_of = val.category_names
        close = did_you_mean(name_of[missing[0]], model.config.id2label.values())
        raise AnnotationError(
            f"{val.source} has objects of {listed_categories(missing, name_of)}, which the training data "
            f"does not have{close}; add training images with them, or remove them from the validation data"
        )


def build_model(
    recipe: TrainingRecipe, train: DetectionDataset
) -> tuple[ModelWithHeads, DetrImageProcessorBase, DetectionDataset]:
    """Creates the model, with its trainable parameters chosen, and its image processor.

    The categories of the training data become the model's classes unless they are already.

    Returns:
        The model, the image processor, and the data set with the model's labels.

    Raises:
        CheckpointError: The checkpoint cannot be found, read or used.
        SettingError: The recipe's settings do not make a model.
    """
    if recipe.from_scratch:
        model, processor = _new_model(recipe, train)
    else:
        model, processor, train = _pretrained_model(recipe, train)
    if recipe.image_size or recipe.max_image_size:
        processor.size = image_size(recipe.image_size, recipe.max_image_size)
    if recipe.masks and train.panoptic_dir is not None:
        processor.is_thing_map = train.is_thing
    choose_trained(model, recipe)
    if recipe.class_targets is not None:
        if FAMILIES[model.config.model_type].class_scores != "sigmoid":
            raise SettingError(
                "--class-targets is for Conditional and Deformable DETR; this model has a softmax for classes"
            )
        model.config.class_targets = recipe.class_targets
    return model, processor, train


def learning_rates(recipe: TrainingRecipe, model: ModelWithHeads) -> tuple[float, float]:
    """Learning rate, and learning rate of the backbone."""
    rate, backbone_rate = recipe.learning_rate, recipe.backbone_learning_rate
    family = FAMILIES[model.config.model_type]
    if rate is None:
        rate = family.learning_rate
    if backbone_rate is None:
        backbone_rate = rate if recipe.has_random_backbone else rate * family.backbone_factor
    return rate, backbone_rate


def hash_of(path: Path) -> str:
    """What tells the weights in a file from others.

    Raises:
        CheckpointError: The file is missing or cannot contain weights.
    """
    check_weights_file(path)
    try:
        return content_hash(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; pass another file") from error


def image_size(shortest: int | None, longest: int | None) -> dict[str, int]:
    """An image processor's ``size`` in pixels; an edge that is not given is 3/5 or 5/3 of the other one."""
    if shortest is None:
        assert longest is not None  # one of them is given
        shortest = round(longest / _LONGEST_EDGE)
    return {"shortest_edge": shortest, "longest_edge": longest or round(shortest * _LONGEST_EDGE)}


def _new_model(
    recipe: TrainingRecipe, train: DetectionDataset
) -> tuple[ModelWithHeads, DetrImageProcessorBase]:
    families = {family.option_name: family for family in FAMILIES.values()}
    family = families.get(recipe.model.replace("_", "-").lower())
    if family is None:
        hint = did_you_mean(recipe.model, families)
        raise SettingError(
            f"--from-scratch requires a family as --model, one of {', '.join(families)}, not "
            f"{recipe.model!r}{hint}"
        )
    if recipe.backbone not in timm.list_models():
        hint = did_you_mean(recipe.backbone, timm.list_models())
        raise SettingError(f"timm has no backbone {recipe.backbone!r}{hint}")
    config_class = family.load(family.config)
    usual = config_class()
    ffn = recipe.d_model * usual.encoder_ffn_dim // usual.d_model
    options = {
        "backbone": recipe.backbone,
        "use_pretrained_backbone": recipe.pretrained_backbone,
        "d_model": recipe.d_model,
        "encoder_layers": recipe.encoder_layers,
        "decoder_layers": recipe.decoder_layers,
        "encoder_ffn_dim": ffn,
        "decoder_ffn_dim": ffn,
        **_class_names(train),
        **_options(recipe, family),
    }
    try:
        model = family.load_model_class(recipe.masks)(config_class(**options))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise SettingError(f"invalid settings for a {recipe.model} model: {first_line(error)}") from error
    processor = family.load(family.processor)()
    if recipe.backbone_weights is not None:
        say(load_backbone_weights(model, recipe.backbone_weights))
    if not recipe.has_random_backbone and (line := use_pixel_statistics(model, processor)):
        say(line)
    return model, processor


def _pretrained_model(
    recipe: TrainingRecipe, train: DetectionDataset
) -> tuple[ModelWithHeads, DetrImageProcessorBase, DetectionDataset]:
    from detrkit.checkpoints.loading import read_model_files, unreadable

    files = read_model_files(resolve_model(recipe.model))
    names = files.config.id2label
    labels = train.labels_in(names)
    own = {label for label, title in names.items() if title != UNUSED_LABEL}
    if labels is not None and set(labels.values()) != own:  # the model has further classes
        labels = None
    new_classes = {} if labels else _class_names(train)
    if not labels:
        _say_head_is_new(names, train)
    try:
        model = files.family.load_model_class(recipe.masks).from_pretrained(
            files.name, ignore_mismatched_sizes=True, **new_classes, **_options(recipe, files.family)
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError) as error:
        raise unreadable(files.name, None, "weights", error) from error
    if files.adapter is not None:
        model = with_adapter(model, files.adapter, files.adapter_revision)
    return model, files.load_processor(), train.with_labels(labels)


def _say_head_is_new(names: Mapping[int, str], train: DetectionDataset) -> None:
    """Says why the class head of a checkpoint is replaced, if it has some of the classes."""
    known = match_names({name: name for name in train.category_names.values()}, names)
    others = {
        title for label, title in names.items() if title != UNUSED_LABEL and label not in known.values()
    }
    unknown = [name for name in train.category_names.values() if name not in known]
    if known and (unknown or others):
        logger.warning(
            "the class head is trained from scratch, since the classes differ: %s",
            "; ".join(
                f"{what} {', '.join(listed[:5])}{', ...' if len(listed) > 5 else ''}"
                for what, listed in (("only in the data", unknown), ("only in the model", sorted(others)))
                if listed
            ),
        )


def _class_names(train: DetectionDataset) -> dict[str, Any]:
    return {"id2label": train.id2label, "label2id": {name: i for i, name in train.id2label.items()}}


def _options(recipe: TrainingRecipe, family: Family) -> dict[str, Any]:
    """Configuration entries that the recipe sets, for new and pretrained models alike."""
    known = set(family.load(family.config)().to_dict())
    options: dict[str, Any] = {}
    for text in recipe.model_option:
        name, _, value = text.partition("=")
        if name not in known:
            hint = did_you_mean(name, known)
            raise SettingError(f"--model-option {text}: the configuration has no entry {name!r}{hint}")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    if recipe.queries is not None:
        options["num_queries"] = recipe.queries
        if "two_stage_num_proposals" in known:
            options["two_stage_num_proposals"] = recipe.queries
    return options


def choose_trained(model: ModelWithHeads, recipe: TrainingRecipe) -> None:
    """Freezes parameters, adds adapters, and makes batch norm trainable, as the recipe says."""
    if recipe.lora is not None:
        add_adapters(model, recipe.lora)
        return
    live = recipe.live_batch_norm
    if live is None:
        live = recipe.has_random_backbone and recipe.freeze != "backbone"
    if live:
        thaw_batch_norm(model)
    for encoder in (module for module in model.modules() if isinstance(module, ConvEncoder)):
        if recipe.freeze == "backbone":
            encoder.requires_grad_(False)
        elif recipe.freeze == "nothing" or live:
            encoder.requires_grad_(True)
    if recipe.freeze == "detector":
        model.freeze_detector()


def resolve_workers(recipe: TrainingRecipe, processes: int) -> int:
    """Number of processes that read images for each training process."""
    if recipe.workers is not None:
        return recipe.workers
    return min(8, max(1, torch.get_num_threads() // max(1, processes)))


def check_packages(recipe: TrainingRecipe) -> None:
    """Raises a MissingExtraError, before any work, if an optional package is not installed."""
    if recipe.lora is not None:
        check_installed()
    try:
        import accelerate  # noqa: F401
        import matplotlib  # noqa: F401

        with same_environment():
            import faster_coco_eval  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("training", "train") from error


def check_output(recipe: TrainingRecipe) -> None:
    """Refuses, with a DetrkitError, an output folder that cannot be written to or has files of others."""
    output = recipe.output
    if output.exists() and not output.is_dir():
        raise SettingError(f"--output must be a folder, but {output} is a file")
    inputs = [path for name, path in vars(recipe).items() if isinstance(path, Path) and name != "output"]
    outputs = [Output("--output", output / name, b'"train_annotations": ', RECIPE_FILE) for name in _OUTPUTS]
    model = [] if recipe.from_scratch else model_files(recipe.model)
    check_outputs(outputs, [*inputs, *model], overwrite=recipe.overwrite)
