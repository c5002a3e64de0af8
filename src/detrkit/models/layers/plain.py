"""Which modules compute no more than their class does, so that another computation may take their place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from detrkit.kernels.recording import is_exporting

# Hooks that see or change what a module is given and gives.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Where the modules come from that only call their parts. One of another origin (an adapter, a quantiser) may
# read their weights.
_KNOWN = ("detrkit.models.", "timm.", "torch.nn.modules.", "transformers.models.")

_QUANTIZERS = ("torch.ao.nn.", "torchao.", "optimum.quanto.", "bitsandbytes.", "quanto.")


def is_plain(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of one of these very classes, not of a subclass, and untouched."""
    return type(module) in kinds and is_untouched(module)


def is_untouched(module: object) -> bool:
    """Whether a module computes what its class says from parameters of its own.

    Not so if it has hooks or another ``forward``, or weights that are computed, quantised or another kind of
    tensor.
    """
    # Recording a graph puts tensors of another type in the place of parameters. Models with quantised layers
    # are not recorded.
    recorded = is_exporting()
    return (
        isinstance(module, nn.Module)
        and not is_hooked(module)
        and "weight" not in vars(module)  # which would be computed before each call
        and all(
            parameter is None
            or ((recorded or type(parameter) is nn.Parameter) and parameter.is_floating_point())
            for parameter in module._parameters.values()
        )
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has layers with quantised weights, of whatever library.

    The slightest change of what such layers are given may change how they round, so nothing around them is
    changed.
    """
    return any(
        f"{type(module).__module__}.".startswith(_QUANTIZERS)
        or any(
            type(parameter) is not nn.Parameter or not parameter.is_floating_point()
            for parameter in module._parameters.values()
            if parameter is not None
        )
        for module in model.modules()
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a ``forward`` that is not its class's."""
    return "forward" in vars(module) or any(getattr(module, name, None) for name in _HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module or one inside it has hooks, or a ``forward`` that is not its class's."""
    return any(map(is_hooked, module.modules()))


def known_modules(module: nn.Module, outside: type[nn.Module] | None = None) -> Iterator[nn.Module]:
    """A module and all inside it, except for what is inside an adapter, quantiser or other stranger.

    Modules of the class ``outside`` are left out too, with all inside them.
    """
    yield module
    for child in module.children():
        if f"{type(child).__module__}.".startswith(_KNOWN) and not (outside and isinstance(child, outside)):
            yield from known_modules(child, outside)


def rows(embedding: nn.Module, count: int) -> Tensor:
    """The first rows of an embedding: its weight, or what it gives if it is more than a table."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight[:count]
    device = next(embedding.parameters()).device
    return embedding(torch.arange(count, device=device))
