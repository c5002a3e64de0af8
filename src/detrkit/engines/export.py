"""Models as files that other programs run: ONNX, and from it OpenVINO's own format.

The graph takes ``pixel_values`` (batch, channels, height, width), float32, and ``pixel_mask`` (batch, height,
width), int64, nonzero where pixels are real; batch, height and width are free. It gives ``logits`` and
``pred_boxes`` as the model does.

A model with masks also takes ``threshold``, a number, and gives ``pred_masks`` (batch, n, mask height, mask
width) of the n queries of each image that score above it, one at least, and ``query_indices`` (batch, n),
which tells their numbers. With a threshold of -1 these are all queries.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel

from detrkit.common.errors import DetrkitError, ImageError, MissingExtraError, SettingError
from detrkit.common.files import atomic_folder
from detrkit.common.quiet import quiet
from detrkit.common.text import first_line
from detrkit.engines import quantization
from detrkit.engines.exported import (
    ExportedModel,
    Manifest,
    PrivateFolder,
    graph_inputs,
    open_exported,
    runtime,
)
from detrkit.engines.names import EXPORTED_ENGINES, TRANSFORMERS_JS
from detrkit.engines.openvino_engine import convert
from detrkit.engines.own_copy import own_copy
from detrkit.engines.thin_images import pad_thin_images
from detrkit.engines.torch_engine import fold_batch_norm
from detrkit.models.layers.backbone import ConvEncoder
from detrkit.models.layers.plain import is_quantized
from detrkit.models.segmentation import SegmentationModel, best_queries, gather_rows
from detrkit.processing.images import load_image
from detrkit.results.detection_config import DetectionConfig

# How far outputs may lie from PyTorch's, relative to the largest of them or to 1.
TOLERANCE = 1e-4

# Loggers of the exporter.
TALKATIVE = ("onnxscript", "onnx_ir", "torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes")

# The first operator set that has everything.
OPSET = 18
# (batch, height, width) of the images that a graph is recorded with, and of those that it is checked with:
# large enough for the proposals of a two-stage model. The last image of a batch is padded.
_RECORDED = (2, 320, 416)
_CHECKED = ((1, 320, 416), (1, 397, 301), (3, 352, 289))


@dataclass(frozen=True, kw_only=True)
class Export:
    """A folder that ``export_model`` wrote.

    Attributes:
        folder: Where it is.
        differences: Output name -> largest absolute difference from PyTorch over all images of the check;
            empty without a check.
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
    calibration: Sequence[Any] | None = None,
    detection_config: DetectionConfig | None = None,
) -> Export:
    """Exports a model into a folder that ``Detector.from_pretrained`` runs.

    Args:
        model: A detection model of detrkit, in float32 and as it was loaded: not prepared by an engine. It is
            left as it is.
        output: Folder to write: config.json, engine.json and the model's file, preprocessor_config.json too
            if there is a processor.
        to: "onnx" or "openvino".
        processor: The model's image processor.
        verify: Run the file on images of two sizes and on a padded batch, and compare the outputs with
            PyTorch's before the folder gets its name.
        calibration: Makes it an int8 model (:mod:`detrkit.engines.quantization`), ranges measured on these
            images: of any kind that a ``Detector`` takes, and like those that the model is for. What is
            compared with PyTorch is the model before that.
        detection_config: The model's detection settings, which are stored with the exported one.

    Raises:
        SettingError: There is no such format, or it has no int8, or there are no images to calibrate with.
        ImageError: One of them cannot be read.
        MissingExtraError: Packages that this needs are not installed.
        DetrkitError: The exported model gives other results, or the folder cannot be written. Nothing of it
            is left then.
    """
    check_format(to, int8=calibration is not None)
    if calibration is not None and not len(calibration):
        raise SettingError("int8 requires images to calibrate with; pass some")
    if model.is_prepared:
        raise SettingError("a model that was prepared for inference cannot be exported: export the original")
    output = Path(output)
    model = _for_export(model)
    graph = (_Segmentation if isinstance(model, SegmentationModel) else _Detection)(model)
    with atomic_folder(output) as folder:
        model.config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        # Also the defaults: the folder may hold those of an earlier model.
        (detection_config or DetectionConfig()).save_pretrained(folder)
        onnx_file = folder / "model.onnx"
        _write_onnx(graph, onnx_file)
        least = max(m.find_sides()[1] for m in model.modules() if isinstance(m, ConvEncoder))
        if least > 1:
            pad_thin_images(onnx_file, least)
        file = onnx_file
        if to == "openvino":
            file = folder / "model.xml"
            convert(onnx_file, file)
        manifest = Manifest(engine=to, file=file.name, outputs=graph.outputs)
        manifest.write(folder)
        differences = _compare(graph, open_exported(folder, to, model.config)) if verify else {}
        if calibration is not None:
            for float32 in (file, file.with_suffix(".bin")):
                float32.unlink()  # not written over: the runtime may still have it mapped
            quantization.quantize(onnx_file, file, calibration, partial(_inputs, graph, processor))
            replace(manifest, precision="int8").write(folder)
        if file != onnx_file:
            onnx_file.unlink()
    return Export(folder=output, differences=differences)


def export_for_this_process(model: PreTrainedModel, engine: str) -> ExportedModel:
    """A model exported for an engine, whose file goes away with this process at the latest."""
    folder = PrivateFolder()
    export_model(model, folder.path, engine, verify=False)
    exported = open_exported(folder.path, engine, model.config)
    exported.graph.folder = folder  # a fork opens the file again
    return exported


