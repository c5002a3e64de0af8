"""Trainable batch norm, for backbones that start from random weights.

The models freeze batch norm, as the original does with its pretrained backbones; a backbone with random
weights does not learn that way. A live batch norm has tensors of the same names as a frozen one, so it is
saved in the same layout, and a saved model is loaded with frozen batch norm again.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.models.layers.backbone import FrozenBatchNorm2d

_MOMENTUM = 0.1  # PyTorch's default: how much of a batch's statistics enters the running ones


class LiveBatchNorm2d(nn.Module):
    """A trainable batch norm with the values and tensor names of a frozen one."""

    def __init__(self, frozen: FrozenBatchNorm2d) -> None:
        super().__init__()
        self.eps, self.activation = frozen.eps, frozen.activation
        self.weight = nn.Parameter(frozen.weight.clone())
        self.bias = nn.Parameter(frozen.bias.clone())
        self.register_buffer("running_mean", frozen.running_mean.clone())
        self.register_buffer("running_var", frozen.running_var.clone())
        self.train(frozen.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (batch, channels, height, width), in training mode by the batch's own statistics."""
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, _MOMENTUM, self.eps
        )
        return x if self.activation is None else self.activation(x)


def thaw_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every frozen batch norm inside ``module`` with a trainable one; returns ``module``."""
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, LiveBatchNorm2d(child))
        else:
            thaw_batch_norm(child)
    return module


def refreeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replaces every live batch norm inside ``module`` with a frozen copy; returns ``module``."""
    for name, child in module.named_children():
        if isinstance(child, LiveBatchNorm2d):
            frozen = FrozenBatchNorm2d(len(child.weight), child.eps, child.activation)
            frozen.to(child.weight.device).load_state_dict(child.state_dict())
            setattr(module, name, frozen.train(child.training))
        else:
            refreeze_batch_norm(child)
    return module
