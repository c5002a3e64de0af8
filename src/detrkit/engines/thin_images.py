"""Thin images in exported graphs: what a backbone needs at least is padded in front of the graph.

The exporter follows each size through the graph, and a size that may be padded or not is more than it can
reason about. So the graph is recorded without, and gets the few operators of
:meth:`detrkit.models.layers.backbone.Backbone.long_enough` afterwards.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto

_PADDED = "{}.long_enough"


def pad_thin_images(path: Path, least: int) -> None:
    """Has an ONNX file pad its images and their mask, in place, to sides of so many pixels.

    Masks that it gives are cut to what covers the image.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    inner = {name: _PADDED.format(name) for name in ("pixel_values", "pixel_mask", "pred_masks")}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]

    constants = {"axes": [2, 3], "zero": [0], "one": [1], "least": [least], "z2": [0, 0], "z6": [0] * 6}
    for name, values in constants.items():
        array = np.array(values, np.int64)
        graph.initializer.append(numpy_helper.from_array(array, f"thin.{name}"))

    def made(kind: str, inputs: str, output: str) -> NodeProto:
        """An operator whose inputs and output are of this module unless they are the graph's."""
        outside = {*inner, *inner.values()}
        named = [name if name in outside else f"thin.{name}" for name in [*inputs.split(), output]]
        return helper.make_node(kind, named[:-1], named[-1:], name=f"thin.{output}")

    before = [
        made("Shape", "pixel_values", "shape"),
        made("Gather", "shape axes", "size"),
        made("Sub", "least size", "lacking"),
        made("Max", "lacking zero", "margin"),
        helper.make_node("Concat", ["thin.z6", "thin.margin"], ["thin.image_pads"], axis=0),
        made("Pad", "pixel_values image_pads", inner["pixel_values"]),
        helper.make_node("Concat", ["thin.z2", "thin.z2", "thin.margin"], ["thin.mask_pads"], axis=0),
        made("Pad", "pixel_mask mask_pads", inner["pixel_mask"]),
    ]
    after = []
    if any(output.name == "pred_masks" for output in graph.output):
        after = [
            made("Shape", inner["pred_masks"], "masks_shape"),
            made("Gather", "masks_shape axes", "masks_size"),
            made("Max", "size least", "padded_size"),
            # Rounded up: size x masks_size / padded_size.
            made("Mul", "size masks_size", "product"),
            made("Add", "product padded_size", "more"),
            made("Sub", "more one", "last"),
            made("Div", "last padded_size", "ends"),
            made("Slice", f"{inner['pred_masks']} z2 ends axes", "pred_masks"),
        ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*before, *rest, *after])
    del graph.value_info[:]  # remarks on sizes that thin images do not have
    onnx.save(model, path)