def check_format(to: str, *, int8: bool = False) -> None:
    """Raises what is wrong with the name of a format, "onnx" or "openvino", or which extra it lacks.

    Raises:
        SettingError: There is no such format, or it has no int8.
        MissingExtraError: Packages that the export needs are not installed.
    """
    if to == TRANSFORMERS_JS:
        raise SettingError(f"to export for {to}, call export_for_transformers_js")
    if to not in EXPORTED_ENGINES:
        formats = ", ".join([*EXPORTED_ENGINES, TRANSFORMERS_JS])
        raise SettingError(f"cannot export to {to!r}; use one of: {formats}")
    if int8:
        if to != "openvino":
            raise SettingError(f"int8 is for OpenVINO only, not for {to!r}")
        quantization.check_installed()
    runtime(to)
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise MissingExtraError("exporting a model", "export")


def _for_export(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without what only training needs."""
    model = own_copy(model)
    if is_quantized(model):
        raise SettingError("a quantised model cannot be exported; export the model that it was made from")
    model = model.to("cpu", torch.float32).eval().requires_grad_(False)
    model.config.auxiliary_loss = False
    for module in model.modules():
        if isinstance(module, ConvEncoder):
            fold_batch_norm(module)
    return model


class _Detection(nn.Module):
    """A detector as a function from tensors to tensors; each input has its axes of free size."""

    inputs: ClassVar[dict[str, tuple[int, ...]]] = {"pixel_values": (0, 2, 3), "pixel_mask": (0, 1, 2)}
    outputs: ClassVar[tuple[str, ...]] = ("logits", "pred_boxes")

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
        return found["logits"], found["pred_boxes"]

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """Inputs: normalised images of noise and their mask; the last one of several is padded."""
        size = (batch, self.model.config.num_channels, height, width)
        pixels = torch.randn(size, generator=torch.Generator().manual_seed(0))
        mask = torch.ones(batch, height, width, dtype=torch.long)
        if batch > 1:
            mask[-1, height - height // 4 :] = 0
            mask[-1, :, width - width // 3 :] = 0
        return pixels * mask[:, None], mask


class _Segmentation(_Detection):
    """A model with masks, of which those of the best queries are computed."""

    inputs: ClassVar[dict[str, tuple[int, ...]]] = {**_Detection.inputs, "threshold": ()}
    outputs: ClassVar[tuple[str, ...]] = (*_Detection.outputs, "pred_masks", "query_indices")

    def forward(  # type: ignore[override]
        self, pixel_values: Tensor, pixel_mask: Tensor, threshold: Tensor
    ) -> tuple[Tensor, ...]:
        features, masks_of = self.model.features(pixel_values, pixel_mask)
        found = self.model.detector.read(features)
        # One at least, as not every program can convolve nothing.
        rows = best_queries(self.model.object_scores(found["logits"]), threshold, at_least=1)
        masks = masks_of(gather_rows(features.last_hidden_state, rows))
        return found["logits"], found["pred_boxes"], masks, rows

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        """As of a detector, and a threshold that all queries survive."""
        return *super().example(batch, height, width), torch.tensor(-1.0)


def _write_onnx(graph: _Detection, path: Path) -> None:
    free = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in graph.inputs.items()}
    with torch.no_grad(), quiet(*TALKATIVE):
        example = graph.example(*_RECORDED)
        program = torch.export.export(graph, example, dynamic_shapes=free, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(free),
            output_names=list(graph.outputs),
            opset_version=OPSET,
            verbose=False,
        )
    exported.save(path)


def _inputs(graph: _Detection, processor: Any, image: Any) -> dict[str, np.ndarray]:
    """The inputs of an exported graph for an image."""
    found = processor(images=[load_image(image)], return_tensors="pt")
    beyond = dict.fromkeys(list(graph.inputs)[2:], 1.0)  # a threshold that leaves one mask: they stay float32
    return graph_inputs(found["pixel_values"], found.get("pixel_mask"), **beyond)


@torch.no_grad()
def _compare(graph: _Detection, exported: ExportedModel) -> dict[str, float]:
    """The largest difference between the two for each output; a DetrkitError if it is too large."""
    differences = dict.fromkeys(graph.outputs, 0.0)
    for size in _CHECKED:
        example = graph.example(*size)
        try:
            arrays = exported.outputs(**dict(zip(graph.inputs, example)))
        except ImageError as error:  # whose advice is for users of an exported model
            raise DetrkitError(
                f"the exported model fails on images of {size[2]}x{size[1]} pixels "
                f"({first_line(error.__cause__ or error)}); nothing was written"
            ) from error
        found = {name: torch.from_numpy(value) for name, value in arrays.items()}
        wanted = dict(zip(graph.outputs, graph(*example)))
        if getattr(exported.config, "two_stage", False):
            found = _in_order_of(wanted, found)
        for name, expected in wanted.items():
            same_shape = found[name].shape == expected.shape
            difference = float((found[name] - expected).abs().max()) if same_shape else math.inf
            # Written so that NaN is too large, too.
            if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
                raise DetrkitError(
                    f"the exported model's {name} differ by {difference:.1g} from PyTorch's on images of "
                    f"{size[2]}x{size[1]} pixels; nothing was written"
                )
            differences[name] = max(differences[name], difference)
    return differences


def _in_order_of(expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The queries found in the order of those expected, as proposals of nearly one score change places."""
    names = ("logits", "pred_boxes")
    rows = [torch.cat([outputs[name] for name in names], dim=-1) for outputs in (expected, found)]
    if rows[0].shape != rows[1].shape:
        return found
    far = torch.cdist(*rows, p=math.inf).nan_to_num(nan=1e9, posinf=1e9)
    order = torch.stack([torch.as_tensor(linear_sum_assignment(image)[1]) for image in far])
    return {name: gather_rows(found[name], order) for name in names}
