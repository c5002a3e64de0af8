"""Exported models in onnxruntime, on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from detrkit.common.errors import MissingExtraError
from detrkit.common.without_torch import thread_count

if TYPE_CHECKING:
    from detrkit.engines.exported import Run


def check_installed() -> None:
    """Raises a MissingExtraError where onnxruntime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError("the engine 'onnx'", "export", package="onnxruntime")


def load(path: Path) -> Run:
    """Opens an ONNX file, to run on as many threads as PyTorch does.

    Raises:
        RuntimeError: onnxruntime cannot read the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_count()
    options.log_severity_level = 3  # errors; it warns of every size that differs from the last one
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # classes of its own, which have no public base
        raise RuntimeError(str(error)) from error

    def run(inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        return session.run(None, dict(inputs))

    return run
