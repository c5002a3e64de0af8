"""int8: exported detectors whose large layers multiply 8-bit integers (post-training quantisation, NNCF).

int8 become the convolutions of backbone and input projection and the large matrix products of encoder and
decoder, which take nearly all of the time. What says where and what an object is stays in float32: heads,
proposals, positions, offsets and weights of sampled points, softmax, layer norms, and the mask head.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from detrkit.common.errors import MissingExtraError
from detrkit.common.quiet import quiet

# Modules, by their path in the model, whose layers become int8.
_QUANTIZED = re.compile(
    r"(^|\.)(backbone\.conv_encoder|input_projection|input_proj|"
    r"(encoder|decoder)\.layers\.\d+\.(fc1|fc2|(sa|ca)_(qcontent|kcontent|v)_proj|"
    r"\w+\.(value_proj|output_proj|[qkv]_proj|out_proj)))(\.|$)"
)


def check_installed() -> None:
    """Raises a MissingExtraError where NNCF is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise MissingExtraError("int8", "export")


def quantize(
    onnx_file: Path,
    path: Path,
    samples: Sequence[Any],
    feed: Callable[[Any], Mapping[str, np.ndarray]],
) -> None:
    """Writes an ONNX file of detrkit, with the modules' names in it, as OpenVINO's .xml and .bin, in int8.

    Args:
        onnx_file: What ``export_model`` wrote.
        path: The .xml file.
        samples: What the ranges of the activations are measured on.
        feed: Gives the graph's inputs for a sample.
    """
    import openvino

    nncf = _nncf()
    model = openvino.Core().read_model(onnx_file)
    modules = _modules(onnx_file)
    float32 = [name for name in _names(model) if not _QUANTIZED.search(modules.get(name.split("/")[0], ""))]
    # Its progress bars would go to stdout.
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with quiet("nncf"), redirect_stdout(bars):
        quantized = nncf.quantize(
            model,
            nncf.Dataset(samples, feed),
            subset_size=len(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            ignored_scope=nncf.IgnoredScope(names=float32, validate=False),
        )
    openvino.save_model(quantized, path, compress_to_fp16=False)


def _nncf() -> ModuleType:
    # NNCF would tell its makers of each use, which is not for a library that another one calls to decide.
    os.environ.setdefault("NNCF_CI", "1")
    with quiet("torch.utils.cpp_extension"):
        import nncf
    return nncf


def _modules(onnx_file: Path) -> dict[str, str]:
    """Name of each node -> path of the module that it was recorded in."""
    import onnx

    found = {}
    for node in onnx.load(onnx_file, load_external_data=False).graph.node:
        for entry in node.metadata_props:
            if entry.key == "pkg.torch.onnx.name_scopes":
                found[node.name] = ast.literal_eval(entry.value)[-2]  # the last one is the node's own
    return found


def _names(model: Any) -> Iterator[str]:
    """Names of all that computes in a model of OpenVINO."""
    for node in model.get_ops():
        if node.get_type_name() not in ("Constant", "Parameter", "Result"):
            yield node.get_friendly_name()
