"""The graph of an ONNX export with what transformers.js cannot do before and behind it.

Every part has a prefix of its own before the names of its values: ``size/`` the rule for the size of a
resized image, ``model/`` the exported model, ``reading/`` what makes rows of its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import detrkit
from detrkit.common.quiet import quiet
from detrkit.engines.export import OPSET, TALKATIVE
from detrkit.models.segmentation import gather_rows
from detrkit.processing.image_processor import DetrImageProcessorBase
from detrkit.processing.options import Settings

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MASK_THRESHOLD = 0.5
"""Models with masks compute those of queries that score higher: transformers.js's own default threshold."""

# At least so many classes are in the logits. An object is found if its score is above one in so many: the
# rest of the probability is shared out among the others, none of which may then have more.
_LEAST_CLASSES = 100

# Name -> an example and its axes of free size.
_Inputs = Mapping[str, tuple[Tensor, Sequence[int]]]


# The parts, as PyTorch has them


class Reading(nn.Module):
    """A detector's outputs as rows that transformers.js reads as detrkit does."""

    inputs: ClassVar[tuple[str, ...]] = ("logits", "pred_boxes")

    def __init__(self, processor: DetrImageProcessorBase, queries: int, classes: int) -> None:
        super().__init__()
        self.processor = processor
        self.limit = processor.object_limit(queries)
        self.classes = classes

    def forward(self, logits: Tensor, pred_boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, n, entries) and boxes (batch, n, 4) of n candidates, cxcywh."""
        found = self.processor.candidates({"logits": logits, "pred_boxes": pred_boxes}, self.limit)
        return as_logits(found.scores, found.labels, self.classes), gather_rows(pred_boxes, found.queries)


class MaskReading(Reading):
    """The same of a model with masks: one row for each query that has a mask."""

    inputs: ClassVar[tuple[str, ...]] = (*Reading.inputs, "query_indices")

    def forward(  # type: ignore[override]
        self, logits: Tensor, pred_boxes: Tensor, query_indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Reading.forward`."""
        probabilities, is_object = self.processor.query_probabilities(logits)
        scores, labels = probabilities.max(-1)
        rows = as_logits(scores * is_object, labels, self.classes)
        return gather_rows(rows, query_indices), gather_rows(pred_boxes, query_indices)


