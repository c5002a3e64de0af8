"""Exported models in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from detrkit.errors import MissingExtraError

if TYPE_CHECKING:
    from detrkit.engines.exported import Run


def check_installed() -> None:
    """Raises a MissingExtraError where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("the engine 'openvino'", "export")


def convert(onnx_file: Path, path: Path) -> None:
    """Writes an ONNX file as OpenVINO's pair of .xml and .bin, in the precision that it has."""
    import openvino

    # Not convert_model, which tells OpenVINO's makers of each use.
    openvino.save_model(openvino.Core().read_model(onnx_file), path, compress_to_fp16=False)


def load(path: Path) -> Run:
    """Opens OpenVINO's .xml or an ONNX file, to run on as many threads as PyTorch does.

    Raises:
        RuntimeError: OpenVINO cannot read the file.
    """
    import openvino

    settings = {
        # Where a CPU has bfloat16, OpenVINO would use it for a float32 model.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        return compiled(dict(inputs), share_inputs=True).to_tuple()

    return run
