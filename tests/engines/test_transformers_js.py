"""What transformers.js reads from an exported folder is what a Detector finds."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit import ConditionalDetrImageProcessor, DetectionConfig, Detector, DetrImageProcessor
from detrkit.checkpoints.loading import load_pretrained
from detrkit.engines.int8_weights import with_int8_weights
from detrkit.engines.transformers_js import caller_notes, export_for_transformers_js
from detrkit.engines.transformers_js_graph import MaskReading, Reading, SizeRule, as_logits
from detrkit.errors import SettingError
from detrkit.processing.options import Settings
from detrkit.processing.resize import size_for
from tests.conftest import make_picture, read_json
from tests.tiny import FAMILIES

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

NODE = shutil.which("node")
# The package's folder, as in node_modules/@huggingface/transformers.
PACKAGE = os.environ.get("TRANSFORMERS_JS")
# The graph is for onnxruntime-web; in Python, the first to take its resizing is 1.24.
takes_the_graph = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 24), reason="onnxruntime before 1.24"
)
SIZES = [(480, 640), (640, 480), (333, 333), (100, 1999), (7, 2000), (1, 5000), (1200, 675), (599, 1000)]


def js_objects(
    logits: np.ndarray, boxes: np.ndarray, threshold: float
) -> list[tuple[int, float, np.ndarray]]:
    """Objects of an image as transformers.js reads them: label, score, normalised xyxy box; best first."""
    found = []
    for row, (x, y, width, height) in zip(logits, boxes):
        label = int(row.argmax())
        weights = np.exp(row - row.max())
        score = float(weights[label] / weights.sum())
        if label == len(row) - 1 or score < threshold:
            continue
        box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
        found.append((label, score, box))
    return sorted(found, key=lambda item: -item[1])


def assert_browsers_can_run(file: Path) -> None:
    """onnxruntime-web leaves out float64."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load(file)
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    kinds |= {a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute}
    assert onnx.TensorProto.DOUBLE not in kinds


def run(file: Path, image: Image.Image) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(file)
    assert [value.name for value in session.get_inputs()] == ["pixel_values"]
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"pixel_values": pixels})))


def assert_same_objects(found: list, detections, tolerance: float = 1e-4) -> None:
    height, width = detections.image_size
    assert len(found) == len(detections)
    assert [label for label, _, _ in found] == detections.labels.tolist()
    np.testing.assert_allclose([score for _, score, _ in found], detections.scores, atol=tolerance)
    boxes = np.array([box for _, _, box in found]).reshape(-1, 4) * [width, height, width, height]
    np.testing.assert_allclose(boxes, detections.boxes, atol=max(width, height) * tolerance)


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 800, "longest_edge": 1333},
        {"shortest_edge": 288, "longest_edge": 384},
        {"shortest_edge": 64},
        {"longest_edge": 1000},
        {"height": 300, "width": 200},
        {"max_height": 300, "max_width": 500},
    ],
    ids=lambda size: "-".join(size),
)
def test_images_get_the_size_that_the_processor_gives_them(size):
    rule = SizeRule(size)
    by_edges = "shortest_edge" in size or "height" in size
    for sides in SIZES:
        found = np.array(rule(torch.tensor(sides)).tolist())
        assert np.abs(found - size_for(*sides, size)).max() <= (0 if by_edges else 1), sides


def test_sizes_by_edges_are_equal_for_many_shapes_halves_too():
    size = {"shortest_edge": 50, "longest_edge": 75}
    rule = SizeRule(size)
    for height in range(1, 60, 3):
        for width in range(1, 400, 7):
            assert tuple(rule(torch.tensor([height, width])).tolist()) == size_for(height, width, size)


@pytest.mark.parametrize("classes", [1, 3, 91, 200])
def test_a_softmax_gives_the_scores_back_and_low_ones_are_no_objects(classes):
    scores = torch.tensor([[1.0, 0.9, 0.5, 0.3, 0.02, 0.004, 0.0]])
    labels = torch.full((1, 7), classes - 1)
    logits = as_logits(scores, labels, classes)[0]
    found = logits.softmax(-1)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(found[:, classes - 1], scores[0], atol=1e-6, rtol=1e-5)
    last = logits.shape[-1] - 1
    assert found.argmax(-1).tolist() == [classes - 1] * 5 + [last] * 2


def random_outputs(classes: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 20, classes, generator=generator)
    return {"logits": logits, "pred_boxes": torch.rand(1, 20, 4, generator=generator)}


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("processor", [DetrImageProcessor(), ConditionalDetrImageProcessor()])
def test_rows_are_the_objects_of_post_processing_also_two_of_one_query(processor, threshold):
    outputs = random_outputs(5)
    classes = processor.query_probabilities(outputs["logits"])[0].shape[-1]
    logits, boxes = Reading(processor, 20, classes)(**outputs)
    [expected] = processor.post_process_object_detection(outputs, threshold)
    order = expected["scores"].argsort(descending=True)
    found = js_objects(logits[0].numpy(), boxes[0].numpy(), threshold)
    assert [item[0] for item in found] == expected["labels"][order].tolist()
    np.testing.assert_allclose([item[1] for item in found], expected["scores"][order], atol=1e-6)
    np.testing.assert_allclose([item[2] for item in found], expected["boxes"][order], atol=1e-6)


