"""Fused operators: convolution or linear layer with bias, residual sum and ReLU in one pass.

PyTorch's own compiler calls the same oneDNN operators; calling them from eager code saves the passes over
memory that separate bias, sum and ReLU cost. Where they are missing (other devices, builds without
oneDNN) nothing is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.resnet.modeling_resnet import ResNetBasicLayer, ResNetBottleNeckLayer

from detrkit.models.layers.backbone import ConvEncoder
from detrkit.models.layers.plain import is_plain, known_modules
from detrkit.models.layers.transformer import TransformerLayer

# The order of packed weights is chosen for so many rows of input: a feature map at stride 32.
TYPICAL_LENGTH = 1024
# Packing pays for large convolutions; small ones do better when the operator sees the actual input.
_PACKED_FROM = 2**19
# The input that packed weights are packed for, whatever the input will be.
_TYPICAL_SIDE = 64


def available(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the operators, and for bfloat16 whether the processor has it too."""
    names = ("_convolution_pointwise", "_linear_pointwise")
    if not (torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class PackedWeight(nn.Module):
    """A module whose weight is in the order in which oneDNN reads it, or as it was where oneDNN does not run.

    Copies, pickles and conversions (``half()``, ``to()``) take it out of that order and back into it.

    Attributes:
        weight: The weight; not a parameter, as only this module can use it.
        packed: Whether it is in oneDNN's order: on a CPU, and in a type that it has the operators for.
    """

    weight: Tensor | None = None
    packed = False

    def pack(self, weight: Tensor) -> Tensor:
        """A weight in oneDNN's order."""
        raise NotImplementedError

    def hold(self, weight: Tensor) -> None:
        """Sets the weight, which is on any device and of any type."""
        self.packed = weight.device.type == "cpu" and available(weight.dtype)
        self.weight = self.pack(weight) if self.packed else weight

    def _plain(self) -> Tensor | None:
        return self.weight.to_dense() if self.weight is not None and self.weight.is_mkldnn else self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        super()._apply(fn, recurse)
        weight = self._plain()
        if weight is not None:
            self.hold(fn(weight))
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "weight": self._plain()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.weight is not None:
            self.hold(self.weight)


class FusedConvolution(nn.Module):
    """A convolution with bias, followed by a sum and a ReLU if wanted, as a device does them in one pass.

    With ``sums`` it is to be used by ``add_to``, and not called.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool, sums: bool = False) -> None:
        super().__init__()

    def add_to(self, total: Tensor, x: Tensor, owned: bool) -> Tensor:
        """The sum of ``total`` and the convolution of ``x``, with the ReLU; over ``total`` if ``owned``."""
        raise NotImplementedError


class CpuConvolution(PackedWeight, FusedConvolution):
    """By oneDNN, with weights in its own order; by PyTorch's operators where the model was moved to."""

    def __init__(self, conv: nn.Conv2d, relu: bool, sums: bool = False) -> None:
        super().__init__(conv, relu, sums)
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.bias = conv.bias
        self.activation = "relu" if relu else "none"
        pointwise = conv.kernel_size == (1, 1)
        self.reorders = conv.weight.numel() >= _PACKED_FROM and not pointwise
        # One value of each channel at a time is a matrix product, whose packed weights suit all sizes.
        self.rows: FusedLinear | None = None
        if pointwise and not sums and self.geometry == ([0, 0], [1, 1], [1, 1], 1):
            self.rows = FusedLinear(conv, relu)
        else:
            self.hold(conv.weight.detach())

    def pack(self, weight: Tensor) -> Tensor:
        """See :class:`PackedWeight`."""
        # Not those of a single pixel: packed for another size than the input's, they are now and then
        # put back into order at every call, which takes ten times as long as the convolution.
        if not self.reorders:
            return weight
        example = [1, weight.shape[1] * self.geometry[-1], _TYPICAL_SIDE, _TYPICAL_SIDE]
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, example)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves (batch, channels, height, width)."""
        if self.rows is not None:
            return self.rows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if not self.packed:
            return self._activated(self._convolved(x))
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, self.activation, [], ""
        )

    def add_to(self, total: Tensor, x: Tensor, owned: bool) -> Tensor:
        """See :class:`FusedConvolution`."""
        if not self.packed:
            return self._activated(self._convolved(x).add_(total))
        if not owned:
            total = total.clone(memory_format=torch.preserve_format)
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            total, x, self.weight, self.bias, *self.geometry, "add", 1.0, self.activation, [], ""
        )

    def _convolved(self, x: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        return F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)

    def _activated(self, x: Tensor) -> Tensor:
        return x.relu_() if self.activation == "relu" else x


class FusedLinear(PackedWeight):
    """A linear layer with bias, followed by a ReLU if wanted."""

    def __init__(self, linear: nn.Linear | nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        self.bias = linear.bias
        self.activation = "relu" if relu else "none"
        self.hold(linear.weight.detach().flatten(1).contiguous())

    def pack(self, weight: Tensor) -> Tensor:
        """See :class:`PackedWeight`."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, TYPICAL_LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "")
        x = F.linear(x, self.weight, self.bias)
        return x.relu_() if self.activation == "relu" else x


