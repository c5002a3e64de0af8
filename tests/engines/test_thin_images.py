"""What is put in front of an exported graph for thin images."""

import numpy as np
import pytest

from detrkit.engines.thin_images import pad_thin_images

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def run(tmp_path):
    """A graph that tells the sums of what it gets and pools its images to masks of a quarter of the size."""
    from onnx import TensorProto, helper

    free = ["batch", 3, "height", "width"]
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, free)
    mask = helper.make_tensor_value_info("pixel_mask", TensorProto.INT64, ["batch", "height", "width"])
    outputs = {
        "size": (TensorProto.INT64, [4]),
        "real": (TensorProto.INT64, [1, 1, 1]),
        "pred_masks": (TensorProto.FLOAT, ["batch", 3, "rows", "columns"]),
    }
    nodes = [
        helper.make_node("Shape", ["pixel_values"], ["size"]),
        helper.make_node("ReduceSum", ["pixel_mask"], ["real"]),
        helper.make_node("MaxPool", ["pixel_values"], ["pred_masks"], kernel_shape=[4, 4], strides=[4, 4]),
    ]
    infos = [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "graph", [pixels, mask], infos)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    pad_thin_images(tmp_path / "model.onnx", 32)
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    def call(height, width):
        inputs = {
            "pixel_values": np.ones((2, 3, height, width), np.float32),
            "pixel_mask": np.ones((2, height, width), np.int64),
        }
        return session.run(None, inputs)

    return call


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 90), (90, 5), (40, 64)])
def test_images_get_the_least_size_and_masks_cover_the_image(run, height, width):
    size, real, masks = run(height, width)
    assert size.tolist() == [2, 3, max(height, 32), max(width, 32)]
    assert real == 2 * height * width, "padding is not real"
    covered = [-(-n * (max(n, 32) // 4) // max(n, 32)) for n in (height, width)]
    assert list(masks.shape[-2:]) == covered
    assert (masks == 1).all()
