"""Fused operators on a CUDA device: what follows a convolution or a linear layer costs no pass of its own.

cuDNN adds bias and residual sum to a convolution and applies the ReLU. In half precision a convolution of
single pixels is a matrix product, to which cuBLAS adds bias and ReLU. A residual sum and its layer norm are
one Triton kernel.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detrkit.engines.fused import FusedConvolution, has_plain_relu
from detrkit.models.layers.plain import is_plain, known_modules
from detrkit.models.layers.transformer import TransformerLayer


def available() -> bool:
    """Whether cuDNN is there, and Triton, which PyTorch's CUDA builds for Linux bring along."""
    return torch.backends.cudnn.is_available() and importlib.util.find_spec("triton") is not None


class CudaConvolution(FusedConvolution):
    """By cuDNN or, for single pixels in half precision, by cuBLAS; channels-last."""

    def __init__(self, conv: nn.Conv2d, relu: bool, sums: bool = False) -> None:
        super().__init__(conv, relu, sums)
        self.geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.weight, self.bias, self.relu = conv.weight, conv.bias, relu
        single = conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1
        # In float32 cuDNN may use TF32 by default and cuBLAS may not.
        self.is_product = single and not sums and conv.weight.dtype != torch.float32
        self.is_fused = relu and conv.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """Convolves (batch, channels, height, width)."""
        if self.is_product:
            down, across = self.geometry[0]
            rows = x[:, :, ::down, ::across].permute(0, 2, 3, 1)
            return biased_product(rows, self.weight.flatten(1), self.bias, self.relu).permute(0, 3, 1, 2)
        if self.is_fused and x.is_cuda:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        x = F.conv2d(x, self.weight, self.bias, *self.geometry)
        return x.relu_() if self.relu else x

    def add_to(self, total: Tensor, x: Tensor, owned: bool) -> Tensor:
        """See :class:`FusedConvolution`; writes over neither."""
        if self.is_fused and x.is_cuda:
            total = total.contiguous(memory_format=torch.channels_last)
            return torch.cudnn_convolution_add_relu(x, self.weight, total, 1, self.bias, *self.geometry)
        x = F.conv2d(x, self.weight, self.bias, *self.geometry).add_(total)
        return x.relu_() if self.relu else x


class CudaLinear(nn.Module):
    """A linear layer with a ReLU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return biased_product(x, self.weight, self.bias, relu=True)


def biased_product(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """(..., in) times the transpose of (out, in), plus (out,), with a ReLU if wanted: (..., out)."""
    if not relu:
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t()).reshape(*x.shape[:-1], -1)


def add_and_norm(x: Tensor, update: Tensor, norm: nn.LayerNorm) -> Tensor:
    """:meth:`TransformerLayer.add_and_norm` of a post-norm layer for inference, in one kernel.

    A model may have left its GPU.
    """
    if not x.is_cuda:
        return norm(x + update)
    from detrkit.kernels.add_norm_triton import add_norm

    return add_norm(x, update, norm.weight, norm.bias, norm.eps)


def fuse_transformer(model: nn.Module) -> None:
    """Fuses the ReLU into the first linear layer of each feed-forward part, and sums into layer norms."""
    for layer in known_modules(model):
        if not isinstance(layer, TransformerLayer):
            continue
        norms = [child for name, child in layer.named_children() if name.endswith("layer_norm")]
        plain = "add_and_norm" not in vars(layer) and all(is_plain(norm, nn.LayerNorm) for norm in norms)
        if plain and not layer.normalize_before:
            layer.add_and_norm = add_and_norm  # type: ignore[method-assign]
        if has_plain_relu(layer):
            layer.fc1, layer.activation_fn = CudaLinear(layer.fc1), nn.Identity()