def as_logits(scores: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Logits (batch, n, entries) whose softmax has a score (batch, n) as its greatest, at the label.

    The last entry is "no object", and is the greatest where the score is not above one in ``entries``.
    Entries beyond the classes only have a share of the rest.
    """
    entries = max(classes, _LEAST_CLASSES) + 1
    places = torch.arange(entries)
    score = scores[..., None]
    shared = (1 - score) / (entries - 1)
    alone = (1 - score) * (places == entries - 1)
    others = torch.where(score > 1 / entries, shared, alone)
    return torch.where(labels[..., None] == places, score, others).clamp(min=1e-30).log()


class SizeRule(nn.Module):
    """:func:`~detrkit.processing.resize.size_for` on a tensor, for a processor's ``size``.

    In whole numbers, as onnxruntime in browsers has no float64. By the edges the result is the same. The
    other rules multiply by a factor that float64 rounds, and can differ by a pixel where that is all that
    tells two lengths apart.
    """

    def __init__(self, size: Mapping[str, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, sides: Tensor) -> Tensor:
        """(height, width), int64, of the resized image, of those of the image."""
        size = self.size
        if "height" in size:
            return torch.tensor([size["height"], size["width"]]) + 0 * sides
        height, width = sides[0], sides[1]
        short, long = torch.minimum(height, width), torch.maximum(height, width)
        if "max_height" in size:
            by_height = size["max_height"] * width <= size["max_width"] * height
            most = torch.where(by_height, size["max_height"], size["max_width"])
            return _quotient(sides * most, torch.where(by_height, height, width)).clamp(min=1)
        if "shortest_edge" not in size:
            return _rounded(sides * size["longest_edge"], long).clamp(min=1)
        new_short = torch.full_like(short, size["shortest_edge"])
        longest = size.get("longest_edge")
        if longest is not None:
            too_long = long * new_short > longest * short
            new_short = torch.where(too_long, _rounded(longest * short, long), new_short)
        new_long = _quotient(new_short * long, short)
        if longest is not None:
            new_long = torch.where(new_short < 1, longest, new_long)
        is_short = torch.stack([height <= width, height > width])
        return torch.where(is_short, new_short.clamp(min=1), new_long)


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of positive whole numbers, rounded down."""
    return torch.div(numerator, denominator, rounding_mode="trunc")


def _rounded(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient of positive whole numbers, rounded to the nearest one, halves to the even one."""
    below = _quotient(numerator, denominator)
    twice = 2 * (numerator - below * denominator)
    is_odd = below - 2 * _quotient(below, torch.full_like(below, 2))
    return below + torch.where(twice == denominator, is_odd, (twice > denominator).long())


# The graph


def reading_for(processor: DetrImageProcessorBase, plain: ModelProto) -> Reading:
    """The reading for an exported model."""
    queries, width = _logits_shape(plain)
    classes = processor.query_probabilities(torch.zeros(1, queries, width))[0].shape[-1]
    has_masks = any(output.name == "pred_masks" for output in plain.graph.output)
    return (MaskReading if has_masks else Reading)(processor, queries, classes)


def joined(plain: ModelProto, reading: Reading, settings: Settings) -> ModelProto:
    """An exported model that takes bytes of images, as float32, and whose outputs transformers.js reads."""
    from onnx import compose, helper, numpy_helper

    has_masks = "query_indices" in reading.inputs
    behind = _recorded_reading(reading, plain)
    plain = compose.add_prefix(plain, "model/")
    front, tensors = _front(settings)
    if has_masks:
        threshold = np.array(MASK_THRESHOLD, np.float32)
        tensors.append(numpy_helper.from_array(threshold, "model/threshold"))
    nodes = [
        *front,
        *plain.graph.node,
        *(_node("Identity", f"model/{name}", f"reading/{name}") for name in reading.inputs),
        *behind.graph.node,
        _node("Identity", "reading/rows", "logits"),
        _node("Identity", "reading/boxes", "pred_boxes"),
        *([_node("Identity", "model/pred_masks", "pred_masks")] if has_masks else []),
    ]
    shapes: dict[str, list[str | int | None]] = {
        "pixel_values": ["batch", 3, "height", "width"],
        "logits": ["batch", "rows", None],
        "pred_boxes": ["batch", "rows", 4],
        **({"pred_masks": ["batch", "rows", "mask_height", "mask_width"]} if has_masks else {}),
    }
    float32 = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    [images, *found] = [helper.make_tensor_value_info(name, float32, shape) for name, shape in shapes.items()]
    tensors = [*tensors, *plain.graph.initializer, *behind.graph.initializer]
    used = set(_names(nodes))  # runtimes warn of others
    tensors = [tensor for tensor in tensors if tensor.name in used]
    return helper.make_model(
        helper.make_graph(nodes, "detrkit", [images], found, tensors),
        opset_imports=plain.opset_import,
        ir_version=plain.ir_version,
        producer_name="detrkit",
        producer_version=detrkit.__version__,
    )


def _front(settings: Settings) -> tuple[list[NodeProto], list[Any]]:
    """What makes the model's inputs of an image's bytes, and its constants."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, tensors = [], []

    def constant(name: str, values: Sequence[float], kind: type) -> None:
        shape = (1, -1, 1, 1) if kind is np.float32 else -1
        tensors.append(numpy_helper.from_array(np.array(values, kind).reshape(shape), f"js/{name}"))

    last = "pixel_values"
    if settings.size is not None:
        inputs: _Inputs = {"sides": (torch.tensor([480, 640]), [])}
        rule = _recorded(SizeRule(settings.size), inputs, ["size"], "size/")
        tensors += rule.graph.initializer
        nodes += [
            _node("Shape", last, "size/sides", start=2),
            *rule.graph.node,
            _node("Shape", last, "js/batch", end=2),
            _node("Concat", "js/batch size/size", "js/resized", axis=0),
            # Of bytes, as Pillow does it: rounded to bytes after the rows and after the columns.
            _node("Cast", last, "js/bytes", to=TensorProto.UINT8),
            _node("Resize", "js/bytes - - js/resized", "js/small", mode="linear", antialias=1),
            _node("Cast", "js/small", "js/pixels", to=TensorProto.FLOAT),
        ]
        last = "js/pixels"
    if settings.scaling is not None:
        constant("scale", settings.scaling.scale, np.float32)
        constant("bias", settings.scaling.bias, np.float32)
        nodes += [
            _node("Mul", f"{last} js/scale", "js/scaled"),
            _node("Add", "js/scaled js/bias", "js/shifted"),
        ]
        last = "js/shifted"
    constant("axes", [0, 2, 3], np.int64)
    one = helper.make_tensor("js/one", TensorProto.INT64, [1], [1])
    nodes += [
        _node("Identity", last, "model/pixel_values"),
        _node("Shape", last, "js/shape"),
        _node("Gather", "js/shape js/axes", "js/sides"),
        _node("ConstantOfShape", "js/sides", "model/pixel_mask", value=one),
    ]
    return nodes, tensors


def _recorded_reading(reading: Reading, plain: ModelProto) -> ModelProto:
    queries, width = _logits_shape(plain)
    inputs: _Inputs = {
        "logits": (torch.zeros(2, queries, width), [0]),
        "pred_boxes": (torch.zeros(2, queries, 4), [0]),
        "query_indices": (torch.zeros(2, 3, dtype=torch.int64), [0, 1]),
    }
    taken = {name: inputs[name] for name in reading.inputs}
    return _recorded(reading, taken, ["rows", "boxes"], "reading/")


def _recorded(module: nn.Module, inputs: _Inputs, outputs: Sequence[str], prefix: str) -> ModelProto:
    """A module as a graph with a prefix before all names."""
    from onnx import compose

    shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _, axes in inputs.values())
    example = tuple(tensor for tensor, _ in inputs.values())
    with torch.no_grad(), quiet(*TALKATIVE):
        program = torch.export.export(module, example, dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
        )
    return compose.add_prefix(exported.model_proto, prefix)


def _logits_shape(plain: ModelProto) -> tuple[int, int]:
    """Queries and last axis of an exported model's logits."""
    [logits] = [output for output in plain.graph.output if output.name == "logits"]
    _, queries, width = logits.type.tensor_type.shape.dim
    return queries.dim_value, width.dim_value


def _names(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """The names of all values that nodes read, those of graphs inside them too."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            yield from _names(attribute.g.node)


def _node(kind: str, inputs: str, output: str, **options: Any) -> NodeProto:
    """A node of inputs separated by blanks; "-" stands for none."""
    from onnx import helper

    names = ["" if name == "-" else name for name in inputs.split()]
    return helper.make_node(kind, names, [output], name=f"js/{output}", **options)
