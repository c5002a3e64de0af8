"""Models that have left PyTorch: how a folder says what it holds, and how one is run."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np

from detrkit.common.errors import CheckpointError, ImageError
from detrkit.common.screening import is_plain_name, read_model_json
from detrkit.common.text import first_line
from detrkit.common.without_torch import is_tensor
from detrkit.engines.interface import ModelConfig
from detrkit.engines.names import EXPORTED_ENGINES

MANIFEST = "engine.json"

# From a graph's inputs by name to its outputs in their order.
Run = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``engine.json`` in the folder of an exported model says.

    Attributes:
        engine: The engine that the model was exported for.
        file: Name of the model's file in the folder.
        outputs: Names of what the graph gives, in its order.
        precision: "float32", or "int8" where large layers are quantised.
    """

    engine: str
    file: str
    outputs: Sequence[str]
    precision: str = "float32"

    @property
    def has_masks(self) -> bool:
        """Whether the model gives masks."""
        return "pred_masks" in self.outputs

    def write(self, folder: Path) -> None:
        """Writes the manifest into a folder."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """The manifest of a folder; None where it contains no exported model, or is none.

    Raises:
        CheckpointError: The manifest cannot be read.
    """
    path = Path(folder) / MANIFEST
    if not os.path.lexists(path):
        return None
    try:
        content = read_model_json(path, "export the model again")
        manifest = Manifest(**{name: content[name] for name in ("engine", "file", "outputs", "precision")})
        if manifest.engine not in EXPORTED_ENGINES:
            raise ValueError(f"unknown engine {manifest.engine!r}")
        if not is_plain_name(manifest.file):
            raise ValueError(f"{manifest.file!r} is not the name of a file in the folder")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; export the model again") from error
    return manifest


def runtime(engine: str) -> ModuleType:
    """The module that runs models for an exported engine: its ``load`` opens a file.

    Raises:
        MissingExtraError: The engine's package is not installed.
    """
    from detrkit.engines import onnx_engine, openvino_engine

    module = {"onnx": onnx_engine, "openvino": openvino_engine}[engine]
    module.check_installed()
    return module


def graph_inputs(pixel_values: Any, pixel_mask: Any = None, **inputs: float) -> dict[str, np.ndarray]:
    """A graph's inputs: images, their mask (nothing is padded without one) and the numbers beyond.

    Images and mask are arrays or tensors on the CPU.
    """
    pixels = np.asarray(pixel_values)
    if pixel_mask is None:
        pixel_mask = np.ones((len(pixels), *pixels.shape[-2:]), np.int64)
    images = {"pixel_values": pixels, "pixel_mask": np.asarray(pixel_mask, np.int64)}
    return images | {name: np.array(float(value), np.float32) for name, value in inputs.items()}


class Graph:
    """The graph of a file in its runtime, with threads that only the process has that opened it.

    A forked process opens the file again. Copies share the graph, which does not change; a pickle holds the
    file.

    Attributes:
        folder: The file's folder, if it goes away with the graph.
    """

    def __init__(self, engine: str, path: Path) -> None:
        self._engine, self._path = engine, path
        self.folder: PrivateFolder | None = None
        self._open()

    def _open(self) -> None:
        self._run: Run = runtime(self._engine).load(self._path)
        self._process = os.getpid()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
        """The outputs, in their order, for inputs by name."""
        if os.getpid() != self._process:
            # What the parent opened is never closed here: that would wait for threads which do not exist.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._run))
            self._open()
        try:
            return self._run(inputs)
        except Exception as error:  # of classes that differ from runtime to runtime
            height, width = inputs["pixel_values"].shape[-2:]
            raise ImageError(
                f"the exported model does not take an image of {width}x{height} pixels, as resized "
                f"({first_line(error)}); pad the image, or use the engine 'torch'"
            ) from error

    def __deepcopy__(self, memo: dict[int, object]) -> Graph:
        return self

    def __getstate__(self) -> dict[str, Any]:
        parts = (self._path, self._path.with_suffix(".bin"), self._path.with_name(self._path.name + ".data"))
        files = {part.name: part.read_bytes() for part in parts if part.is_file()}
        return {"engine": self._engine, "name": self._path.name, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder = PrivateFolder()
        for name, content in state["files"].items():
            (self.folder.path / name).write_bytes(content)
        self._engine, self._path = state["engine"], self.folder.path / state["name"]
        self._open()


class PrivateFolder:
    """A new folder, ``path``, that goes away with this object, or with this process at the latest."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="detrkit-"))
        weakref.finalize(self, _remove, self.path, os.getpid())


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # and not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


