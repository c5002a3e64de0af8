"""int8: the large layers are quantised, and nothing that says where or what an object is."""

import re

import pytest
from torch import nn

from detrkit import DeformableDetrImageProcessor, Detector
from detrkit.engines import quantization
from detrkit.engines.export import check_format, export_model
from detrkit.engines.exported import read_manifest
from detrkit.errors import MissingExtraError, SettingError
from tests.conftest import make_picture
from tests.models.tiny import FAMILIES

pytest.importorskip("onnxscript")
pytest.importorskip("openvino")
pytest.importorskip("nncf")

FLOAT32 = re.compile("class|bbox|sampling_offsets|attention_weights|reference|ref_point|query|pos|enc_output")
PICTURES = [make_picture(120, 80, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model():
    return FAMILIES["deformable_detr_two_stage"].detector(encoder_layers=1, decoder_layers=2)


@pytest.fixture(scope="module")
def processor():
    return DeformableDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})


@pytest.fixture(scope="module")
def folders(model, processor, tmp_path_factory):
    """The model exported for OpenVINO in float32 and in int8."""
    parent = tmp_path_factory.mktemp("exported")
    export_model(model, parent / "float32", "openvino", processor=processor, verify=False)
    written = export_model(model, parent / "int8", "openvino", processor=processor, calibration=PICTURES)
    assert max(written.differences.values()) < 1e-4  # of the model before
    return parent / "float32", parent / "int8"


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def is_quantised(node) -> bool:
    """Whether both inputs of a matrix product or convolution come from a FakeQuantize."""
    sources = [node.input_value(index).get_node() for index in (0, 1)]
    while any(source.get_type_name() in ("Reshape", "Convert", "Transpose") for source in sources):
        sources = [
            s.input_value(0).get_node() if s.get_type_name() in ("Reshape", "Convert", "Transpose") else s
            for s in sources
        ]
    return all(source.get_type_name() == "FakeQuantize" for source in sources)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_coordinates_stay_float32_and_the_rest_does_not(family):
    chosen = {
        name: bool(quantization._QUANTIZED.search(name)) for name in layers(FAMILIES[family].detector())
    }
    wrong = [name for name, quantised in chosen.items() if quantised == bool(FLOAT32.search(name))]
    assert not wrong
    assert sum(chosen.values()) > 20


def test_the_layers_chosen_are_those_quantised(model, folders):
    import openvino

    expected = sum(bool(quantization._QUANTIZED.search(name)) for name in layers(model))
    graph = openvino.Core().read_model(folders[1] / "model.xml")
    products = [node for node in graph.get_ops() if node.get_type_name() in ("MatMul", "Convolution")]
    assert sum(map(is_quantised, products)) == expected
    assert len(products) > expected


def test_an_int8_folder_says_so_and_is_smaller(folders):
    float32, int8 = folders
    assert read_manifest(int8).precision == "int8"
    assert sorted(p.name for p in int8.iterdir()) == sorted(p.name for p in float32.iterdir())
    assert (int8 / "model.bin").stat().st_size < 0.7 * (float32 / "model.bin").stat().st_size


def test_an_int8_model_detects_nearly_the_same(folders):
    found = []
    for folder in folders:
        detector = Detector.from_pretrained(folder)
        inputs = detector.processor(images=PICTURES[0], return_tensors="pt")
        found.append(detector.model(**inputs).logits.sort(dim=1).values)
        assert len(detector(PICTURES, threshold=0.0)) == len(PICTURES)
    difference = (found[0] - found[1]).abs().mean()
    assert 0 < difference < 0.2 * found[0].std()


def test_int8_is_refused_where_it_cannot_be(model, processor, tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="int8 is for OpenVINO only"):
        export_model(model, tmp_path / "out", "onnx", calibration=PICTURES)
    with pytest.raises(SettingError, match="needs images to calibrate with"):
        export_model(model, tmp_path / "out", "openvino", processor=processor, calibration=[])
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"detrkit\[export\]"):
        check_format("openvino", int8=True)
    assert not list(tmp_path.iterdir())
