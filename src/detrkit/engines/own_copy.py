"""A copy of a user's model that an engine may change."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from detrkit.common.errors import SettingError
from detrkit.common.text import first_line


def own_copy(model: Any) -> Any:
    """A copy of a model without what is wrapped around it; the model stays as it is.

    Layers with adapters (PEFT) are layers of the copy. Memory is shared only where something cannot be
    copied: tensors of some quantisers, and layers of bitsandbytes, whose copies compute something else.

    Raises:
        SettingError: The model cannot be copied, or its adapter is none of layers.
    """
    model = without_wrappers(model)
    if not isinstance(model, nn.Module):
        return copy.deepcopy(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes."):
            memo[id(module)] = module
        for value in (*vars(module).values(), *module._parameters.values()):
            if isinstance(value, Tensor):
                memo[id(value)] = _copied(value)
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise SettingError(
            f"the model cannot be copied ({first_line(error)}); load it with Detector.from_pretrained"
        ) from error


def without_wrappers(model: Any) -> Any:
    """What torch.compile, DataParallel and PEFT put around a model is taken off."""
    while True:
        if hasattr(model, "_orig_mod"):  # of torch.compile
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                kind = model.active_peft_config.peft_type
                raise SettingError(
                    f"an adapter of the type {kind} is not one of layers, and detectors have no prompt"
                )
            model = model.get_base_model()
        else:
            return model


def _copied(tensor: Tensor) -> Tensor:
    if not tensor.is_leaf:  # computed from others before each call, as by weight_norm and prune
        return tensor.detach().clone()
    try:
        return copy.deepcopy(tensor)
    except (RuntimeError, TypeError):
        return tensor