Outputs: TypeAlias = Any
"""Arrays by name, or the output of a model of detrkit where the images were a tensor."""


class ExportedModel:
    """An exported model, called as a model of detrkit is, with arrays or with tensors on the CPU.

    The outputs of ``graph`` have the names in ``outputs``.
    """

    def __init__(self, graph: Graph, outputs: Sequence[str], config: ModelConfig) -> None:
        self.config = config
        self.graph = graph
        self._names = outputs

    def __call__(self, pixel_values: Any, pixel_mask: Any = None) -> Outputs:
        """Detects objects; arguments as of :class:`~detrkit.engines.interface.RunnableModel`."""
        return _as_given(pixel_values, self.outputs(pixel_values, pixel_mask))

    def outputs(self, pixel_values: Any, pixel_mask: Any = None, **inputs: float) -> dict[str, np.ndarray]:
        """The graph's outputs by name, of what a call takes and the inputs that the graph has beyond."""
        found = self.graph(graph_inputs(pixel_values, pixel_mask, **inputs))
        return dict(zip(self._names, found))


class ExportedSegmenter(ExportedModel):
    """An exported model with masks, which it computes only for queries that score above a threshold."""

    def __call__(self, pixel_values: Any, pixel_mask: Any = None) -> Outputs:
        """Detects objects and gives the masks of all queries; memory grows with their number."""
        found = self.outputs(pixel_values, pixel_mask, threshold=-1.0)
        return _as_given(pixel_values, {name: found[name] for name in ("logits", "pred_boxes", "pred_masks")})

    def detector(self, pixel_values: Any, pixel_mask: Any = None) -> Outputs:
        """Detects objects without masks; arguments as of a call."""
        # The graph always computes the best query's mask, which takes little beside the rest.
        found = self.outputs(pixel_values, pixel_mask, threshold=1.0)
        return _as_given(pixel_values, {name: found[name] for name in ("logits", "pred_boxes")})

    def segment(self, pixel_values: Any, pixel_mask: Any = None, threshold: float = 0.85) -> Outputs:
        """See :meth:`detrkit.models.segmentation.SegmentationModel.segment`; gives one query at least."""
        found = self.outputs(pixel_values, pixel_mask, threshold=threshold)
        rows = found["query_indices"]
        for name in ("logits", "pred_boxes"):
            found[name] = np.take_along_axis(found[name], rows[..., None], axis=1)
        return _as_given(pixel_values, found)


def _as_given(pixel_values: object, found: dict[str, np.ndarray]) -> Outputs:
    """Outputs of the kind that the images are of."""
    if not is_tensor(pixel_values):
        return found
    from detrkit.engines.tensors import as_output

    return as_output(found)


def open_exported(
    folder: str | os.PathLike[str], engine: str, config: ModelConfig, manifest: Manifest | None = None
) -> ExportedModel:
    """Opens the model in a folder for an engine; OpenVINO also runs what was exported for onnxruntime.

    ``manifest`` is the folder's, if it has been read before.

    Raises:
        CheckpointError: The folder contains no exported model, an unreadable one, or one not for ``engine``.
        MissingExtraError: The engine's package is not installed.
    """
    manifest = manifest or read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{os.fspath(folder)} contains no exported model")
    if engine != manifest.engine and (engine, manifest.engine) != ("openvino", "onnx"):
        raise CheckpointError(
            f"{os.fspath(folder)} contains a model exported for the engine {manifest.engine!r}, which "
            f"{engine!r} cannot run; leave out the engine, or pass the original model"
        )
    path = Path(folder) / manifest.file
    try:
        graph = Graph(engine, path)
    except (RuntimeError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {first_line(error)}; export the model again") from error
    model_class = ExportedSegmenter if manifest.has_masks else ExportedModel
    return model_class(graph, manifest.outputs, config)
