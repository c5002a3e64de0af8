"""Fused CPU operators: convolution or linear layer with bias, residual sum and ReLU in one pass.

PyTorch's own compiler calls the same oneDNN operators; calling them from eager code saves the passes over
memory that separate bias, sum and ReLU cost. Where they are missing (other devices, builds without
oneDNN) nothing is replaced.
"""

from __future__ import annotations

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from detrkit.models.layers.transformer import TransformerLayer


def available() -> bool:
    """Whether this build of PyTorch has the operators."""
    names = ("_convolution_pointwise", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class FusedConv2d(nn.Module):
    """A convolution with bias, followed by a sum and a ReLU if wanted.

    Args:
        conv: The convolution to take weights and geometry from.
        relu: Whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.activation = "relu" if relu else "none"
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)

    def forward(self, x: Tensor, addend: Tensor | None = None) -> Tensor:
        """Convolves (batch, channels, height, width); adds ``addend`` before the ReLU."""
        if addend is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, self.activation, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, addend, self.weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], ""
        )


class FusedLinear(nn.Module):
    """A linear layer with bias, followed by a ReLU if wanted."""

    def __init__(self, linear: nn.Linear, relu: bool = False) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.activation = "relu" if relu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "")


class FusedResidualBlock(nn.Module):
    """A residual block: convolutions with ReLU between them, a shortcut, and a ReLU over the sum.

    Args:
        convs: The block's convolutions, norms already folded in.
        shortcut: The convolution (or pooling and convolution) of the shortcut; None for the identity.
    """

    def __init__(self, convs: list[nn.Conv2d], shortcut: nn.Module | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(FusedConv2d(conv, relu=True) for conv in convs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block on (batch, channels, height, width)."""
        addend = x if self.shortcut is None else self.shortcut(x)
        for conv in self.convs[:-1]:
            x = conv(x)
        return self.convs[-1](x, addend)


def fuse_residual_block(block: nn.Module) -> FusedResidualBlock | None:
    """The fused form of a ResNet block of timm or Transformers, or None for a block with anything special.

    Batch norms must have been folded: what is left of them is an identity.
    """
    if isinstance(block, (BasicBlock, Bottleneck)):
        special = [block.drop_block, block.aa, block.se, block.drop_path, block.bn1, block.bn2]
        activations = [block.act1, block.act2, *([block.act3] if isinstance(block, Bottleneck) else [])]
        convs = [block.conv1, block.conv2, *([block.conv3] if isinstance(block, Bottleneck) else [])]
        special.append(block.bn3 if isinstance(block, Bottleneck) else None)
        shortcut = block.downsample
    elif isinstance(block, (ResNetBasicLayer, ResNetBottleNeckLayer)):
        special = [layer.normalization for layer in block.layer]
        activations = [block.activation, *(layer.activation for layer in block.layer[:-1])]
        convs = [layer.convolution for layer in block.layer]
        shortcut = None if isinstance(block.shortcut, nn.Identity) else block.shortcut
    else:
        return None
    plain = all(module is None or isinstance(module, nn.Identity) for module in special)
    relus = all(isinstance(module, nn.ReLU) for module in activations)
    fusable = all(type(conv) is nn.Conv2d and conv.padding_mode == "zeros" for conv in convs)
    return FusedResidualBlock(convs, shortcut) if plain and relus and fusable else None


def fuse_backbone(encoder: nn.Module) -> int:
    """Replaces every plain residual block inside ``encoder``; returns how many."""
    count = 0
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            fused = fuse_residual_block(child)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    return count


def fuse_transformer(model: nn.Module) -> None:
    """Fuses bias and ReLU into the linear layers of a model's Transformer and heads."""
    for layer in list(model.modules()):
        if isinstance(layer, TransformerLayer) and isinstance(layer.activation_fn, nn.ReLU):
            layer.fc1 = FusedLinear(layer.fc1, relu=True)
            layer.activation_fn = nn.Identity()
        for name, child in list(layer.named_children()):
            if type(child) is nn.Linear and child.bias is not None:
                setattr(layer, name, FusedLinear(child))
