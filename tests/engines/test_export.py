"""An exported model gives PyTorch's results, whatever the images' size, their number and their padding."""

import copy
import json
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import detrkit
from detrkit import ConditionalDetrForSegmentation, Detector, DetrForSegmentation
from detrkit.checkpoints.registry import REGISTRY
from detrkit.engines import export
from detrkit.engines.export import export_model
from detrkit.engines.exported import open_exported, read_manifest
from detrkit.errors import CheckpointError, DetrkitError, ImageError, MissingExtraError, SettingError
from detrkit.families import FAMILIES as RELEASED_FAMILIES
from tests.closeness import assert_same_outputs
from tests.conftest import make_picture
from tests.tiny import FAMILIES, shake, tiny_config

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

SMALL = {"encoder_layers": 1, "decoder_layers": 2}
SMALLEST = {"encoder_layers": 1, "decoder_layers": 1}
# Recording the deformable ones takes longest, for each level of each layer; two-stage has all that they have.
MODELS = {
    "detr": ("detr", {}),
    "slow: conditional_detr": ("conditional_detr", {}),
    "two-stage": ("deformable_detr_two_stage", {"num_feature_levels": 2, "decoder_layers": 1}),
    "slow: two-stage-of-four-levels": ("deformable_detr_two_stage", {}),
    "slow: deformable_detr": ("deformable_detr", {}),
    "slow: one-level": ("deformable_detr", {"num_feature_levels": 1}),
    "slow: table_transformer": ("table_transformer", {}),
    "slow: refined": ("deformable_detr", {"with_box_refine": True}),
}
CASES = [
    pytest.param(name, id=name.removeprefix("slow: "), marks=pytest.mark.slow if "slow" in name else ())
    for name in MODELS
]
# 400 pixels are 50 of the finest features, whose outermost centres lie just where proposals end. The last has
# fewer features than a two-stage model proposes.
SIZES = [(2, 128, 160), (1, 97, 210), (3, 200, 131), (1, 400, 97), (1, 8, 40)]