class FusedResidualBlock(nn.Module):
    """A residual block: convolutions with ReLU between them, a shortcut, and a ReLU over the sum.

    Norms are folded into the convolutions already. A shortcut may pool before it convolves; None is the
    identity. The sum is written over the input where nobody else needs that (``owns_input``).
    """

    def __init__(
        self,
        convs: list[nn.Conv2d],
        shortcut: nn.Module | None,
        owns_input: bool,
        conv_class: type[FusedConvolution],
    ) -> None:
        super().__init__()
        *first, last = convs
        inner = [conv_class(conv, relu=True) for conv in first]
        self.convs = nn.ModuleList([*inner, conv_class(last, relu=True, sums=True)])
        self.shortcut = shortcut
        if shortcut is not None:
            fuse_convolutions(shortcut, conv_class)
        self.owns_total = owns_input or shortcut is not None

    def forward(self, x: Tensor) -> Tensor:
        """Runs the block on (batch, channels, height, width)."""
        total = x if self.shortcut is None else self.shortcut(x)
        for conv in self.convs[:-1]:
            x = conv(x)
        return self.convs[-1].add_to(total, x, self.owns_total)


def fuse_residual_block(
    block: nn.Module, owns_input: bool, conv_class: type[FusedConvolution]
) -> FusedResidualBlock | None:
    """The fused form of a ResNet block of timm or Transformers, or None for a block with anything special.

    Batch norms must have been folded: what is left of them is an identity.
    """
    if is_plain(block, BasicBlock, Bottleneck):
        numbers = (1, 2, 3) if isinstance(block, Bottleneck) else (1, 2)
        convs, norms, activations = (
            [getattr(block, f"{n}{i}") for i in numbers] for n in ("conv", "bn", "act")
        )
        special = [block.drop_block, block.aa, block.se, block.drop_path, *norms]
        shortcut = block.downsample
    elif is_plain(block, ResNetBasicLayer, ResNetBottleNeckLayer):
        special = [layer.normalization for layer in block.layer]
        activations = [block.activation, *(layer.activation for layer in block.layer[:-1])]
        convs = [layer.convolution for layer in block.layer]
        shortcut = None if isinstance(block.shortcut, nn.Identity) else block.shortcut
    else:
        return None
    plain = all(module is None or is_plain(module, nn.Identity) for module in special)
    relus = all(is_plain(module, nn.ReLU) for module in activations)
    fusable = all(_is_plain_conv(conv) for conv in convs)
    if not (plain and relus and fusable):
        return None
    return FusedResidualBlock(convs, shortcut, owns_input, conv_class)


def _is_plain_conv(module: Any) -> bool:
    return is_plain(module, nn.Conv2d) and module.padding_mode == "zeros" and module.bias is not None


def fuse_convolutions(module: nn.Module, conv_class: type[FusedConvolution]) -> None:
    """Replaces every plain convolution inside ``module``."""
    for parent in list(known_modules(module)):
        for name, child in list(parent.named_children()):
            if _is_plain_conv(child):
                setattr(parent, name, conv_class(child, relu=False))


def fuse_stem(encoder: nn.Module, conv_class: type[FusedConvolution]) -> None:
    """Joins the first convolution of a timm or Transformers ResNet with its ReLU, norms folded."""
    stem = encoder.model
    names = ("conv1", "bn1", "act1")
    if hasattr(stem, "embedder"):
        stem, names = stem.embedder.embedder, ("convolution", "normalization", "activation")
    conv, norm, activation = (getattr(stem, name, None) for name in names)
    if _is_plain_conv(conv) and is_plain(norm, nn.Identity) and is_plain(activation, nn.ReLU):
        setattr(stem, names[0], conv_class(conv, relu=True))
        setattr(stem, names[2], nn.Identity())


def fuse_backbone(encoder: nn.Module, conv_class: type[FusedConvolution] = CpuConvolution) -> int:
    """Replaces every plain residual block inside ``encoder``; returns how many."""
    count = 0
    for parent in list(known_modules(encoder)):
        for name, child in list(parent.named_children()):
            # A stage's output is a feature map; what one block of a stage hands to the next is not.
            fused = fuse_residual_block(child, name.isdigit() and int(name) > 0, conv_class)
            if fused is not None:
                setattr(parent, name, fused)
                count += 1
    if count:
        fuse_stem(encoder, conv_class)
    return count


def fuse_transformer(model: nn.Module) -> None:
    """Fuses bias and ReLU into the linear layers of a model's Transformer and heads."""
    for layer in known_modules(model):
        if has_plain_relu(layer):
            layer.fc1 = FusedLinear(layer.fc1, relu=True)
            layer.activation_fn = nn.Identity()
    fuse_linears(model, outside=ConvEncoder)


def has_plain_relu(layer: nn.Module) -> bool:
    """Whether the feed-forward part of a Transformer's layer begins with a plain linear layer and a ReLU."""
    return (
        isinstance(layer, TransformerLayer)
        and "feed_forward" not in vars(layer)
        and is_plain(layer.fc1, nn.Linear)
        and is_plain(layer.activation_fn, nn.ReLU)
    )


def fuse_linears(
    module: nn.Module, outside: type[nn.Module] | None = None
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replaces every plain linear layer inside ``module`` that is not inside of an ``outside``.

    Returns:
        Owner and name of each layer, and the layer that was replaced.
    """
    replaced = []
    for parent in list(known_modules(module, outside)):
        for name, child in list(parent.named_children()):
            if is_plain(child, nn.Linear) and child.bias is not None:
                setattr(parent, name, FusedLinear(child))
                replaced.append((parent, name, child))
    return replaced
