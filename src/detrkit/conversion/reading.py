"""Reading checkpoint files safely: tensors only, never code."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detrkit.common.errors import CheckpointError
from detrkit.common.log import logger
from detrkit.common.quiet import no_warnings
from detrkit.common.screening import check_weights_file, is_archive, weights_limit
from detrkit.common.text import first_line

# How deep training programs put a model's tensors into a checkpoint.
_DEPTH = 3

# What training programs call a moving average of the weights.
_AVERAGE = re.compile(r"(?:^|[^a-z])(?:s?ema|swa|avg|average[ds]?)(?:[^a-z]|$)", re.IGNORECASE)

# Where they keep the trained weights.
_USUAL = {"", "model", "state_dict", "model_state_dict", "model_state", "module", "net", "network", "weights"}

# What every original checkpoint has, after any prefix that a wrapper has added to its names.
_ANCHOR = re.compile(r"((?:.*?\.)??)transformer\.decoder\.layers\.0\..*")

# Prefix that DistributedDataParallel and DataParallel add to every name.
_PARALLEL_PREFIX = "module."


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name, on the CPU.

    Reads what ``torch.save`` wrote and safetensors files. The tensors may be a state dict, or lie in a
    training checkpoint under "model", "state_dict" or any other key, with what a wrapper has put before their
    names ("model.", "module.", ...). Of trained weights and their moving average the trained ones are taken,
    and a message says so. Pickled code is never run: beyond tensors and plain containers, only the
    ``argparse.Namespace`` of the original training scripts is allowed.

    Args:
        path: The file. A suffix of ".safetensors" picks that format.

    Raises:
        CheckpointError: The file is missing, a folder, damaged, larger than memory, asks for code to be run,
            contains no tensors, or those of several models, or a tensor has infinite or undefined values.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    check_weights_file(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled_weights(path)
    tensors = _without_prefix(_find_tensors(content, path), path)
    # A file may hold one value for many places of a tensor, which are all written out later.
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > weights_limit():
        raise CheckpointError(
            f"refused to read {path}: its tensors, written out, are larger than {weights_limit()} bytes, "
            "what this machine has memory for or a checkpoint may have"
        )
    for name, tensor in tensors.items():
        _check_values(name, tensor, path)
    return tensors


def _load_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from error


def _load_pickled_weights(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), no_warnings():
            # Remarks on pickle versions would say nothing to a user.
            # Mapped, so that a tensor that claims more than its share of the file cannot reach beyond it.
            mapped = is_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"\bGLOBAL ([\w.]*\w)", str(error))
        if refused:
            raise CheckpointError(
                f"refused to read {path}: it asks for {refused[1]}, and only tensors are read; if you trust "
                "its source, save its state dict alone and convert that"
            ) from error
        raise CheckpointError(f"cannot read {path}: it is damaged, truncated or not a checkpoint") from error


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in a file's content, wherever it lies."""
    found = dict(_state_dicts(content))
    # Counters and such are no state dict, where there is one.
    weights = {key: tensors for key, tensors in found.items() if any(n.endswith(".weight") for n in tensors)}
    found = weights or found
    if not found:
        keys = ", ".join(map(str, list(content)[:10])) if isinstance(content, Mapping) else ""
        raise CheckpointError(
            f"{path} contains no named tensors" + (f"; it has the keys {keys}" if keys else "")
        )
    return found[_trained(found, path)]


def _state_dicts(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping in ``content`` that holds named tensors, after the keys that lead to it."""
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if tensors:
        yield key, tensors
    for name, value in named.items():
        yield from _state_dicts(value, f"{key}.{name}" if key else name, depth + 1)


def _trained(places: Collection[str], path: Path) -> str:
    """Of the places where a file has weights, that of the trained ones; dotted keys, or prefixes of names.

    Raises:
        CheckpointError: There are several, and none has a usual name.
    """
    trained = [place for place in places if not _AVERAGE.search(place)] or list(places)
    if len(trained) > 1:
        usual = [place for place in trained if place.rstrip(".").rpartition(".")[2] in _USUAL]
        if len(usual) != 1:
            raise CheckpointError(
                f"{path} holds the weights of several models, under {', '.join(map(repr, sorted(trained)))}; "
                "save the state dict of one and convert that"
            )
        trained = usual
    others = sorted(set(places) - set(trained))
    if others:
        logger.warning(
            "%s: took the weights under %r, not those under %s.", path, trained[0], ", ".join(others)
        )
    return trained[0]


def _without_prefix(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The model's tensors without what wrappers have put before their names."""
    prefixes = {match[1] for name in tensors if (match := _ANCHOR.fullmatch(name))}
    # Models with masks have their detector as an attribute.
    prefixes = {
        prefix.removesuffix("detr.")
        if any(name.startswith(f"{prefix.removesuffix('detr.')}mask_head.") for name in tensors)
        else prefix
        for prefix in prefixes
    }
    if not prefixes:
        prefixes = {_PARALLEL_PREFIX} if all(name.startswith(_PARALLEL_PREFIX) for name in tensors) else {""}
    prefix = _trained(prefixes, path)
    others = tuple(prefixes - {prefix})
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if others:
        own = {name: tensor for name, tensor in own.items() if not name.startswith(others)}
    beside = [name for name in tensors if name not in own and not (others and name.startswith(others))]
    if beside:
        logger.warning(
            "%s: took the tensors under %r; %d more, such as %s, do not belong to the model.",
            *(path, prefix, len(beside), beside[0]),
        )
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}


def _check_values(name: str, tensor: Tensor, path: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{path}: tensor {name} is sparse, quantised or without values")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise CheckpointError(f"{path}: tensor {name} has infinite or undefined (NaN) values")