def images(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise; the last image of several is padded below and to the right."""
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(batch))
    mask = torch.ones(batch, height, width, dtype=torch.long)
    if batch > 1:
        mask[-1, height - 30 :] = 0
        mask[-1, :, width // 2 :] = 0
    return pixels * mask[:, None], mask


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """A tiny model and the folder that it was exported to, for onnxruntime."""
    family, options = MODELS[request.param]
    model = FAMILIES[family].detector(**SMALL | options)
    folder = tmp_path_factory.mktemp("exported") / "model"
    return model, export_model(model, folder, "onnx")


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_results_are_those_of_pytorch(exported, engine):
    model, written = exported
    run = open_exported(written.folder, engine, model.config)
    for size in SIZES:
        pixels, mask = images(*size)
        with torch.no_grad():
            expected = model(pixels, mask)
        found = run(pixels, mask)
        assert_same_outputs(found, expected)


@pytest.mark.parametrize("exported", ["detr"], indirect=True)
def test_sizes_that_come_again_give_the_same(exported, monkeypatch):
    # OpenVINO then runs a graph of that size alone, here from the third time on.
    monkeypatch.setattr("detrkit.engines.openvino_engine._SAVED", 1e9)
    model, written = exported
    run = open_exported(written.folder, "openvino", model.config)
    cases = [images(*size) for size in SIZES] + [images(1, 128, 128 + 32 * extra) for extra in range(3)]
    with torch.no_grad():
        expected = [[model(pixels, mask), model(pixels)] for pixels, mask in cases]
    for _ in range(4):
        for (pixels, mask), (padded, whole) in zip(cases, expected):
            for found, wanted in ((run(pixels, mask), padded), (run(pixels), whole)):
                assert_same_outputs(found, wanted)


def test_copies_and_pickles_run_without_the_folder(exported, tmp_path):
    model, written = exported
    folder = shutil.copytree(written.folder, tmp_path / "copy")
    run = open_exported(folder, "onnx", model.config)
    pixels, mask = images(2, 128, 160)
    expected = run(pixels, mask)
    assert_same_outputs(copy.deepcopy(run)(pixels, mask), expected)
    content = pickle.dumps(run)
    shutil.rmtree(folder)
    read = pickle.loads(content)
    assert_same_outputs(read(pixels, mask), expected)
    own = read.graph.folder.path
    assert own.is_dir()
    del read
    assert not own.exists()


def test_a_prepared_model_is_not_exported(tmp_path):
    with pytest.raises(SettingError, match="cannot be exported"):
        export_model(detrkit.prepare(FAMILIES["detr"].detector(**SMALLEST)), tmp_path / "model", "onnx")


def test_padding_counts_and_its_absence_needs_no_mask(exported):
    model, written = exported
    run = open_exported(written.folder, "onnx", model.config)
    pixels, mask = images(2, 128, 160)
    assert (run(pixels).logits - run(pixels, mask).logits).abs().max() > 1e-3
    with torch.no_grad():
        assert_same_outputs(run(pixels), model(pixels))


def test_the_check_reports_how_far_results_lie_from_pytorch_s(exported):
    _, written = exported
    assert set(written.differences) == {"logits", "pred_boxes"}
    assert all(0 < difference < 1e-4 for difference in written.differences.values())


def test_the_model_stays_as_it_was(tmp_path):
    model = FAMILIES["detr"].detector(**SMALLEST, auxiliary_loss=True)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path / "model", "onnx", verify=False)
    assert model.training
    assert model.config.auxiliary_loss
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.class_labels_classifier.parameters())


def test_openvino_s_folder_holds_its_own_format_and_runs(tmp_path):
    model = FAMILIES["detr"].detector(**SMALLEST)
    written = export_model(model, tmp_path / "model", "openvino")
    names = sorted(path.name for path in written.folder.iterdir())
    assert names == ["config.json", "detection_config.json", "engine.json", "model.bin", "model.xml"]
    assert max(written.differences.values()) < 1e-4
    with pytest.raises(CheckpointError, match="exported for the engine 'openvino', which 'onnx' cannot run"):
        open_exported(written.folder, "onnx", model.config)


@pytest.fixture(
    scope="module",
    params=[DetrForSegmentation, pytest.param(ConditionalDetrForSegmentation, marks=pytest.mark.slow)],
)
def segmenter(request, tmp_path_factory):
    """A tiny model with masks and the folder that it was exported to, for onnxruntime."""
    config = tiny_config(request.param.config_class, encoder_attention_heads=8, **SMALL)
    model = shake(request.param(config)).eval()
    folder = tmp_path_factory.mktemp("segmenter") / "model"
    return model, export_model(model, folder, "onnx")


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_masks_are_those_of_pytorch(segmenter, engine):
    model, written = segmenter
    run = open_exported(written.folder, engine, model.config)
    for size in SIZES:
        pixels, mask = images(*size)
        with torch.no_grad():
            everything = model(pixels, mask)
            scores = model.object_scores(everything.logits)
            threshold = float(scores.flatten().sort().values[-4:-2].mean())  # three survivors
            surviving = model.segment(pixels, mask, threshold=threshold)
        assert surviving.logits.shape[1] < everything.logits.shape[1]
        again = 3 if engine == "openvino" else 1  # at the third time it has a graph of that size
        for found, expected in (
            *((run(pixels, mask), everything) for _ in range(again)),
            *((run.segment(pixels, mask, threshold=threshold), surviving) for _ in range(again)),
        ):
            for name, tolerance in (("logits", 1e-4), ("pred_boxes", 1e-5), ("pred_masks", 1e-4)):
                torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=0)
        boxes = run.detector(pixels, mask)
        torch.testing.assert_close(boxes.pred_boxes, everything.pred_boxes, atol=1e-5, rtol=0)
        assert "pred_masks" not in boxes


def test_one_query_stays_where_none_survives(segmenter):
    model, written = segmenter
    run = open_exported(written.folder, "onnx", model.config)
    assert run.segment(*images(1, 97, 210), threshold=1.0).pred_masks.shape[:2] == (1, 1)


def test_queries_may_change_places_but_not_values():
    expected = {"logits": torch.randn(2, 5, 3), "pred_boxes": torch.rand(2, 5, 4)}
    order = [3, 1, 0, 4, 2]
    moved = export._in_order_of(expected, {name: value[:, order] for name, value in expected.items()})
    assert all(torch.equal(moved[name], expected[name]) for name in expected)
    expected["logits"][0, 0] = torch.nan
    assert export._in_order_of(expected, moved)["logits"].shape == (2, 5, 3)


class Dependent(nn.Module):
    """A layer that a recording takes for a constant: it reads the batch's size as a number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor(float(x.shape[-1]))


@pytest.mark.parametrize("engine", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_a_detector_exports_on_the_fly(engine, tiny_detr):
    pictures = [make_picture(120, 80), make_picture(80, 120, seed=1)]
    expected = Detector.from_pretrained(tiny_detr, device="cpu")(pictures, threshold=0.3)
    found = Detector.from_pretrained(tiny_detr, engine=engine)(pictures, threshold=0.3)
    assert min(map(len, expected)) > 3
    for ours, theirs in zip(found, expected):
        assert ours.labels.tolist() == theirs.labels.tolist()
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-3)


def test_what_differs_from_pytorch_is_not_written(tmp_path, monkeypatch):
    model = FAMILIES["detr"].detector(**SMALLEST)
    model.model.input_projection = nn.Sequential(model.model.input_projection, Dependent())
    with pytest.raises(DetrkitError, match=r"logits differ by .* from PyTorch's on images of 301x397"):
        export_model(model, tmp_path / "model", "onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_fails_when_it_is_checked_is_said_to_fail():
    def outputs(**inputs):
        raise ImageError("the exported model does not take an image; pad the image") from OSError("no kernel")

    graph = export._Detection(FAMILIES["detr"].detector(**SMALLEST))
    with pytest.raises(DetrkitError, match=r"fails on images of 416x320 pixels \(no kernel\); nothing was"):
        export._compare(graph, SimpleNamespace(outputs=outputs))


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    real = export.importlib.util.find_spec
    for package in ("onnxscript", "onnxruntime", "openvino"):
        monkeypatch.setattr(
            export.importlib.util,
            "find_spec",
            lambda name, missing=package: real(name) if name != missing else None,
        )
        with pytest.raises(MissingExtraError, match=r"'\.\[export\]'"):
            export_model(None, tmp_path, "openvino" if package == "openvino" else "onnx")


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(SettingError, match="cannot export to 'tflite'; use one of: onnx, openvino"):
        export_model(None, tmp_path, "tflite")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"engine": "x", "file": "f", "outputs": [], "precision": "float32"}']
)
def test_a_broken_manifest_is_named(tmp_path, content):
    (tmp_path / "engine.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"engine\.json.*export the model again"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_holds_no_exported_model(tmp_path):
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_damaged_file_is_named(tmp_path, engine):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    manifest = {"engine": "onnx", "file": "model.onnx", "outputs": [], "precision": "float32"}
    (tmp_path / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.onnx"):
        open_exported(tmp_path, engine, FAMILIES["detr"].config())


def released(name: str) -> nn.Module:
    """A model of full size with the architecture of a released checkpoint and random weights."""
    entry = REGISTRY[name]
    family = RELEASED_FAMILIES[entry.family]
    options = {
        "backbone": entry.backbone,
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "dilation": entry.dilation,
        "num_queries": entry.num_queries,
        "num_labels": entry.num_labels,
    }
    if entry.family == "deformable_detr":
        for key in ("num_feature_levels", "with_box_refine", "two_stage"):
            options[key] = getattr(entry, key)
    config = family.load(family.config)(**options)
    torch.manual_seed(0)
    model = family.load_model_class(masks=entry.task == "panoptic")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)  # else offsets and boxes would not depend on the image
    return model


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", REGISTRY)
def test_every_released_architecture_gives_pytorch_s_results(name, tmp_path):
    model = released(name)
    written = export_model(model, tmp_path / "model", "onnx")  # checked in onnxruntime on writing
    run = open_exported(written.folder, "openvino", model.config)
    pixels, mask = images(2, 300, 410)
    with torch.no_grad():
        expected, found = model(pixels, mask), run(pixels, mask)
    if getattr(model.config, "two_stage", False):
        found = export._in_order_of(expected, found)
    names = [key for key in ("logits", "pred_boxes", "pred_masks") if key in expected]
    differences = {key: float((found[key] - expected[key]).abs().max()) for key in names}
    print(f"{name}: onnxruntime {written.differences}, OpenVINO {differences}")
    assert set(names) <= set(written.differences)
    assert max(*written.differences.values(), *differences.values()) < 1e-4
