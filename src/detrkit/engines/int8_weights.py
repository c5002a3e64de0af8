"""Weights of an ONNX file stored as int8: a quarter of the size to download, computed in float32 as before.

Each output channel of a convolution or a product of matrices has a scale of its own, so that rounding is
relative to the channel's largest weight. Nothing else is quantised: no ranges of activations are needed, and
so no images to calibrate with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Smaller tensors stay float32: they hardly count for the size, and heads are among them.
_LEAST = 2**11


def with_int8_weights(model: ModelProto) -> ModelProto:
    """Has an ONNX model, which is changed, store its large weights as int8.

    Returns:
        The model.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    axes: dict[str, int] = {}  # of the channels that have scales; -1 where uses differ
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in weights:
                axis = _channel_axis(node, place)
                axes[name] = axis if axes.setdefault(name, axis) == axis else -1
    added = []
    for name, axis in axes.items():
        weight = numpy_helper.to_array(weights[name])
        if axis < 0 or weight.dtype != np.float32 or weight.size < _LEAST or weight.ndim < 2:
            continue
        others = tuple(i for i in range(weight.ndim) if i != axis)
        scale = np.abs(weight).max(axis=others) / 127
        scale[scale == 0] = 1
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        small = np.round(weight / scale.reshape(shape)).astype(np.int8)
        graph.initializer.remove(weights[name])
        graph.initializer.append(numpy_helper.from_array(small, f"{name}.int8"))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
        parts = [f"{name}.int8", f"{name}.scale"]
        added.append(helper.make_node("DequantizeLinear", parts, [name], axis=axis))
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _channel_axis(node: NodeProto, place: int) -> int:
    """The axis of the output channels of a weight at a place of a node's inputs; -1 where it is no weight."""
    if place != 1:
        return -1
    if node.op_type == "Conv":
        return 0
    if node.op_type == "MatMul":
        return 1
    if node.op_type == "Gemm":
        transposed = any(given.name == "transB" and given.i for given in node.attribute)
        return 0 if transposed else 1
    return -1
