"""CUDA graphs: forward passes that a GPU replays without waiting for Python.

At batch 1 a detector is bound by the launches of its few hundred small kernels, not by their arithmetic. A
CUDA graph records these launches once for a shape of the inputs and replays them in one call.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from detrkit.common.log import logger

# A graph holds the addresses of all its activations; memory is shared, but each takes some time to record.
GRAPHS_KEPT = 16
# Recording takes as long as several eager passes, so a shape must come back before it gets a graph.
EAGER_CALLS = 3

_PLAIN = (type(None), bool, int, float, str)

_Arguments: TypeAlias = dict[str | int, Any]
_Key: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class _Recording:
    """A recorded pass: what it reads and writes whenever it is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str | int, Tensor]
    outputs: list[Any]  # leaves of what the pass returns
    structure: TreeSpec

    def replay(self, arguments: _Arguments) -> Any:
        for name, held in self.inputs.items():
            held.copy_(arguments[name], non_blocking=True)
        self.graph.replay()
        # The next replay overwrites what this one gives.
        leaves = [leaf.clone() if torch.is_tensor(leaf) else leaf for leaf in self.outputs]
        return tree_unflatten(leaves, self.structure)


class GraphedForward:
    """A module's forward pass for inference on a GPU, replayed for shapes that recur.

    A pass runs as written where a recording could be wrong: with gradients, in training mode, under autocast,
    with hooks on inner modules, on other streams, with arguments other than tensors and plain values. Weights
    may be moved, but modules must not be replaced afterwards.

    Args:
        module: The module that the pass belongs to.
        forward: The pass, such as ``module.forward`` or its compiled form.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        self._forward = forward
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._calls: Counter[_Key] = Counter()
        self._recordings: OrderedDict[_Key, _Recording] = OrderedDict()
        self._pool: Any = None
        self._refused = False
        # Of the module, which a copy has only later: its tensors, and the hooks of inner modules.
        self._weights: list[Tensor] = []
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Recordings belong to a process and its GPU; a copy starts without."""
        return {"_module": self._module, "_forward": self._forward}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs or replays the pass."""
        arguments = _by_name(args, kwargs)
        key = self._key(arguments)
        if key is None or self._refused:
            return self._forward(*args, **kwargs)
        with self._lock, torch.cuda.device(self._weights[0].device):
            recording = self._recordings.get(key)
            if recording is None:
                self._calls[key] += 1
                if self._calls[key] > EAGER_CALLS:
                    recording = self._record(key, args, kwargs)
            if recording is not None:
                self._recordings.move_to_end(key)
                return recording.replay(arguments)
        return self._forward(*args, **kwargs)

    def _key(self, arguments: _Arguments) -> _Key | None:
        """What a recording depends on; None where the pass must run as written."""
        if torch.is_grad_enabled() or self._module.training or torch.is_autocast_enabled("cuda"):
            return None
        if not self._weights:
            self._weights = [*self._module.parameters(), *self._module.buffers()]
            _, *inner = self._module.modules()
            self._hooks = [hooks for m in inner for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        weight = self._weights[0]
        stream = torch.cuda.current_stream(weight.device) if weight.is_cuda else None
        if (
            stream is None
            or stream != torch.cuda.default_stream(weight.device)
            or torch.cuda.is_current_stream_capturing()
            or any(self._hooks)
        ):
            return None
        # A recording reads addresses: a model that went to the CPU and came back may have some of them only.
        key: list[Any] = [tuple(map(Tensor.data_ptr, self._weights)), weight.dtype]
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                if value.device != weight.device:
                    return None
                key.append((name, value.shape, value.dtype))
            elif isinstance(value, _PLAIN):
                key.append((name, value))
            else:
                return None
        return tuple(key)

    def _record(self, key: _Key, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Recording | None:
        """Records a pass on copies of the arguments; None, for good, if the module cannot be recorded."""
        held_args = tree_map_only(Tensor, torch.clone, list(args))
        held_kwargs = tree_map_only(Tensor, torch.clone, kwargs)
        held = _by_name(held_args, held_kwargs)
        inputs = {name: value for name, value in held.items() if torch.is_tensor(value)}
        graph = torch.cuda.CUDAGraph()
        try:
            with _fastest_convolutions():
                self._forward(*held_args, **held_kwargs)  # loads and chooses what is then recorded
                recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
                with _restored_on_failure(), recording:
                    outputs = self._forward(*held_args, **held_kwargs)
            leaves, structure = tree_flatten(outputs)
            if not all(isinstance(leaf, _PLAIN) or torch.is_tensor(leaf) for leaf in leaves):
                raise RuntimeError("its output is of a type whose tensors cannot be found")
        except RuntimeError as error:
            name = type(self._module).__name__
            logger.warning("%s runs without CUDA graphs: %s", name, str(error).strip().partition("\n")[0])
            self._refused = True
            self._recordings.clear()
            return None
        self._pool = graph.pool()
        self._recordings[key] = _Recording(graph, inputs, leaves, structure)
        if len(self._recordings) > GRAPHS_KEPT:
            dropped, _ = self._recordings.popitem(last=False)
            del self._calls[dropped]  # it must recur again to get another
        return self._recordings[key]


@contextmanager
def _restored_on_failure() -> Iterator[None]:
    """Undoes what a failed recording leaves behind: its stream, and a random generator that waits for it."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    spare = generator.clone_state()
    with torch.cuda.stream(torch.cuda.current_stream()):
        try:
            yield
        except RuntimeError:
            generator.graphsafe_set_state(spare)
            raise


def _by_name(args: Sequence[Any], kwargs: dict[str, Any]) -> _Arguments:
    """Arguments by their position or name."""
    named: _Arguments = dict(enumerate(args))
    named.update(kwargs)
    return named


@contextmanager
def _fastest_convolutions() -> Iterator[None]:
    """Has cuDNN try its algorithms, which pays where the choice is replayed many times."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def replay_recurring(module: nn.Module, forward: Callable[..., Any] | None = None) -> None:
    """Has a module's forward pass recorded as CUDA graphs, in place.

    Args:
        module: The module.
        forward: What runs as its forward pass, such as a compiled form; by default its own.
    """
    module.forward = GraphedForward(module, forward or module.forward)
