"""Backbone weights from a local file, matched by name or, where the names differ, by order.

timm's own files, torchvision's, checkpoints of whole detectors and the files of other ports are all read.
Classifiers and other tensors that a backbone has no place for are left out, and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from detrkit.common.errors import CheckpointError
from detrkit.common.log import logger
from detrkit.common.terminal import count
from detrkit.conversion.reading import read_checkpoint
from detrkit.models.layers.backbone import ConvEncoder
from detrkit.processing.image_processor import DetrImageProcessorBase

_COUNTER = "num_batches_tracked"  # of batch norms; frozen ones have no use for it
_LISTED = 3


@dataclass(frozen=True)
class _Match:
    """Names of a file's tensors by the backbone's names, and how they were found."""

    names: Mapping[str, str]
    how: str
    prefix: str = ""


def load_backbone_weights(model: nn.Module, path: Path) -> str:
    """Loads the weights of a model's backbone from a safetensors or PyTorch file, in place.

    Tensors are matched by name, also below a prefix such as ``backbone.`` or ``model.``. If the names of most
    differ, they are matched by order, which requires that number and shapes of all tensors are those of the
    timm model. A safetensors file does not keep the order.

    Args:
        model: A model with one timm or Transformers backbone.
        path: The file. Only tensors are read; see :func:`detrkit.conversion.reading.read_checkpoint`.

    Returns:
        A line that says how the weights were matched and what was left out. What the file does not have is
        warned of.

    Raises:
        CheckpointError: The file cannot be read, or its tensors do not fit the backbone.
    """
    tensors = {name: value for name, value in read_checkpoint(path).items() if _is_used(name)}
    encoder = next(module for module in model.modules() if isinstance(module, ConvEncoder))
    targets = {name: value for name, value in encoder.model.state_dict().items() if _is_used(name)}
    title = str(model.config.backbone or "the backbone")
    whole = _whole_timm_model(model) if model.config.use_timm_backbone else None
    match = _match_by_name(tensors, targets)
    if 2 * len(match.names) < len(targets):
        ordered = None if path.suffix == ".safetensors" else _match_by_order(tensors, targets, whole)
        if ordered is None:
            raise CheckpointError(_does_not_fit(path, title, tensors, targets, whole, len(match.names)))
        match = ordered
    for name, source in match.names.items():
        if tensors[source].shape != targets[name].shape:
            raise CheckpointError(
                f"{path} does not fit {title}: {source} has the shape {tuple(tensors[source].shape)}, not "
                f"{tuple(targets[name].shape)}; choose the --backbone that the weights belong to"
            )
    with torch.no_grad():
        for name, source in match.names.items():
            targets[name].copy_(tensors[source])  # shares memory with the module's
    unused = _report(path, title, match, tensors, targets, whole)
    left = f"; {count(len(unused), 'tensor')} not used: {_listing(unused)}" if unused else ""
    return f"Backbone weights: {count(len(match.names), 'tensor')} of {path}, matched by {match.how}{left}."


def _report(
    path: Path,
    title: str,
    match: _Match,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None,
) -> list[str]:
    """Warns of tensors that are missing, or that look like those of another backbone; gives those unused."""
    missing = [name for name in targets if name not in match.names]
    if missing:
        logger.warning(
            "%s has no weights for %d of the %d tensors of %s, which keep their initial values: %s",
            *(path, len(missing), len(targets), title, _listing(missing)),
        )
    used = set(match.names.values())
    unused = sorted(name for name in tensors if name not in used)
    others = _in_the_backbones_modules(unused, match, {**(whole or {}), **targets})
    if others:
        logger.warning(
            "%s has %s that %s does not have, such as %s; its weights may be those of another backbone",
            *(path, count(len(others), "tensor"), title, others[0]),
        )
    return unused


def use_pixel_statistics(model: nn.Module, processor: DetrImageProcessorBase) -> str | None:
    """Gives an image processor the mean and deviation of pixels that timm's weights of a backbone expect.

    Returns:
        A line that says so if they differ from the processor's; otherwise None.
    """
    known = timm.get_pretrained_cfg(model.config.backbone or "", allow_unregistered=True)
    if not model.config.use_timm_backbone or known is None:
        return None
    mean, deviation = list(known.mean), list(known.std)
    if len(mean) != model.config.num_channels:
        return None
    if np.array_equal(np.asarray([processor.image_mean, processor.image_std]), [mean, deviation]):
        return None
    processor.image_mean, processor.image_std = mean, deviation
    return (
        f"Pixels are normalised with the mean {_numbers(mean)} and deviation {_numbers(deviation)} that "
        f"{model.config.backbone} was pretrained with."
    )


def _match_by_name(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> _Match:
    """The tensors whose names are a backbone's below the prefix that most of them have.

    timm puts an underscore for the dot after a stage's name where it takes feature maps ("stages_0.0.conv").
    """
    names = {_dotted(name): name for name in targets}
    if len(names) < len(targets):  # two names that differ in this only
        names = {name: name for name in targets}
        plain = {name: name for name in tensors}
    else:
        plain = {_dotted(name): name for name in tensors}
    prefixes = Counter(
        dotted[:place]
        for dotted in plain
        for place in (0, *(index + 1 for index, letter in enumerate(dotted) if letter == "."))
        if dotted[place:] in names
    )
    if not prefixes:
        return _Match({}, "name")
    (prefix, _), *_ = prefixes.most_common(1)
    found = {name: plain[prefix + dotted] for dotted, name in names.items() if prefix + dotted in plain}
    return _Match(found, f"name below {prefix!r}" if prefix else "name", prefix)


def _in_the_backbones_modules(unused: Iterable[str], match: _Match, known: Iterable[str]) -> list[str]:
    """Of the tensors not used, those in modules of the backbone that are no part of the timm model."""
    modules = {_dotted(name.partition(".")[0]).partition(".")[0] for name in match.names}
    known = {match.prefix + _dotted(name) for name in known}
    return [
        name
        for name in unused
        if _dotted(name).startswith(match.prefix)
        and _dotted(name).removeprefix(match.prefix).partition(".")[0] in modules
        and _dotted(name) not in known
    ]


def _match_by_order(
    tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor], whole: Mapping[str, Tensor] | None
) -> _Match | None:
    """Matches by order with the backbone, or with the timm model that it is part of; None if none fits."""
    shapes = [tensor.shape for tensor in tensors.values()]
    for ordered in (targets, whole):
        if ordered is None or [tensor.shape for tensor in ordered.values()] != shapes:
            continue
        renamed = {_dotted(name): source for name, source in zip(ordered, tensors)}
        found = {name: renamed[_dotted(name)] for name in targets if _dotted(name) in renamed}
        return _Match(found, "order, since the names differ but number and shapes are the same")
    return None


def _whole_timm_model(model: nn.Module) -> dict[str, Tensor] | None:
    """The tensors of the timm model with its classifier, without memory; None if it cannot be made."""
    try:
        with torch.device("meta"):
            whole = timm.create_model(
                model.config.backbone, pretrained=False, in_chans=model.config.num_channels
            )
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return None
    return {name: value for name, value in whole.state_dict().items() if _is_used(name)}


def _does_not_fit(
    path: Path,
    title: str,
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None,
    found: int,
) -> str:
    """Why neither names nor order match."""
    wanted = next(iter(targets), "")
    reason = (
        f"{path} does not fit {title}: {found} of its {len(targets)} tensors are in the file by name (such "
        f"as {wanted}; the file has {_listing(list(tensors))})"
    )
    if path.suffix == ".safetensors":
        return (
            f"{reason}, and a safetensors file does not keep their order; choose the --backbone that the "
            f"weights belong to, or a PyTorch file"
        )
    expected = f"{len(targets)}" if whole is None else f"{len(whole)} (with its classifier) or {len(targets)}"
    return (
        f"{reason}, and its {count(len(tensors), 'tensor')} are not the {expected} of {title} in number and "
        "shapes; choose the --backbone that the weights belong to"
    )


def _is_used(name: str) -> bool:
    return name.rpartition(".")[2] != _COUNTER


def _dotted(name: str) -> str:
    return name.replace("_", ".")


def _listing(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