def test_rows_of_masks_are_those_of_their_queries_and_no_objects_stay_none():
    processor = DetrImageProcessor()
    outputs = random_outputs(4)
    queries = torch.tensor([[2, 3, 11]])
    outputs["logits"][0, 3, -1] = 9  # no object
    logits, boxes = MaskReading(processor, 20, 3)(**outputs, query_indices=queries)
    assert logits[0, 1].argmax() == logits.shape[-1] - 1
    scores, labels = outputs["logits"].softmax(-1)[0, queries[0], :-1].max(-1)
    for row in (0, 2):
        assert logits[0, row].argmax() == labels[row]
        assert logits[0, row].softmax(-1).max() == pytest.approx(scores[row].item(), abs=1e-6)
    torch.testing.assert_close(boxes[0], outputs["pred_boxes"][0, queries[0]])


@takes_the_graph
@pytest.mark.parametrize("size", [{"shortest_edge": 64, "longest_edge": 107}, {"height": 90, "width": 50}])
def test_the_graph_prepares_images_as_the_processor_does(size, tmp_path):
    from onnx import TensorProto, helper

    from detrkit.engines.transformers_js_graph import _front

    processor = DetrImageProcessor(size=size)
    nodes, tensors = _front(Settings.of(processor, {}))
    kinds = {"model/pixel_values": TensorProto.FLOAT, "model/pixel_mask": TensorProto.INT64}
    outputs = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    images = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, [1, 3, None, None])
    graph = helper.make_graph(nodes, "front", [images], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for sides in [(120, 80), (80, 120), (300, 60), (64, 64), (31, 47)]:
        picture = make_picture(*sides)
        expected = processor(images=[picture], return_tensors="np")
        pixels, mask = session.run(
            list(kinds), {"pixel_values": np.asarray(picture, np.float32).transpose(2, 0, 1)[None]}
        )
        level = 1 / 255 / 0.224
        assert pixels.shape == expected["pixel_values"].shape
        assert np.abs(pixels - expected["pixel_values"]).max() < 2.5 * level
        assert np.abs(pixels - expected["pixel_values"]).mean() < 0.1 * level
        np.testing.assert_array_equal(mask, expected["pixel_mask"])


def test_int8_weights_are_a_quarter_of_the_size_and_change_little():
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    weights = {
        "conv": random.normal(size=(64, 16, 3, 3)),
        "product": random.normal(size=(64, 128)),
        "gemm": random.normal(size=(32, 128)),
        "small": random.normal(size=(32, 4)),
    }
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "conv"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "product"], ["d"]),
        helper.make_node("Gemm", ["d", "gemm"], ["e"], transB=1),
        helper.make_node("MatMul", ["e", "small"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    image = {"x": random.normal(size=(1, 16, 8, 8)).astype(np.float32)}
    before = model.SerializeToString()
    [expected] = onnxruntime.InferenceSession(before).run(None, image)
    after = with_int8_weights(model).SerializeToString()
    [found] = onnxruntime.InferenceSession(after).run(None, image)
    assert len(after) < 0.35 * len(before)
    assert 0 < np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_callers_are_told_what_transformers_js_does_not_apply():
    assert caller_notes(DetectionConfig()) == "pass {threshold: 0.5}"
    notes = caller_notes(DetectionConfig(threshold={"RBC": 0.4}, overlap=0.8, tile_size=512))
    assert "pass {threshold: 0.4}" in notes
    assert "RBC 0.4" in notes
    assert "overlap filter (0.8), tiles (512)" in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pad_size": {"height": 200, "width": 200}}, "pad_size"),
        ({"resample": 3}, "bilinear"),
    ],
)
def test_a_preparation_that_the_graph_lacks_is_refused(options, message, tmp_path):
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 107}, **options)
    with pytest.raises(SettingError, match=message):
        export_for_transformers_js(FAMILIES["detr"].detector(), tmp_path / "js", processor=processor)
    assert not (tmp_path / "js").exists()


def test_a_quantised_model_of_an_earlier_export_does_not_stay_beside_a_new_one(tmp_path):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_quantized.onnx").write_bytes(b"earlier")
    with pytest.raises(SettingError, match=r"model_quantized\.onnx of an earlier export"):
        export_for_transformers_js(FAMILIES["detr"].detector(), tmp_path, processor=DetrImageProcessor())


