"""Exported models in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from detrkit.errors import MissingExtraError

if TYPE_CHECKING:
    from detrkit.engines.exported import Run

# A graph made for one size is faster than the one for all, and takes a second or two to make: worth it for
# sizes that come again. Each holds the weights once more, so only those used last are kept.
_CALLS_BEFORE_A_GRAPH = 2
_GRAPHS_KEPT = 4


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
    core = openvino.Core()
    model = core.read_model(path)
    for_all_sizes = core.compile_model(model, "CPU", settings)
    for_one_size: OrderedDict[_Kind, Any] = OrderedDict()
    calls: Counter[_Kind] = Counter()

    def run(inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        inputs = dict(inputs)
        kind = _kind_of(inputs)
        if kind not in for_one_size:
            calls[kind] += 1
            if calls[kind] <= _CALLS_BEFORE_A_GRAPH:
                return for_all_sizes(inputs, share_inputs=True).to_tuple()
            for_one_size[kind] = core.compile_model(_specialised(model, inputs, kind), "CPU", settings)
            if len(for_one_size) > _GRAPHS_KEPT:
                for_one_size.popitem(last=False)
        for_one_size.move_to_end(kind)
        if not kind.padded:
            del inputs[_MASK]
        return for_one_size[kind](inputs, share_inputs=True).to_tuple()

    return run


_MASK = "pixel_mask"


class _Kind(NamedTuple):
    """What a graph for one size is made for.

    Attributes:
        shapes: Of all inputs.
        padded: Whether there are pixels that are not real, or a mask cannot tell.
    """

    shapes: tuple[tuple[int, ...], ...]
    padded: bool


def _kind_of(inputs: Mapping[str, np.ndarray]) -> _Kind:
    mask = inputs.get(_MASK)
    return _Kind(tuple(value.shape for value in inputs.values()), mask is None or not mask.all())


def _specialised(model: Any, inputs: Mapping[str, np.ndarray], kind: _Kind) -> Any:
    """A copy of a graph for inputs of this size; where nothing is padded, without their mask.

    What depends on sizes alone, such as embeddings of positions, is then computed once and for all.
    """
    import openvino

    model = model.clone()
    model.reshape({name: list(value.shape) for name, value in inputs.items()})
    if not kind.padded:
        mask = model.input(_MASK).get_node()
        everywhere = openvino.opset13.constant(inputs[_MASK])
        for reader in list(mask.output(0).get_target_inputs()):
            reader.replace_source_output(everywhere.output(0))
        model.remove_parameter(mask)
        model.validate_nodes_and_infer_types()
    return model
