import base64
import importlib.util

import pytest
from PIL import Image

from detrkit import Detector
from detrkit.endpoint import EndpointHandler
from detrkit.errors import ImageError, SettingError
from detrkit.hub.upload import HANDLER
from tests.conftest import make_picture


@pytest.fixture(scope="module")
def handler(tiny_detr):
    return EndpointHandler(str(tiny_detr))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    make_picture(120, 80).save(path)
    return path


def test_every_form_of_an_image_gives_what_the_detector_finds(handler, tiny_detr, picture):
    wanted = Detector.from_pretrained(tiny_detr, device="cpu")(picture, threshold=0.3)
    assert len(wanted) > 0
    content = picture.read_bytes()
    text = base64.b64encode(content).decode()
    for inputs in (make_picture(120, 80), content, bytearray(content), text, f"data:image/png;base64,{text}"):
        found = handler({"inputs": inputs, "parameters": {"threshold": 0.3}})
        assert [entry["label"] for entry in found] == wanted.names
        assert [entry["score"] for entry in found] == pytest.approx(wanted.scores.tolist(), abs=1e-5)
        for entry, box in zip(found, wanted.boxes.tolist()):
            assert list(entry["box"]) == ["xmin", "ymin", "xmax", "ymax"]
            assert list(entry["box"].values()) == pytest.approx(box, abs=0.51)
            assert all(isinstance(edge, int) for edge in entry["box"].values())


def test_boxes_refer_to_the_image_as_a_browser_shows_it(handler, tmp_path):
    upright = make_picture(120, 80)
    exif = upright.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    path = tmp_path / "turned.png"
    upright.rotate(90, expand=True).save(path, exif=exif)
    parameters = {"threshold": 0.3}
    wanted = handler({"inputs": upright, "parameters": parameters})
    assert handler({"inputs": path.read_bytes(), "parameters": parameters}) == wanted
    with Image.open(path) as image:
        assert handler({"inputs": image, "parameters": parameters}) == wanted


def test_the_threshold_is_a_half_unless_asked_otherwise(tiny_conditional_detr):
    handler = EndpointHandler(str(tiny_conditional_detr))
    image = make_picture(120, 80)
    everything = handler({"inputs": image, "parameters": {"threshold": 0.0}})
    above = [entry for entry in everything if entry["score"] > 0.5]
    assert 0 < len(above) < len(everything)
    assert (
        len(handler({"inputs": image})) == len(handler({"inputs": image, "parameters": None})) == len(above)
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "not nothing"),
        (5, "not a int"),
        ("not base64!", "not valid base64"),
        ("https://example.com/cat.jpg", "not valid base64"),
        ("/etc/hostname", "base64|Pillow can read"),
        (b"no image", "not an image that Pillow can read"),
        (b"", "empty"),
    ],
)
def test_what_is_no_image_is_told(handler, inputs, message):
    with pytest.raises(ImageError, match=message):
        handler({"inputs": inputs})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"treshold": 0.5}, "unknown parameter 'treshold'"),
        ({"threshold": "high"}, "must be between 0 and 1"),
        ({"threshold": True}, "must be between 0 and 1"),
        ({"overlap": 0}, "overlap must be above 0"),
        ({"max_objects": 0}, "max_objects must be at least 1"),
        ({"threshold": 2}, "threshold"),
        ([0.5], "must be an object"),
        ({"threshold": float("nan")}, "between 0 and 1"),
        ({"threshold": 10**5000}, "between 0 and 1"),
        ({1: 0.5, "a": 0.5}, "unknown parameter '1'"),
    ],
)
def test_parameters_that_do_not_exist_or_fit_are_told(handler, parameters, message):
    with pytest.raises(SettingError, match=message):
        handler({"inputs": make_picture(8, 8), "parameters": parameters})


def test_the_uploaded_file_offers_the_handler(tmp_path):
    (tmp_path / "handler.py").write_text(HANDLER["handler.py"], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("handler", tmp_path / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.EndpointHandler is EndpointHandler


def test_a_model_with_masks_answers_with_boxes(tiny_panoptic):
    found = EndpointHandler(str(tiny_panoptic))(
        {"inputs": make_picture(120, 80), "parameters": {"threshold": 0.1}}
    )
    assert found
    assert set(found[0]) == {"score", "label", "box"}


@pytest.mark.parametrize("request_", [None, [], [{"inputs": "x"}], "inputs", 5])
def test_a_request_that_is_no_object_is_told(handler, request_):
    with pytest.raises(SettingError, match="a request must be an object"):
        handler(request_)
