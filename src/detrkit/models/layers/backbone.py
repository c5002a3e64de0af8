"""Backbones: any timm model with feature maps or any Transformers backbone, with frozen batch norm.

As in the original (``models/backbone.py``), batch norm is frozen, a ResNet's stem and first stage are not
trained, and DC5 trades the stride of the last stage for dilation.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial

import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoBackbone

from detrkit.common.errors import SettingError
from detrkit.common.log import logger
from detrkit.common.text import did_you_mean, first_line
from detrkit.kernels.recording import is_exporting
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
    """A backbone that gives the feature maps of its stages, finest first.

    Attributes:
        num_channels: Channels of the images that it takes.
        native_size: (height, width) in pixels of the only images that it may take; None for any.
        sides: What images are padded to, which some backbones need: a multiple of so many pixels, and at
            least so many; None until it is found out (:meth:`find_sides`).
    """

    def __init__(self, config: DetrFamilyConfig) -> None:
        super().__init__()
        self.num_channels = config.num_channels
        self.native_size: tuple[int, int] | None = None
        self.sides: tuple[int, int] | None = (1, 1) if _is_plain_resnet(config) else None
        if config.use_timm_backbone:
            self.model, self.native_size = _timm_backbone(config)
            self.intermediate_channel_sizes = self.model.feature_info.channels()
            self.channels_last_output = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
        else:
            self.model = AutoBackbone.from_config(config.backbone_config)
            self.num_channels = getattr(config.backbone_config, "num_channels", config.num_channels)
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
        """Feature maps (batch, channels, height, width) of (batch, channels, height, width) images.

        Raises:
            SettingError: The backbone does not take images of this size.
        """
        try:
            return self._maps(pixel_values, self.known_sides()[0])
        except (AssertionError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or pixel_values.shape[1] != self.num_channels:
                raise
            return self._maps_of_odd_size(pixel_values, error)

    def known_sides(self) -> tuple[int, int]:
        """As :meth:`find_sides`, but a compiler, exporter or tracer tries nothing: engines do that before."""
        busy = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return (self.sides or (1, 1)) if busy else self.find_sides()

    def find_sides(self) -> tuple[int, int]:
        """What the sides of images have to be multiples of, and their least length, in pixels.

        Both are found by trials, so that they belong to the backbone and not to the images that it has seen.
        """
        if self.sides is None:
            takes = partial(_takes_square, _for_trials(self.model), self.num_channels)
            multiple = next((m for m in (1, *_MULTIPLES) if takes(_LARGE_SIDE + m)), 1)
            least = 1
            if not takes(multiple) and takes(_LARGE_SIDE):
                # A larger image is never refused where a smaller one is taken.
                sides = range(multiple, _LARGE_SIDE, multiple)
                place = bisect_left(sides, True, key=takes)
                least = _LARGE_SIDE if place == len(sides) else sides[place]
            self.sides = (multiple, least)
        return self.sides

    def _maps(self, pixel_values: Tensor, multiple: int) -> list[Tensor]:
        """The maps of images that are padded at the bottom and right to a multiple of some pixels."""
        height, width = pixel_values.shape[-2:]
        if multiple > 1:
            pixel_values = F.pad(pixel_values, (0, -width % multiple, 0, -height % multiple))
        maps = self.model(pixel_values)
        if not isinstance(maps, (list, tuple)):
            maps = maps.feature_maps
        maps = [m.permute(0, 3, 1, 2) for m in maps] if self.channels_last_output else list(maps)
        if multiple > 1:
            # A map covers the image, as that of a convolution which pads what is odd.
            rows, columns = pixel_values.shape[-2:]
            maps = [
                m[..., : -(-height * m.shape[-2] // rows), : -(-width * m.shape[-1] // columns)] for m in maps
            ]
        return maps

    def _maps_of_odd_size(self, pixel_values: Tensor, error: Exception) -> list[Tensor]:
        """The maps of images of a size that the backbone takes only padded."""
        for multiple in _MULTIPLES:
            with suppress(AssertionError, IndexError, RuntimeError):
                return self._maps(pixel_values, multiple)
        if self.native_size is None and not isinstance(error, AssertionError):  # by which timm checks sizes
            raise error
        height, width = pixel_values.shape[-2:]
        reason = f"the backbone does not accept images of {height}x{width} pixels ({first_line(error)})"
        if self.native_size is None:
            raise SettingError(f"{reason}; give the image processor another size or pad_size") from error
        height, width = self.native_size
        raise SettingError(
            f"{reason}; it is made for {height}x{width}: give the image processor "
            f'size={{"height": {height}, "width": {width}}}, a new model backbone_kwargs='
            '{"img_size": [height, width]}, or choose a backbone without a fixed size'
        ) from error


# What the sides of images may have to be multiples of.
_MULTIPLES = (4, 8, 16, 32, 64)
# No backbone needs more for a side to be long enough.
_LARGE_SIDE = 64


def _is_plain_resnet(config: DetrFamilyConfig) -> bool:
    """Whether the backbone is one of those that take every size, which need not be tried."""
    if config.use_timm_backbone:
        return re.fullmatch(r"resnet(18|34|50|101|152)(\..*)?", str(config.backbone)) is not None
    return getattr(config.backbone_config, "model_type", None) == "resnet"


def _for_trials(model: nn.Module) -> nn.Module:
    """A copy of a model for inference that shares its tensors and has none of a user's hooks."""
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo).eval()
    for module in copied.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not _is_of_a_library(hook)]:
                del hooks[key]
    return copied


