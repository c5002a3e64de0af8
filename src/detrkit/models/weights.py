"""Whether a checkpoint's tensors are the numbers of a network: real, and none of them NaN or infinite."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from detrkit.common.errors import CheckpointError

# What counts or numbers something, by the ends of its names.
_COUNTS = re.compile(r"(num_batches_tracked|_ids|_index|_mask)$")
_REAL = ("F", "BF")  # how safetensors calls its types of real numbers, before their bits


def check_types(files: Sequence[str], state_dict: Mapping[str, Tensor] | None) -> None:
    """Refuses weights that are not real numbers, which loading would convert without a word.

    Args:
        files: The checkpoint's files, of which only the headers are read.
        state_dict: The tensors in place of files.

    Raises:
        CheckpointError: A weight is an integer, boolean or complex.
    """
    where = Path(files[0]).parent if files else "the state_dict"
    for name, kind, is_real in _types(files, state_dict):
        if not is_real and not _COUNTS.search(name):
            raise CheckpointError(
                f"refused to read {where}: the weight {name} is of the type {kind}, not of real numbers; "
                "save the model again in float32, or with the configuration of its quantisation"
            )


def _types(files: Sequence[str], state_dict: Mapping[str, Tensor] | None) -> Iterator[tuple[str, str, bool]]:
    """Name and type of each tensor, and whether the type is of real numbers."""
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    kind = str(opened.get_slice(name).get_dtype())
                    yield name, kind, kind.startswith(_REAL)
        else:
            tensors = torch.load(file, map_location="meta", weights_only=True)
            yield from _types((), tensors if isinstance(tensors, Mapping) else None)
    for name, tensor in (state_dict or {}).items():
        if isinstance(tensor, Tensor):
            yield name, str(tensor.dtype).removeprefix("torch."), tensor.is_floating_point()


@torch.no_grad()
def check_numbers(model: nn.Module, source: object) -> None:
    """Refuses a model with numbers that no training gives; one sum a tensor, which finds them all.

    Args:
        model: The model.
        source: What errors call it.

    Raises:
        CheckpointError: A weight is NaN or infinite, or the variance of a batch norm is negative.
    """
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point() and not tensor.is_meta
    }
    sums = [tensor.sum(dtype=torch.float32).cpu() for tensor in tensors.values()]
    if sums and not torch.stack(sums).isfinite().all():
        bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            raise CheckpointError(
                f"refused to use {source}: {len(bad)} tensors hold NaN or infinite values, such as {bad[0]}; "
                "its training diverged, so use an earlier checkpoint"
            )
    for name, tensor in tensors.items():
        if name.endswith("running_var") and tensor.min() < 0:
            raise CheckpointError(f"refused to use {source}: the variance {name} is negative; fetch it again")
