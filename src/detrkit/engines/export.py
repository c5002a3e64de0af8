"""Models as files that other programs run: ONNX, and from it OpenVINO's own format.

The graph takes ``pixel_values`` (batch, channels, height, width), float32, and ``pixel_mask`` (batch, height,
width), int64, nonzero where pixels are real; batch, height and width are free. It gives ``logits`` and
``pred_boxes`` as the model does.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from detrkit.engines import EXPORTED_ENGINES
from detrkit.engines.exported import ExportedModel, Manifest, open_exported, runtime
from detrkit.engines.openvino_engine import convert
from detrkit.engines.torch_engine import fold_batch_norm
from detrkit.errors import DetrkitError, MissingExtraError, SettingError
from detrkit.files import atomic_folder
from detrkit.models.layers.backbone import ConvEncoder

# How far outputs may lie from PyTorch's, relative to the largest of them or to 1.
TOLERANCE = 1e-4

# The first operator set that has everything.
_OPSET = 18
# (batch, height, width) of the images that a graph is recorded with, and of those that it is checked with:
# large enough for the proposals of a two-stage model. The last image of a batch is padded.
_RECORDED = (2, 320, 416)
_CHECKED = ((1, 320, 416), (1, 397, 301), (3, 352, 289))


@dataclass(frozen=True, kw_only=True)
class Export:
    """A folder that ``export_model`` wrote.

    Attributes:
        folder: Where it is.
        differences: Output name -> largest absolute difference to PyTorch over all images of the check;
            empty where there was none.
    """

    folder: Path
    differences: dict[str, float]


def export_model(
    model: PreTrainedModel,
    output: str | os.PathLike[str],
    to: str,
    *,
    processor: Any = None,
    verify: bool = True,
) -> Export:
    """Exports a model into a folder that ``Detector.from_pretrained`` runs.

    Args:
        model: A detection model of detrkit, in float32 and as it was loaded: not prepared by an engine. It is
            left as it is.
        output: Folder to write: config.json, engine.json and the model's file, preprocessor_config.json too
            if there is a processor.
        to: "onnx" or "openvino".
        processor: The model's image processor.
        verify: Run the file, before it gets its name, on images of two sizes and on a padded batch, and
            compare with PyTorch.

    Raises:
        SettingError: There is no such format.
        MissingExtraError: Packages that this needs are not installed.
        DetrkitError: The exported model gives other results, or the folder cannot be written. Nothing of it
            is left then.
    """
    check_format(to)
    output = Path(output)
    model = _for_export(model)
    with atomic_folder(output) as folder:
        model.config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        onnx_file = folder / "model.onnx"
        _write_onnx(model, onnx_file)
        file = onnx_file
        if to == "openvino":
            file = folder / "model.xml"
            convert(onnx_file, file)
            onnx_file.unlink()
        Manifest(engine=to, file=file.name, outputs=_Graph.output_names).write(folder)
        differences = _compare(model, open_exported(folder, to, model.config)) if verify else {}
    return Export(folder=output, differences=differences)


def export_for_this_process(model: PreTrainedModel, engine: str) -> ExportedModel:
    """A model exported for an engine, whose file goes away with this process at the latest."""
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, folder, engine, verify=False)
        return open_exported(folder, engine, model.config)


def check_format(to: str) -> None:
    """Raises what is wrong with a format's name, or which extra it lacks.

    Raises:
        SettingError: There is no such format.
        MissingExtraError: Packages that the export needs are not installed.
    """
    if to not in EXPORTED_ENGINES:
        raise SettingError(f"cannot export to {to!r}; use one of: {', '.join(EXPORTED_ENGINES)}")
    runtime(to)
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise MissingExtraError("exporting a model", "export")


def _for_export(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without what only training needs."""
    model = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    model.config.auxiliary_loss = False
    for module in model.modules():
        if isinstance(module, ConvEncoder):
            fold_batch_norm(module)
    return model


class _Graph(nn.Module):
    """A model as a function from tensors to tensors.

    Attributes:
        output_names: Names of what it gives.
    """

    output_names = ("logits", "pred_boxes")

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        found = self.model(
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )
        return tuple(found[name] for name in self.output_names)


def _write_onnx(model: PreTrainedModel, path: Path) -> None:
    free = {
        "pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC),
        "pixel_mask": dict.fromkeys((0, 1, 2), torch.export.Dim.DYNAMIC),
    }
    graph = _Graph(model)
    with torch.no_grad(), _quiet():
        program = torch.export.export(graph, _images(model, *_RECORDED), dynamic_shapes=free, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(free),
            output_names=list(graph.output_names),
            opset_version=_OPSET,
            verbose=False,
        )
    exported.save(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks, which are about its own insides, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _images(model: PreTrainedModel, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Normalised images of noise and their mask; the last one of several is padded."""
    channels = model.config.num_channels
    pixels = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(batch, height, width, dtype=torch.long)
    if batch > 1:
        mask[-1, height - height // 4 :] = 0
        mask[-1, :, width - width // 3 :] = 0
    return pixels * mask[:, None], mask


@torch.no_grad()
def _compare(model: PreTrainedModel, exported: ExportedModel) -> dict[str, float]:
    """The largest difference between the two for each output.

    Raises:
        DetrkitError: It is too large.
    """
    graph = _Graph(model)
    differences = dict.fromkeys(graph.output_names, 0.0)
    for size in _CHECKED:
        pixels, mask = _images(model, *size)
        found = exported(pixels, mask)
        for name, expected in zip(graph.output_names, graph(pixels, mask)):
            difference = float((found[name] - expected).abs().max())
            # Written so that NaN is too large, too.
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise DetrkitError(
                    f"the exported model's {name} lie {difference:.1g} from PyTorch's on images of "
                    f"{size[1]}x{size[2]} pixels; nothing was written"
                )
            differences[name] = max(differences[name], difference)
    return differences
