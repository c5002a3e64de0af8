"""Where an engine runs, and in which type."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from detrkit.common.errors import SettingError
from detrkit.engines.names import EXPORTED_ENGINES

if TYPE_CHECKING:
    import torch

_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


Device: TypeAlias = "str | torch.device"
Dtype: TypeAlias = "str | torch.dtype"


def is_cuda(device: Device) -> bool:
    """Whether a device is a CUDA GPU."""
    return str(device).startswith("cuda")


def place(engine: str, device: Device | None, dtype: Dtype | None) -> tuple[Device, Dtype]:
    """Where an engine runs and in which type, checked to be possible; names for the exported engines."""
    if engine not in EXPORTED_ENGINES:
        return _torch_device(device), _torch_dtype(dtype)
    on_cpu = device is None or str(device) == "cpu"
    if not on_cpu or (dtype is not None and str(dtype) not in ("float32", "fp32", "torch.float32")):
        raise SettingError(f"the engine {engine!r} runs on the device 'cpu' and in 'float32' only")
    return "cpu", "float32"


def _torch_device(device: Device | None) -> torch.device:
    """The device asked for, or the default one; checked to be there."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingError(f"unknown device {device!r}; use 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"device '{found}' is not available: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device 'mps' is not available on this machine; use 'cpu'")
    return found


def _torch_dtype(dtype: Dtype | None) -> torch.dtype:
    import torch

    if dtype is None:
        return torch.float32
    for name, short in _DTYPES.items():
        if dtype in (getattr(torch, name), name, short):
            return getattr(torch, name)
    raise SettingError(f"unknown dtype {str(dtype)!r}; use 'float32', 'float16' or 'bfloat16'")