def _is_of_a_library(hook: object) -> bool:
    """Whether a hook is how timm or Transformers take feature maps, and not a user's."""
    place = str(getattr(getattr(hook, "func", hook), "__module__", ""))
    return place.startswith(("timm.", "transformers."))


@torch.no_grad()
def _takes_square(model: nn.Module, channels: int, side: int) -> bool:
    """Whether a model takes square images of a side and gives maps with something in them."""
    image = next(model.parameters()).new_zeros(1, channels, side, side)
    try:
        maps = model(image)
    except Exception as error:  # whatever a size that does not fit leads to
        logger.debug("the backbone does not take %dx%d pixels (%s)", side, side, first_line(error))
        return False
    return all(m.numel() > 0 for m in (maps if isinstance(maps, (list, tuple)) else maps.feature_maps))


# Options by which some of timm's backbones of a fixed size take images of any size.
_ANY_SIZE: tuple[dict[str, object], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
)


def _timm_backbone(config: DetrFamilyConfig) -> tuple[nn.Module, tuple[int, int] | None]:
    """A model of timm's that gives feature maps, and the only size of images that it takes, if it is so.

    Which maps these are is written into the configuration if neither it nor the family's default says it.

    Raises:
        SettingError: timm has no such model, or it does not give these feature maps.
    """
    name, options = str(config.backbone), dict(config.backbone_kwargs or {})
    if not timm.is_model(name):
        raise SettingError(f"timm has no backbone {name!r}{did_you_mean(name, timm.list_models())}")
    options.setdefault("in_chans", config.num_channels)
    if config.dilation:
        options["output_stride"] = 16
    size = None
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is not None and known.fixed_input_size:
        flexible = next((more for more in _ANY_SIZE if _takes(name, {**more, **options})), None)
        options = {**(flexible or {}), **options}
        size = None if flexible else tuple(options.get("img_size", known.input_size[1:]))

    loading = _loading_checkpoint.get() is not None
    options["pretrained"] = bool(config.use_pretrained_backbone) and not loading
    given = options.pop("out_indices", None)
    if given is not None:
        return _create(name, options, given), size
    usual = config.default_out_indices
    if loading:
        # A file without indices means these, as for Transformers, if the backbone has them.
        with suppress(SettingError):
            return _create(name, options, usual), size
    chosen = _deepest_levels(_strides(name, options), len(usual), bool(config.dilation))
    if chosen != usual:
        config.backbone_kwargs = {**(config.backbone_kwargs or {}), "out_indices": list(chosen)}
    return _create(name, options, chosen), size


def _create(name: str, options: dict[str, object], indices: Sequence[int] | int | None) -> nn.Module:
    """A model of timm's that gives the feature maps of some stages; of those that it chooses if None."""
    chosen = {} if indices is None else {"out_indices": indices}
    try:
        return timm.create_model(name, features_only=True, **options, **chosen)
    except (IndexError, AssertionError) as error:
        if indices is None:
            raise SettingError(f"timm's {name} gives no feature maps; choose another backbone") from error
        strides = _strides(name, options)
        raise SettingError(
            f"backbone {name!r} has no feature maps out_indices={indices}, but those of 0 to "
            f"{len(strides) - 1}, of the strides {', '.join(map(str, strides))}; name some of them in "
            "backbone_kwargs"
        ) from error
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        shown = {key: value for key, value in options.items() if key not in ("in_chans", "pretrained")}
        raise SettingError(
            f"timm's backbone {name!r} cannot be made for feature maps"
            f"{f' with {shown}' if shown else ''} ({first_line(error)}); change backbone, backbone_kwargs or "
            "dilation"
        ) from error


def _takes(name: str, options: dict[str, object]) -> bool:
    """Whether a model of timm's has some options."""
    try:
        _strides(name, {key: value for key, value in options.items() if key != "out_indices"})
    except SettingError:
        return False
    return True


def _strides(name: str, options: dict[str, object]) -> list[int]:
    """The strides of all feature maps of a model of timm's, finest first; takes no memory."""
    with torch.device("meta"):
        model = _create(name, {**options, "pretrained": False}, None)
    return [level["reduction"] for level in model.feature_info.info]


def _deepest_levels(strides: list[int], count: int, dilated: bool) -> tuple[int, ...]:
    """The last map of each stride, of the largest ``count`` strides; if there are fewer, the last maps."""
    last = [index for index, stride in enumerate(strides) if stride not in strides[index + 1 :]]
    if dilated or len(last) < count:
        last = list(range(len(strides)))
    return tuple(last[-count:])


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

    def long_enough(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images, and their mask as of :func:`padding_mask`, of the least length that the backbone takes.

        Thin images are padded at the bottom and right, which the mask then says. A graph for other programs
        gets this in front of it instead (:mod:`detrkit.engines.export`).

        Raises:
            ValueError: Images or mask have the wrong shape.
        """
        mask = padding_mask(pixel_mask, pixel_values)
        if is_exporting() or torch.jit.is_tracing():
            return pixel_values, mask
        least = self.conv_encoder.known_sides()[1]
        below, right = (max(least - length, 0) for length in pixel_values.shape[-2:])
        if not (below or right):
            return pixel_values, mask
        if mask is None:
            mask = pixel_values.new_ones(pixel_values[:, 0].shape, dtype=torch.long)
        margin = (0, right, 0, below)
        return F.pad(pixel_values, margin), F.pad(mask, margin)


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
