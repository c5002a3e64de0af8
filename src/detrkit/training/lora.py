"""Low-rank adapters (LoRA) in training, and the plain model that they become.

The linear layers of encoder and decoder, attention and feed-forward, keep their weights and learn a product
of two thin matrices on top. The backbone is frozen. All that is small or may be new is trained in full: the
heads, object queries, norms, the projection of the feature maps, and a mask head.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
"""

from __future__ import annotations

import copy
import re
from typing import TypeVar

import torch
from torch import nn

from detrkit.common.errors import MissingExtraError, SettingError
from detrkit.models.adapters import add_adapter
from detrkit.models.layers.backbone import ConvEncoder

_Model = TypeVar("_Model", bound=nn.Module)

_LAYERS = re.compile(r"(^|\.)(encoder|decoder)\.layers\.\d+\.")
_SCALE = 2  # of the product, as is usual; LoRA's alpha is this times the rank


def check_installed() -> None:
    """Raises a MissingExtraError, before any work, if PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("training with --lora", "lora") from error


def add_adapters(model: nn.Module, rank: int) -> None:
    """Adds adapters to a model, in place, and freezes what they adapt and the backbone.

    Args:
        model: A model whose parameters are all loaded; its adapters change nothing yet.
        rank: Rows of the first matrix and columns of the second.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    chosen = [
        name for name, part in model.named_modules() if type(part) is nn.Linear and _LAYERS.search(name)
    ]
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=_SCALE * rank, target_modules=chosen, lora_dropout=0.0), model
    )
    model.requires_grad_(True)
    for layer in adapted_layers(model).values():
        layer.get_base_layer().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvEncoder):
            module.requires_grad_(False)


@torch.no_grad()
def merged(model: _Model) -> _Model:
    """A copy of a model with its adapters, if any, in the weights of its layers.

    Raises:
        SettingError: An adapter is of a kind that cannot be merged.
    """
    model = copy.deepcopy(model)
    layers = adapted_layers(model)
    for name, layer in layers.items():
        layer.merge(safe_merge=True)  # which refuses weights that are not finite
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    left = next((part for part in model.modules() if type(part).__module__.startswith("peft.")), None)
    if left is not None:
        raise SettingError(
            f"the adapter has {type(left).__name__}, which cannot be merged here; merge it with "
            "PEFT (merge_and_unload), save the model, and train that"
        )
    if layers:  # or Transformers would save the adapter only, and tensors under an adapter's names
        model._hf_peft_config_loaded = False
        model._weight_conversions = None
    return model


def with_adapter(model: _Model, adapter: str, revision: str | None) -> _Model:
    """A model with a trained adapter merged into it, and as much of it to train as before.

    Raises:
        CheckpointError: The adapter cannot be read, or does not fit the model.
        SettingError: It is of a kind that cannot be merged.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    add_adapter(model, adapter, revision)
    model = merged(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with an adapter by name; none, without a look at PEFT, in a model that has none."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "get_base_layer")}
