"""int8: the large layers are quantised, and nothing that says where or what an object is."""

import re

import pytest
import torch
from torch import nn

from detrkit import DeformableDetrImageProcessor, Detector
from detrkit.engines import quantization
from detrkit.engines.export import check_format, export_model
from detrkit.engines.exported import read_manifest
from detrkit.errors import MissingExtraError, SettingError
from tests.conftest import make_picture
from tests.tiny import FAMILIES

pytest.importorskip("onnxscript")
pytest.importorskip("openvino")
pytest.importorskip("nncf")

FLOAT32 = re.compile("class|bbox|sampling_offsets|attention_weights|reference|ref_point|query|pos|enc_output")
PICTURES = [make_picture(120, 80, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model():
    small = {"num_feature_levels": 1, "encoder_layers": 1, "decoder_layers": 1}  # quick to record
    return FAMILIES["deformable_detr_two_stage"].detector(**small)


@pytest.fixture(scope="module")
def processor():
    return DeformableDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    """The model exported for OpenVINO in int8."""
    folder = tmp_path_factory.mktemp("exported") / "int8"
    export_model(model, folder, "openvino", processor=processor, verify=False, calibration=PICTURES)
    return folder


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def is_quantised(node) -> bool:
    """Whether the input of a matrix product or convolution is quantised and its weights are integers."""
    value, weight = (node.input_value(index).get_node() for index in (0, 1))
    while weight.get_type_name() in ("Multiply", "Convert"):
        weight = weight.input_value(0).get_node()
    return value.get_type_name() == "FakeQuantize" and weight.get_element_type().to_string() == "i8"


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_coordinates_stay_float32_and_the_rest_does_not(family):
    chosen = {
        name: bool(quantization._QUANTIZED.search(name)) for name in layers(FAMILIES[family].detector())
    }
    wrong = [name for name, quantised in chosen.items() if quantised == bool(FLOAT32.search(name))]
    assert not wrong
    assert sum(chosen.values()) > 20


def test_the_layers_chosen_are_those_quantised(model, folder):
    import openvino

    expected = sum(bool(quantization._QUANTIZED.search(name)) for name in layers(model))
    graph = openvino.Core().read_model(folder / "model.xml")
    products = [node for node in graph.get_ops() if node.get_type_name() in ("MatMul", "Convolution")]
    assert sum(map(is_quantised, products)) == expected
    assert len(products) > expected


def test_an_int8_folder_says_so_and_is_smaller(model, folder):
    assert read_manifest(folder).precision == "int8"
    names = ["config.json", "detection_config.json", "engine.json", "model.bin", "model.xml"]
    names.append("preprocessor_config.json")
    assert sorted(path.name for path in folder.iterdir()) == names
    float32 = sum(4 * parameter.numel() for parameter in model.parameters())
    assert (folder / "model.bin").stat().st_size < 0.85 * float32


def test_an_int8_model_detects_nearly_the_same(model, folder):
    detector = Detector.from_pretrained(folder)
    inputs = detector.processor(images=PICTURES[0], return_tensors="pt")
    with torch.no_grad():
        expected, found = (run(**inputs).logits.sort(dim=1).values for run in (model, detector.model))
    difference = (found - expected).abs().mean()
    assert 0 < difference < 0.2 * expected.std()
    assert [d.image_size for d in detector(PICTURES, threshold=0.0)] == [(80, 120)] * len(PICTURES)


def test_int8_is_refused_where_it_cannot_be(model, processor, tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="int8 is for OpenVINO only"):
        export_model(model, tmp_path / "out", "onnx", calibration=PICTURES)
    with pytest.raises(SettingError, match="requires images to calibrate with"):
        export_model(model, tmp_path / "out", "openvino", processor=processor, calibration=[])
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'\.\[export\]'"):
        check_format("openvino", int8=True)
    assert not list(tmp_path.iterdir())
