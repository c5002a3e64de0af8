"""PyTorch, eager, prepared for inference: the same numbers with less work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from detrkit.common.errors import SettingError
from detrkit.common.log import logger
from detrkit.engines import fused, fused_cuda
from detrkit.models.layers.backbone import ConvEncoder, FrozenBatchNorm2d
from detrkit.models.layers.plain import has_hooks, is_plain, is_quantized, is_untouched, known_modules
from detrkit.models.segmentation import SegmentationModel

PROBE_SIZE = (96, 96)


def prepare(
    model: PreTrainedModel,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    fuse: bool = True,
) -> PreTrainedModel:
    """Prepares a model for inference, in place, and returns it.

    Batch norm is folded into the convolutions (exact up to rounding), convolutions run channels-last, and
    activations work in place. The result predicts as before but can no longer be trained or saved.

    Args:
        model: A detrkit model.
        device: Where to run; None leaves the model where it is.
        dtype: Type of the weights; None leaves it.
        fuse: Use the fused operators where there are some; a compiler brings its own.

    Raises:
        SettingError: The model is quantised and cannot be made what is asked for.
    """
    model.eval()
    if is_quantized(model):
        return _as_it_is(model, device, dtype)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvEncoder):
            module.find_sides()  # now, as compilers and fused modules cannot try sizes
    # A hook may keep what is passed on, so nothing may be written over or left out.
    encoders = [m for m in model.modules() if isinstance(m, ConvEncoder) and not has_hooks(m)]
    for encoder in encoders:
        fold_batch_norm(encoder)
        _work_in_place(encoder)
    model.to(device=device, dtype=dtype)
    model.to(memory_format=torch.channels_last)
    if fuse and model.device.type == "cpu" and fused.available(model.dtype):
        for encoder in encoders:
            fused.fuse_backbone(encoder)
            _fuse_linears(encoder)
        fused.fuse_transformer(model)
    elif fuse and model.device.type == "cuda" and fused_cuda.available():
        for encoder in encoders:
            fused.fuse_backbone(encoder, fused_cuda.CudaConvolution)
        fused_cuda.fuse_transformer(model)
    model.is_prepared = True
    return model


def _as_it_is(
    model: PreTrainedModel, device: str | torch.device | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """A quantised model, whose weights keep their type."""
    if dtype not in (None, model.dtype):
        raise SettingError(
            f"the model is quantised and cannot be converted from {model.dtype} to {dtype}; pass "
            f"dtype={str(model.dtype).removeprefix('torch.')!r}"
        )
    if device is not None and torch.device(device).type != model.device.type:
        raise SettingError(f"the model is quantised on {model.device}; pass device={str(model.device)!r}")
    return model


def parts_of_fixed_shapes(model: PreTrainedModel) -> list[nn.Module]:
    """The parts whose shapes follow from those of their inputs; the number of masks depends on the image."""
    if not isinstance(model, SegmentationModel):
        return [model]
    base = model.detector.model
    return [base.backbone.conv_encoder, base.encoder, base.decoder]


@torch.no_grad()
def fold_batch_norm(encoder: ConvEncoder) -> int:
    """Folds each frozen batch norm into the convolution that feeds it.

    Which convolution that is shows in a run on a small image, whatever library the backbone comes from.
    A second run proves the folded backbone equal; if it is not (a convolution's output that is used
    twice), everything is put back.

    Returns:
        The number of batch norms folded: 0 as well for a backbone that does not take the small image.
    """
    if not any(isinstance(module, FrozenBatchNorm2d) for module in encoder.modules()):
        return 0
    trial = _Trial.of(encoder)
    if trial is None:
        return 0
    pairs = _conv_norm_pairs(encoder, trial.image)
    backup = [
        (conv, conv.weight.clone(), None if conv.bias is None else conv.bias.clone()) for conv, _ in pairs
    ]
    owners = {
        child: (parent, name) for parent in encoder.modules() for name, child in parent.named_children()
    }
    for conv, norm in pairs:
        _fold(conv, norm)
        parent, name = owners[norm]
        setattr(parent, name, norm.activation or nn.Identity())
    if trial.succeeds():
        return len(pairs)
    for (conv, weight, bias), (_, norm) in zip(backup, pairs):
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        parent, name = owners[norm]
        setattr(parent, name, norm)
    return 0


@torch.no_grad()
def _work_in_place(encoder: ConvEncoder) -> None:
    """Lets a backbone's activations write over their input, where nothing else reads that."""
    kinds = (nn.ReLU, nn.SiLU, nn.Hardswish)
    changed = [m for m in known_modules(encoder) if is_plain(m, *kinds) and not m.inplace]
    trial = _Trial.of(encoder) if changed else None
    if trial is None:
        return
    for module in changed:
        module.inplace = True
    if not trial.succeeds():
        for module in changed:
            module.inplace = False


@torch.no_grad()
def _fuse_linears(encoder: ConvEncoder) -> None:
    """Fuses a backbone's linear layers, unless something reads their weights."""
    trial = _Trial.of(encoder) if any(isinstance(m, nn.Linear) for m in encoder.modules()) else None
    if trial is None:
        return
    replaced = fused.fuse_linears(encoder)
    if not trial.succeeds():
        for parent, name, linear in replaced:
            setattr(parent, name, linear)


@dataclass(frozen=True)
class _Trial:
    """A backbone and what it made of a small image before it was changed."""

    encoder: ConvEncoder
    image: Tensor
    expected: list[Tensor]

    @classmethod
    def of(cls, encoder: ConvEncoder) -> _Trial | None:
        """The trial; None for a backbone that does not take the image."""
        size = encoder.native_size or PROBE_SIZE
        image = torch.rand(1, encoder.num_channels, *size, generator=torch.Generator().manual_seed(0))
        image = image.to(next(encoder.parameters()))
        try:
            return cls(encoder, image, encoder(image.clone()))
        except (AssertionError, RuntimeError, ValueError) as error:
            logger.debug("a backbone does not take a %s image and is not prepared: %s", size, error)
            return None

    def succeeds(self) -> bool:
        """Whether the backbone gives the same as before, up to rounding."""
        tolerance = 1e-3 if self.image.dtype == torch.float32 else 5e-2
        try:
            found = self.encoder(self.image.clone())
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
        return all(_close(a, b, tolerance) for a, b in zip(self.expected, found, strict=True))


def _conv_norm_pairs(encoder: ConvEncoder, image: Tensor) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """Convolutions whose output tensor is what a frozen batch norm gets, seen in one run."""
    made_by: dict[int, nn.Conv2d] = {}
    kept, pairs, handles = [], [], []

    def note_output(conv: nn.Module, _: tuple, output: Tensor) -> None:
        kept.append(output)  # alive, so that no other tensor gets its id
        made_by[id(output)] = conv

    def note_input(norm: nn.Module, inputs: tuple) -> None:
        conv = made_by.pop(id(inputs[0]), None)
        if conv is not None:
            pairs.append((conv, norm))

    for module in list(known_modules(encoder)):
        if isinstance(module, nn.Conv2d) and is_untouched(module):
            handles.append(module.register_forward_hook(note_output))
        elif is_plain(module, FrozenBatchNorm2d):
            handles.append(module.register_forward_pre_hook(note_input))
    try:
        encoder(image)
    finally:
        for handle in handles:
            handle.remove()
    return pairs


def _fold(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    """Scales the convolution's output channels and shifts its bias, computed in float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    weight = conv.weight.double() * scale[:, None, None, None]
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-6))
