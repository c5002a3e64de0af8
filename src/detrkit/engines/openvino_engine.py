"""Exported models in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
import math
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from detrkit.common.errors import MissingExtraError
from detrkit.common.without_torch import thread_count

if TYPE_CHECKING:
    from detrkit.engines.exported import Run

# A graph made for one size saves about a fifth of the time of the one for all, takes a second or two to make,
# and holds the weights once more.
_SAVED = 0.2
_GRAPHS_KEPT = 4
_SIZES_KEPT = 1000  # of which it is known how often they came

# What the graph for all sizes prepares for a size, it keeps: 5000 operators of each kind by default, which is
# all of hundreds of sizes. One size takes about a hundred.
_OPERATORS_KEPT = {"CPU_RUNTIME_CACHE_CAPACITY": 256}


def check_installed() -> None:
    """Raises a MissingExtraError where OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise MissingExtraError("the engine 'openvino'", "export", package="openvino")


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
        "INFERENCE_NUM_THREADS": thread_count(),
    }
    core = openvino.Core()
    with suppress(RuntimeError):  # a setting that OpenVINO does not document
        core.set_property("CPU", _OPERATORS_KEPT)
    model = core.read_model(path)
    graphs = _Graphs(lambda specialised: core.compile_model(specialised, "CPU", settings), model)
    return graphs.run


class _Graphs:
    """A graph for all sizes, and some for one size each.

    The first size that comes a third time gets a graph of its own at once: often it is the only one. Another
    size gets one when that would have paid: when what it would have saved is what making one takes. So a
    folder of images of all sizes never takes more than twice the time it could. OpenVINO cannot
    compile a graph for some thin sizes; images of these sizes keep using the one for all sizes.
    """

    def __init__(self, compile_graph: Callable[[Any], Any], model: Any) -> None:
        self._compile, self._model = compile_graph, model
        self._for_all_sizes = compile_graph(model)
        self._for_one_size: OrderedDict[_Kind, Any] = OrderedDict()
        self._calls: Counter[_Kind] = Counter()
        self._seconds: defaultdict[_Kind, float] = defaultdict(float)  # spent in the graph for all sizes
        self._to_make: float = 0.0  # seconds that the last graph took

    def run(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        inputs = dict(inputs)
        kind = _kind_of(inputs)
        graph = self._graph(kind, inputs) if kind in self._for_one_size or self._pays(kind) else None
        if graph is None:
            started = time.perf_counter()
            outputs = self._for_all_sizes(inputs, share_inputs=True).to_tuple()
            self._count(kind, time.perf_counter() - started)
            return outputs
        if not kind.padded:
            del inputs[_MASK]
        return graph(inputs, share_inputs=True).to_tuple()

    def _count(self, kind: _Kind, seconds: float) -> None:
        self._calls[kind] += 1
        self._seconds[kind] += seconds
        for oldest in list(self._calls)[:-_SIZES_KEPT]:
            self._calls.pop(oldest, None)
            self._seconds.pop(oldest, None)

    def _pays(self, kind: _Kind) -> bool:
        return self._calls[kind] > 1 and self._seconds[kind] * _SAVED >= self._to_make

    def _graph(self, kind: _Kind, inputs: Mapping[str, np.ndarray]) -> Any | None:
        if kind not in self._for_one_size:
            started = time.perf_counter()
            try:
                self._for_one_size[kind] = self._compile(_specialised(self._model, inputs, kind))
            except RuntimeError:  # pooling over less than its window is checked for fixed sizes only
                self._seconds[kind] = -math.inf  # it will never pay
                return None
            self._to_make = time.perf_counter() - started
            if len(self._for_one_size) > _GRAPHS_KEPT:
                left, _ = self._for_one_size.popitem(last=False)
                self._seconds.pop(left, None)  # it has to earn the next one again
        self._for_one_size.move_to_end(kind)
        return self._for_one_size[kind]


_MASK = "pixel_mask"


class _Kind(NamedTuple):
    """What a graph for one size is made for."""

    shapes: tuple[tuple[int, ...], ...]  # of all inputs
    padded: bool  # whether there are pixels that are not real, or a mask cannot tell


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
