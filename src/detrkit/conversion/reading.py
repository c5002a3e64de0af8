"""Reading checkpoint files safely: tensors only, never code."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detrkit.common.errors import CheckpointError
from detrkit.common.quiet import no_warnings
from detrkit.common.screening import check_weights_file, is_archive, weights_limit
from detrkit.common.text import first_line

# Prefix that DistributedDataParallel and DataParallel add to every name.
_PARALLEL_PREFIX = "module."


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, by name, on the CPU.

    Reads what ``torch.save`` wrote (a state dict, or a training checkpoint that keeps one under "model") and
    safetensors files. Pickled code is never run: beyond tensors and plain containers, only the
    ``argparse.Namespace`` of the original training scripts is allowed.

    Args:
        path: The file. A suffix of ".safetensors" picks that format.

    Raises:
        CheckpointError: The file is missing, a folder, damaged, larger than memory, asks for code to be run,
            contains no tensors, or a tensor has infinite or undefined values.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, not a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    check_weights_file(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_pickled_weights(path)
    tensors = _without_parallel_prefix(_find_tensors(content, path))
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
        raise CheckpointError(f"cannot read {path}: it is damaged, cut short or not a checkpoint") from error


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in entries if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f'{path} contains no tensors, at the top level or under "model"')
    return tensors


def _without_parallel_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(name.startswith(_PARALLEL_PREFIX) for name in tensors):
        return tensors
    return {name.removeprefix(_PARALLEL_PREFIX): tensor for name, tensor in tensors.items()}


def _check_values(name: str, tensor: Tensor, path: Path) -> None:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise CheckpointError(f"{path}: tensor {name} does not hold plain values")
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise CheckpointError(f"{path}: tensor {name} has infinite or undefined (NaN) values")
