"""What is asked about PyTorch without importing it: an exported model runs where it is not installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from detrkit.common.errors import MissingTorchError

if TYPE_CHECKING:
    import numpy as np
    import torch

# The packages of the full installation that an exported model does without.
FULL_INSTALLATION = frozenset(
    {"torch", "torchvision", "transformers", "timm", "safetensors", "huggingface_hub", "scipy", "triton"}
)


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def require_torch(feature: str) -> None:
    """Raises a MissingTorchError, which begins with the feature's name, where PyTorch is not installed."""
    if not has_torch():
        raise MissingTorchError(feature)


def explained(error: ImportError, feature: str) -> MissingTorchError | None:
    """What a failed import means: a package of the full installation is missing; None for anything else."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in FULL_INSTALLATION:
        return None
    return MissingTorchError(feature, "PyTorch" if package == "torch" or not has_torch() else package)


def is_tensor(value: object) -> TypeGuard[torch.Tensor]:
    """Whether a value is a tensor; there are none before somebody has imported PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    """The array itself, or that of a tensor on any device."""
    import numpy as np

    return value.cpu().numpy() if is_tensor(value) else np.asarray(value)


def thread_count() -> int:
    """How many threads compute: as PyTorch is set where it is in use, else as it would be.

    That is ``OMP_NUM_THREADS``, or a thread for each core that this process may use.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) else _cores()


def _cores() -> int:
    """Cores that this process may use; a core counts once where the system tells its threads apart."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = set()
    for number in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        try:
            cores.add(topology.read_text(encoding="ascii"))
        except OSError:
            return len(allowed)
    return len(cores) or 1