FOLDERS = [
    "tiny_detr",
    pytest.param("tiny_table_transformer", marks=pytest.mark.slow),
    pytest.param("tiny_conditional_detr", marks=pytest.mark.slow),
    pytest.param("tiny_deformable_detr", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """A model's folder and what it was exported to."""
    source = request.getfixturevalue(request.param)
    model, processor = load_pretrained(str(source), None)
    folder = tmp_path_factory.mktemp("js") / request.param
    export_for_transformers_js(model, folder, processor=processor, int8=True, verify=False)
    return source, folder


@takes_the_graph
@pytest.mark.parametrize("exported", FOLDERS, indirect=True)
def test_the_objects_are_those_of_a_detector(exported):
    source, folder = exported
    detector = Detector.from_pretrained(source, device="cpu")
    for size in [(96, 64), (64, 107)]:  # as large as the processor makes them
        picture = make_picture(*size)
        outputs = run(folder / "onnx" / "model.onnx", picture)
        for threshold in (0.1, 0.5, 0.8):
            found = js_objects(outputs["logits"][0], outputs["pred_boxes"][0], threshold)
            assert_same_objects(found, detector(picture, threshold=threshold))
            assert found or threshold > 0.1


@pytest.mark.parametrize("exported", ["tiny_detr"], indirect=True)
def test_the_folder_has_the_layout_and_the_classes_that_transformers_js_knows(exported):
    _, folder = exported
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        "config.json",
        "detection_config.json",
        "onnx/model.onnx",
        "onnx/model_quantized.onnx",
        "preprocessor_config.json",
    ]
    assert_browsers_can_run(folder / "onnx" / "model.onnx")
    config = read_json(folder / "config.json")
    assert (config["model_type"], config["id2label"]["1"]) == ("detr", "cat")
    processor = read_json(folder / "preprocessor_config.json")
    assert processor["image_processor_type"] == "DetrImageProcessor"
    assert not any(processor[name] for name in ("do_resize", "do_rescale", "do_normalize", "do_pad"))


needs_node = pytest.mark.skipif(
    NODE is None or PACKAGE is None, reason="needs node, and TRANSFORMERS_JS: the folder of the npm package"
)


def in_node(task: str, folder: Path, image: Path, dtype: str = "fp32", **options: object) -> list[dict]:
    script = Path(__file__).with_name("transformers_js.mjs")
    command = [NODE, script, PACKAGE, task, folder, image, json.dumps(options), dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["found"]


def by_score(found: list[dict], names: dict[str, int]) -> list[tuple[int, float, np.ndarray]]:
    objects = [(names[o["label"]], o["score"], np.array([*o["box"].values()])) for o in found]
    return sorted(objects, key=lambda item: -item[1])


@needs_node
@pytest.mark.slow
@pytest.mark.parametrize("exported", FOLDERS, indirect=True)
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_node_finds_the_objects_of_a_detector(exported, dtype, tmp_path):
    source, folder = exported
    detector = Detector.from_pretrained(source, device="cpu")
    make_picture(96, 64).save(tmp_path / "picture.png")
    found = in_node(
        "object-detection", folder, tmp_path / "picture.png", dtype, threshold=0.3, percentage=True
    )
    objects = by_score(found, read_json(folder / "config.json")["label2id"])
    if dtype == "fp32":
        assert_same_objects(objects, detector(tmp_path / "picture.png", threshold=0.3))
        assert objects
    else:  # weights of tiny models are noise, which int8 changes more than it changes what was learnt
        assert objects


@needs_node
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_panoptic", "tiny_conditional_panoptic"])
def test_node_finds_the_segments_of_the_queries_that_pytorch_finds(request, name, tmp_path):
    source = request.getfixturevalue(name)
    model, processor = load_pretrained(str(source), None)
    export_for_transformers_js(model, tmp_path / "js", processor=processor, verify=False)
    make_picture(96, 64).save(tmp_path / "picture.png")
    rules = {"threshold": 0.6, "mask_threshold": 0.5, "overlap_mask_area_threshold": 0.1}
    found = in_node("image-segmentation", tmp_path / "js", tmp_path / "picture.png", **rules)
    with torch.no_grad():
        outputs = model(**processor(images=[tmp_path / "picture.png"], return_tensors="pt"))
    expected = js_segments(processor, outputs, (64, 96), **rules)
    names = model.config.id2label
    assert [item["label"] for item in found] == [names[label] for label, _, _ in expected]
    assert len(found) > 1
    for item, (_, score, wanted) in zip(found, expected):
        assert item["score"] == pytest.approx(score, abs=1e-4)
        runs = item["mask"]["runs"]
        mask = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(64, 96)
        assert (mask == wanted).mean() > 0.95


def js_segments(
    processor, outputs, size, threshold: float, mask_threshold: float, overlap_mask_area_threshold: float
) -> list[tuple[int, float, np.ndarray]]:
    """Label, score and mask of the segments that transformers.js's rule makes of a model's outputs."""
    probabilities, is_object = processor.query_probabilities(outputs["logits"])
    scores, labels = (values[0] for values in probabilities.max(-1))
    [kept] = torch.where(is_object[0] & (scores > threshold))
    masks = outputs["pred_masks"][:, kept].sigmoid()
    masks = torch.nn.functional.interpolate(masks, size, mode="bilinear")[0] * scores[kept, None, None]
    winners = masks.argmax(0)
    segments = []
    for place, query in enumerate(kept.tolist()):
        won, own = winners == place, masks[place] >= mask_threshold
        if won.any() and own.any() and won.sum() / own.sum() > overlap_mask_area_threshold:
            segments.append((int(labels[query]), float(scores[query]), won.numpy()))
    return segments
