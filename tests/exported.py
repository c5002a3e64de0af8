"""Folders of exported models that are made in no time: a graph of a few operators, without PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from detrkit.engines.exported import Manifest
from detrkit.families import FAMILIES

QUERIES, CLASSES = 12, 5
SIZE = {"shortest_edge": 96, "longest_edge": 160}
OUTPUTS = ("logits", "pred_boxes", "pred_masks", "query_indices")


def write_exported(
    folder: Path, model_type: str = "detr", size: dict[str, int] | None = None, **config: Any
) -> Path:
    """Writes an exported model with masks, whose results depend on an image's mean colour, into a folder."""
    softmax = FAMILIES[model_type].class_scores == "softmax"
    _write_graph(folder / "model.onnx", CLASSES + softmax)
    names = {str(label): f"class {label}" for label in range(CLASSES)}
    values = {"model_type": model_type, "num_queries": QUERIES, "id2label": names, **config}
    (folder / "config.json").write_text(json.dumps(values))
    settings = {"size": size or SIZE, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    Manifest(engine="onnx", file="model.onnx", outputs=OUTPUTS).write(folder)
    return folder


def _write_graph(path: Path, classes: int) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {
        "classes": random.normal(size=(3, QUERIES * classes)) * 2,
        "places": random.normal(size=(3, QUERIES * 4)),
        "patterns": random.normal(size=(QUERIES, 3, 7, 7)) / 8,
    }
    shapes = {"by_query": [0, QUERIES, classes], "as_boxes": [0, QUERIES, 4]}
    constants = [numpy_helper.from_array(v.astype(np.float32), name) for name, v in weights.items()]
    constants += [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in shapes.items()]
    constants.append(numpy_helper.from_array(np.arange(QUERIES)[None], "numbers"))
    constants.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    constants.append(numpy_helper.from_array(np.array([[0]]), "none"))
    nodes = [
        ("ReduceMean", ["pixel_values", "axes"], ["colour"], {"keepdims": 0}),
        ("MatMul", ["colour", "classes"], ["scores"], {}),
        ("Reshape", ["scores", "by_query"], ["logits"], {}),
        ("MatMul", ["colour", "places"], ["numbers_of_boxes"], {}),
        ("Sigmoid", ["numbers_of_boxes"], ["fractions"], {}),
        ("Reshape", ["fractions", "as_boxes"], ["pred_boxes"], {}),
        ("Conv", ["pixel_values", "patterns"], ["pred_masks"], {"strides": [4, 4], "pads": [3, 3, 3, 3]}),
        # One row of numbers for each image.
        ("ArgMax", ["colour"], ["some"], {"axis": 1, "keepdims": 1}),
        ("Mul", ["some", "none"], ["zeros"], {}),
        ("Add", ["zeros", "numbers"], ["query_indices"], {}),
    ]
    real, whole = TensorProto.FLOAT, TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info("pixel_values", real, ["b", 3, "h", "w"]),
        helper.make_tensor_value_info("pixel_mask", whole, ["b", "h", "w"]),
        helper.make_tensor_value_info("threshold", real, []),
    ]
    outputs = [
        helper.make_tensor_value_info(name, whole if name == "query_indices" else real, None)
        for name in OUTPUTS
    ]
    made = [helper.make_node(kind, ins, outs, **options) for kind, ins, outs, options in nodes]
    graph = helper.make_graph(made, "masks", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
