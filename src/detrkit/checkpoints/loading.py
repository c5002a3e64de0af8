"""Models and their image processors from a Hub id or a folder; errors name what is wrong with it."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

from detrkit.common.errors import CheckpointError, MissingExtraError
from detrkit.common.screening import check_config, check_folder
from detrkit.common.text import first_line
from detrkit.families import Family, family_of


def read_config(name: str, revision: str | None) -> dict[str, Any]:
    """The config.json of a Hub id or folder.

    Raises:
        CheckpointError: There is none, or one that asks for code to be run.
    """
    from transformers import PretrainedConfig

    if os.path.isdir(name):  # noqa: PTH112 - a Hub id is not a path
        check_folder(name)
    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(name, revision, "config.json", error) from error
    if not config:
        raise CheckpointError(f"{_where(name, revision)} has no config.json; {_remedy(name)}")
    check_config(config, f"config.json of {_where(name, revision)}")
    return config


def _has_masks(config: Mapping[str, Any], name: str, revision: str | None) -> bool:
    """Whether a checkpoint is a segmentation model's: its config says so, or else its tensors."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and all(isinstance(each, str) for each in architectures[:100]):
        return any("Segmentation" in architecture for architecture in architectures)
    from safetensors import SafetensorError, safe_open
    from transformers.utils import cached_file

    try:
        path = cached_file(name, "model.safetensors", revision=revision)
        with safe_open(path, framework="pt") as file:
            return any(key.startswith("mask_head.") for key in file.keys())  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError):  # what is wrong is told when the weights are loaded
        return False


def exported_for(name: str) -> str | None:
    """The engine that a folder's model was exported for; None where it holds a model for torch."""
    if not os.path.isdir(name):  # noqa: PTH112 - a Hub id is not a path
        return None
    from detrkit.engines.exported import read_manifest

    manifest = read_manifest(name)
    return manifest.engine if manifest else None


def load_for_engine(name: str, revision: str | None, engine: str) -> tuple[Any, Any]:
    """What ``engines.start`` starts on an engine, and its image processor.

    Args:
        name: A Hub id or a folder; an exported model is opened for the engine.
        revision: Branch, tag or commit on the Hub.
        engine: What is to run the model.

    Raises:
        CheckpointError: Something cannot be found, read or used.
    """
    if exported_for(name) is None:
        return load_pretrained(name, revision)
    from detrkit.engines.exported import open_exported

    family = family_of(read_config(name, None).get("model_type"), name)
    config = family.load(family.config).from_pretrained(name)
    return open_exported(name, engine, config), read_processor(family, name, None)


def load_pretrained(name: str, revision: str | None) -> tuple[Any, Any]:
    """The model of a Hub id or folder, as its family's class, and its image processor.

    Raises:
        CheckpointError: One of them cannot be found, read or used.
    """
    family, model_class = find_classes(name, revision)
    return _load_model(family, model_class, name, revision), read_processor(family, name, revision)


def find_classes(name: str, revision: str | None) -> tuple[Family, str]:
    """The family of a Hub id or folder, and the name of its model's class.

    Raises:
        CheckpointError: There is no config.json, or one of another kind of model.
    """
    config = read_config(name, revision)
    family = family_of(config.get("model_type"), name)
    try:
        family.load(family.config).from_dict(config)
    except Exception as error:  # a file from elsewhere can raise anything
        raise unreadable(name, revision, "config.json", error) from error
    has_masks = _has_masks(config, name, revision)
    return family, family.segmenter if has_masks and family.segmenter else family.detector


def _load_model(family: Family, model_class: str, name: str, revision: str | None) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # says nothing to a user
            model, report = family.load(model_class).from_pretrained(
                name, revision=revision, output_loading_info=True
            )
    except MissingExtraError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused to read the weights of {_where(name, revision)}: they are a pickle of more than "
            "tensors, and pickled code is never run; save them as model.safetensors"
        ) from error
    except Exception as error:  # a file from elsewhere can raise anything
        raise unreadable(name, revision, "weights", error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # Transformers would fill these with random numbers and go on.
        raise CheckpointError(
            f"the weights of {_where(name, revision)} lack {len(missing)} of the model's tensors, such as "
            f"{missing[0]}; {_remedy(name)}"
        )
    return model


def read_processor(family: Family, name: str, revision: str | None) -> Any:
    """The image processor of a Hub id or folder.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        processor = family.load(family.processor).from_pretrained(name, revision=revision)
        processor.check()
    except Exception as error:  # a file from elsewhere can raise anything
        raise unreadable(name, revision, "preprocessor_config.json", error) from error
    return processor


def _where(name: str, revision: str | None) -> str:
    return f"{name} (revision {revision})" if revision else name


def _remedy(name: str) -> str:
    if os.path.isdir(name):  # noqa: PTH112 - a Hub id is not a path
        return "save or convert the model again: detrkit convert CHECKPOINT OUTPUT --model NAME"
    return (
        "check the name and the revision, your network and, for a private model, your login (hf auth login)"
    )


def unreadable(name: str, revision: str | None, part: str, error: Exception) -> CheckpointError:
    """One line that names the model and the part; the libraries' own messages run over many."""
    return CheckpointError(
        f"cannot read the {part} of {_where(name, revision)}: {first_line(error)}; {_remedy(name)}"
    )
