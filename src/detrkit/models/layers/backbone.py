"""Backbones: any timm model with feature maps or any Transformers backbone, with frozen batch norm.

As in the original (``models/backbone.py``), batch norm is frozen, a ResNet's stem and first stage are not
trained, and DC5 trades the stride of the last stage for dilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone

from detrkit.models.configuration import DetrFamilyConfig
from detrkit.models.layers.position_encoding import build_position_encoding

# The renames of the checkpoint that is being loaded, if one is.
_loading_checkpoint: ContextVar[dict[str, str] | None] = ContextVar("loading_checkpoint", default=None)


@contextmanager
def loading_checkpoint(renames: dict[str, str]) -> Iterator[None]:
    """Inside this block no backbone weights are fetched: a full checkpoint is about to be loaded.

    ``renames`` are regular expressions in the checkpoint's tensor names -> replacement. A model that is made
    inside the block can add to them with :func:`rename_while_loading`.
    """
    token = _loading_checkpoint.set(renames)
    try:
        yield
    finally:
        _loading_checkpoint.reset(token)


def rename_while_loading(renames: dict[str, str]) -> None:
    """Adds renames that depend on the configuration; without effect unless a checkpoint is being loaded."""
    active = _loading_checkpoint.get()
    if active is not None:
        active.update(renames)


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants (buffers).

    One fused call instead of the usual multiply and add, which saves two passes over large feature maps. The
    activation is for the timm norms that carry one.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.activation = activation
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (batch, channels, height, width)."""
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return x if self.activation is None else self.activation(x)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replaces every batch norm inside ``module`` by a :class:`FrozenBatchNorm2d` with the same values."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            freeze_batch_norm(child)
            continue
        activation = None
        if isinstance(child, BatchNormAct2d):
            activation = nn.Sequential(child.drop, child.act)
        frozen = FrozenBatchNorm2d(child.num_features, child.eps, activation)
        for key, buffer in frozen.named_buffers(recurse=False):
            value = getattr(child, key)
            setattr(frozen, key, buffer if value is None else value.detach().clone())
        setattr(module, name, frozen)


class ConvEncoder(nn.Module):
    """A backbone that gives the feature maps of its stages, finest first."""

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        if config.use_timm_backbone:
            self.model = _timm_backbone(config)
            self.intermediate_channel_sizes = self.model.feature_info.channels()
            self.channels_last_output = self.model.feature_info.info[-1].get("fmt", "NCHW") == "NHWC" or (
                getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            )
        else:
            self.model = AutoBackbone.from_config(config.backbone_config)
            self.intermediate_channel_sizes = self.model.channels
            self.channels_last_output = False
            if config.dilation:
                dilate_last_stage(self.model)
        with torch.no_grad():
            freeze_batch_norm(self.model)
        freeze_early_stages(self.model)
        # A new model keeps what timm made (or fetched). Transformers' own backbones initialise themselves; on
        # the meta device nothing is set yet.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if not tensor.is_meta:
                tensor._is_hf_initialized = True

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Feature maps (batch, channels, height, width) of (batch, 3, height, width) images."""
        maps = self.model(pixel_values)
        if not isinstance(maps, (list, tuple)):
            maps = maps.feature_maps
        return [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last_output else list(maps)


def _timm_backbone(config: DetrFamilyConfig) -> nn.Module:
    options: dict[str, object] = {"out_indices": config.default_out_indices, **(config.backbone_kwargs or {})}
    options.setdefault("in_chans", config.num_channels)
    if config.dilation:
        options["output_stride"] = 16
    if _loading_checkpoint.get() is not None and ":" in str(config.backbone):
        raise ValueError(
            f"backbone {config.backbone!r} is stored elsewhere; a checkpoint may only name one of timm's own"
        )
    fetch = bool(config.use_pretrained_backbone) and _loading_checkpoint.get() is None
    return timm.create_model(config.backbone, pretrained=fetch, features_only=True, **options)


def dilate_last_stage(model: nn.Module) -> None:
    """Gives the last stage of a Transformers ResNet stride 1 and dilation 2 (DC5), as the original does.

    The first block keeps dilation 1 in its 3x3 convolution. A ValueError refuses what is no ResNet.
    """
    if not _is_transformers_resnet(model):
        raise ValueError(f"dilation (DC5) needs a ResNet backbone, not {type(model).__name__}")
    for index, block in enumerate(model.encoder.stages[-1].layers):
        for conv in (m for m in block.modules() if isinstance(m, nn.Conv2d)):
            conv.stride = (1, 1)
            if conv.kernel_size == (3, 3) and index > 0:
                conv.dilation = conv.padding = (2, 2)


def _is_transformers_resnet(model: nn.Module) -> bool:
    return getattr(getattr(model, "config", None), "model_type", None) == "resnet"


def freeze_early_stages(model: nn.Module) -> None:
    """Excludes a ResNet's stem and first stage from training; other backbones are trained whole."""
    names = dict(model.named_children())
    if {"layer1", "layer2", "layer3", "layer4"} <= names.keys():  # timm
        early = [child for name, child in names.items() if name not in ("layer2", "layer3", "layer4")]
    elif _is_transformers_resnet(model):
        early = [model.embedder, model.encoder.stages[0]]
    else:
        early = []
    for module in early:
        module.requires_grad_(False)


class Backbone(nn.Module):
    """Feature maps and the position encoding that goes with them; offset as of SinePositionEncoding."""

    def __init__(self, config: DetrFamilyConfig, position_offset: float = 0.0) -> None:
        super().__init__()
        self.conv_encoder = ConvEncoder(config)
        self.position_embedding = build_position_encoding(config, position_offset)

    @property
    def intermediate_channel_sizes(self) -> list[int]:
        """Channels of each feature map, finest first."""
        return self.conv_encoder.intermediate_channel_sizes

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Feature maps, finest first, of (batch, channels, height, width) images."""
        return self.conv_encoder(pixel_values)


def padding_mask(pixel_mask: Tensor | None, pixel_values: Tensor) -> Tensor | None:
    """The mask to respect, or None when nothing is padded.

    Args:
        pixel_mask: (batch, height, width), nonzero where pixels are real; None for no padding.
        pixel_values: (batch, channels, height, width), to check against.

    Raises:
        ValueError: Images or mask have the wrong shape.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"pixel_values must be (batch, channels, height, width), not {tuple(pixel_values.shape)}; "
            "add a batch dimension with pixel_values[None] or use the image processor"
        )
    if pixel_mask is None:
        return None
    expected = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if tuple(pixel_mask.shape) != expected:
        raise ValueError(f"pixel_mask must be {expected} to fit pixel_values, not {tuple(pixel_mask.shape)}")
    # A graph must not depend on values, and reading them from a GPU would make Python wait for its work.
    unread = torch.compiler.is_compiling() or torch.jit.is_tracing() or pixel_mask.is_cuda
    return pixel_mask if unread or not bool(pixel_mask.all()) else None


def downsample_mask(mask: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """Nearest-neighbour downsampling of a (batch, height, width) mask to booleans of ``size``."""
    if mask is None:
        return None
    return F.interpolate(mask[None].float(), size=size)[0].bool()
