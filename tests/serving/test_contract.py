"""What a client that knows only the contract sends, and what it gets."""

from __future__ import annotations

import base64
import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import DetectionConfig, Detector, rgb_to_id
from detrkit.serving.local import load_detector
from detrkit.serving.settings import ModelSettings
from tests.conftest import make_picture
from tests.serving.conftest import NumberReader, Running, Start, number_image

IMAGE = number_image(50)


def picture_bytes() -> bytes:
    """A PNG file with something in it, small enough for the limits of these tests."""
    file = io.BytesIO()
    make_picture(90, 60).save(file, "PNG")
    return file.getvalue()


def error_of(answer) -> str:
    """The message of an answer that has nothing but an error, on one line."""
    assert answer.headers["content-type"] == "application/json"
    [(name, message)] = answer.json().items()
    assert name == "error"
    assert message
    assert "\n" not in message
    return message


def test_the_bytes_of_an_image_give_its_objects(running: Running) -> None:
    answer = running.detect(IMAGE)
    assert answer.status_code == 200
    assert answer.json() == {
        "model": "reader",
        "image": {"width": 40, "height": 30},
        "objects": [{"label": 1, "name": "number", "score": 0.5, "box": [0.5, 1.25, 20.0, 50.0]}],
    }


@pytest.mark.parametrize(
    "kind",
    ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", "IMAGE/PNG; q=1", ""],
)
def test_bytes_are_taken_under_every_type_that_clients_give_them(running: Running, kind: str) -> None:
    assert running.detect(IMAGE, headers={"content-type": kind}).status_code == 200


def test_json_and_forms_give_what_the_bytes_give(running: Running) -> None:
    text = base64.b64encode(IMAGE).decode()
    answers = [
        running.detect(IMAGE),
        running.client.post("/v1/detect", json={"image": text}),
        running.client.post("/v1/detect", json={"image": f"data:image/png;base64,{text}"}),
        running.client.post("/v1/detect", files={"image": ("photo.png", IMAGE, "image/png")}),
        running.client.post("/v1/detect", files={"image": (None, text)}),
    ]
    assert [answer.status_code for answer in answers] == [200] * len(answers)
    assert len({answer.text for answer in answers}) == 1


def test_options_reach_the_detector_and_are_its_own_otherwise(running: Running) -> None:
    assert running.detect(IMAGE, "?threshold=25e-2&overlap=1&max_objects=3").status_code == 200
    assert running.detect(IMAGE).status_code == 200
    given = {"threshold": 0.25, "overlap": 1, "max_objects": 3}
    always = {"batch_size": 4, "masks": False}
    assert running.reader.options == [always | given, always]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?threshold=high", "threshold must be between 0 and 1, not 'high'"),
        ("?threshold=1.5", "threshold must be between 0 and 1"),
        ("?threshold=nan", "threshold must be between 0 and 1"),
        ("?threshold=", "threshold must be between 0 and 1"),
        ("?threshold=0x1", "threshold must be between 0 and 1"),
        ("?overlap=0", "overlap must be above 0"),
        ("?max_objects=0", "max_objects must be at least 1"),
        ("?max_objects=2.5", "max_objects must be a whole number"),
        ("?max_objects=" + "9" * 5000, "max_objects must be a whole number"),
        ("?treshold=0.5", "did you mean 'threshold'"),
        ("?mdoel=reader", "did you mean 'model'"),
        ("?threshold=0.5&threshold=0.6", "given 2 times"),
        ("?model=other", "unknown model 'other'; available: reader"),
        ("?%0a%1b[31m=1", r"unknown parameter '\n\x1b[31m'"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_400(running: Running, query: str, message: str) -> None:
    answer = running.detect(IMAGE, query)
    assert answer.status_code == 400
    assert message in error_of(answer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the body is empty"),
        (b"no image at all", "not an image that Pillow can read"),
        (IMAGE[:60], "cannot be decoded"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "the image"),
    ],
)
def test_an_unreadable_image_is_400(running: Running, content: bytes, message: str) -> None:
    answer = running.detect(content)
    assert answer.status_code == 400
    assert message in error_of(answer)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 50_000, "not valid JSON"),
        (b"[]", "must be an object"),
        (b'{"picture": "x"}', "must be an object"),
        (b'{"image": null}', "not nothing"),
        (b'{"image": ["x"]}', "not a list"),
        (b'{"image": "http://example.com/a.png"}', "base64"),
        (b'{"image": ""}', "empty"),
        (b'{"image": "eA==", "threshold": 0.5}', "pass options in the query"),
    ],
)
def test_unusable_json_is_refused(running: Running, body: bytes, message: str) -> None:
    answer = running.client.post("/v1/detect", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 413)
    assert re.search(message, error_of(answer))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"photo": ("a.png", IMAGE)}, "unknown field 'photo'"),
        ([("image", ("a.png", IMAGE)), ("image", ("b.png", IMAGE))], "one field"),
        ([("image", ("a.png", IMAGE))] * 3, "cannot be read"),
        ({"image": ("a.png", b"")}, "empty"),
        ({"image": (None, "not base64!")}, "base64"),
    ],
)
def test_unusable_forms_are_400(running: Running, files: object, message: str) -> None:
    answer = running.client.post("/v1/detect", files=files)
    assert answer.status_code == 400
    assert message in error_of(answer)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"x"),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx'),
    ],
)
def test_a_form_that_breaks_off_is_400(running: Running, kind: str, body: bytes) -> None:
    answer = running.client.post("/v1/detect", content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    error_of(answer)


def test_too_many_bytes_or_pixels_are_413(running: Running) -> None:
    most = running.service.settings.limits.max_bytes
    assert most is not None
    in_json = json.dumps({"image": base64.b64encode(bytes(most + 1)).decode()})
    answers = [
        running.detect(bytes(40_000_000)),
        running.detect(bytes(most + 1)),
        running.client.post(
            "/v1/detect", content=iter([bytes(most)] * 3), headers={"content-type": "image/png"}
        ),
        running.client.post("/v1/detect", content=in_json, headers={"content-type": "application/json"}),
        running.client.post("/v1/detect", files={"image": ("a.png", bytes(most + 1))}),
        running.detect(number_image(1, 200, 200)),
    ]
    assert [answer.status_code for answer in answers] == [413] * len(answers)
    assert "10000 pixels" in error_of(answers[-1])
    assert all(f"more than {most} bytes" in error_of(answer) for answer in answers[:-1])


@pytest.mark.parametrize("kind", ["text/plain", "video/mp4", "application/xml", "image"])
def test_another_content_type_is_415(running: Running, kind: str) -> None:
    answer = running.detect(IMAGE, headers={"content-type": kind})
    assert answer.status_code == 415
    assert "must be an image type" in error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/detect", 405),
        ("PUT", "/v1/segment", 405),
        ("POST", "/health/live", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/", 404),
        ("POST", "/v1/detect/", 404),
        ("POST", "/v1/classify", 404),
    ],
)
def test_other_paths_and_methods_get_json_too(running: Running, method: str, path: str, status: int) -> None:
    answer = running.client.request(method, path, follow_redirects=False)
    assert answer.status_code == status
    assert error_of(answer)
    assert status != 405 or answer.headers["allow"]


def test_a_model_without_masks_does_not_segment(running: Running) -> None:
    answer = running.client.post("/v1/segment", content=IMAGE, headers={"content-type": "image/png"})
    assert answer.status_code == 400
    assert "masks need a panoptic model" in error_of(answer)


def test_segments_come_with_their_png(start: Start) -> None:
    running = start(NumberReader(has_masks=True))
    post = {"content": IMAGE, "headers": {"content-type": "image/png"}}
    answer = running.client.post("/v1/segment?threshold=0.3", **post).json()
    box, rest = [3, 2, 9, 5], {"label": 1, "name": "number", "score": 0.9}
    assert answer["segments"] == [{"id": 50, **rest, "isthing": True, "area": 18, "box": box}]
    assert answer["objects"] == [{**rest, "box": box}]
    assert (answer["model"], answer["image"]) == ("reader", {"width": 40, "height": 30})
    ids = rgb_to_id(np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["panoptic"])))))
    assert ids.shape == (30, 40)
    assert (ids == 50).sum() == 18
    assert running.reader.options == [{"batch_size": 4, "threshold": 0.3}]
    refused = running.client.post("/v1/segment?overlap=0.5", **post)
    assert refused.status_code == 400
    assert "unknown parameter 'overlap'" in error_of(refused)


def test_a_model_that_works_in_tiles_gets_the_image_as_it_is(start: Start) -> None:
    reader = NumberReader()
    reader.detection_config = DetectionConfig(tile_size=20)
    running = start(reader)
    assert running.detect(IMAGE).json()["objects"][0]["score"] == 0.5
    assert reader.images[0].size == (40, 30)
    assert running.detect(IMAGE[:60]).status_code == 400


def test_models_are_chosen_by_name_and_the_first_is_the_default(start: Start) -> None:
    readers = {"first": NumberReader(), "second": NumberReader()}
    running = start(models={"a": "first", "b": "second"}, load=lambda model, settings: readers[model])
    assert [running.detect(IMAGE, query).json()["model"] for query in ("", "?model=b", "?model=a")] == [
        "a",
        "b",
        "a",
    ]
    assert (len(readers["first"].batches), len(readers["second"].batches)) == (2, 1)
    told = running.client.get("/v1/model?model=b").json()
    assert (told["model"], told["models"], told["masks"]) == ("b", ["a", "b"], False)
    assert told["classes"] == [{"label": 1, "name": "number"}]
    assert told["detection_config"]["threshold"] == 0.25
    assert told["limits"] == {"max_pixels": 10_000, "max_bytes": 20_000}
    refused = running.client.get("/v1/model?model=c")
    assert refused.status_code == 400
    assert "available: a, b" in error_of(refused)


def test_metrics_are_what_prometheus_reads(running: Running) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    for content in (IMAGE, IMAGE, b"x"):
        running.detect(content)
    running.client.get("/" + "x" * 50)
    answer = running.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["detrkit_requests_total", "/v1/detect", "200"] == 2
    assert samples["detrkit_requests_total", "/v1/detect", "400"] == 1
    assert samples["detrkit_requests_total", "404", "other"] == 1
    assert samples["detrkit_request_seconds_count", "/v1/detect"] == 3
    assert samples["detrkit_stage_seconds_count", "model"] == 2
    assert samples["detrkit_images_total", "reader"] == 2
    assert (samples["detrkit_pending_requests",], samples["detrkit_ready",]) == (0, 1)


def test_the_description_is_valid_and_names_every_path(running: Running) -> None:
    document = running.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    routes = {
        "/v1/detect": "post", "/v1/segment": "post", "/v1/model": "get", "/health/live": "get",
        "/health/ready": "get", "/metrics": "get", "/openapi.json": "get",
    }  # fmt: skip
    assert {path: next(iter(entry)) for path, entry in document["paths"].items()} == routes
    schemas = document["components"]["schemas"]
    references = re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document))
    assert references
    assert set(references) <= set(schemas)
    answer = running.detect(IMAGE).json()
    assert set(answer) == set(schemas["Detections"]["required"])
    assert set(answer["objects"][0]) == set(schemas["Object"]["required"])
    assert set(running.client.get("/v1/model").json()) == set(schemas["Model"]["required"])


def test_the_request_id_is_the_clients_or_a_new_one(running: Running) -> None:
    given = running.detect(IMAGE, headers={"x-request-id": "job-7.a"})
    assert given.headers["x-request-id"] == "job-7.a"
    others = {
        running.detect(IMAGE, headers={"x-request-id": "a b"}).headers["x-request-id"] for _ in range(2)
    }
    assert len(others) == 2
    assert "a b" not in others


def test_clients_at_once_get_their_own_answers(running: Running) -> None:
    def ask(number: int) -> float:
        content = number_image(number, 40 + number % 3, 30)
        return running.detect(content).json()["objects"][0]["score"]

    numbers = list(range(60)) * 2
    with ThreadPoolExecutor(24) as pool:
        scores = list(pool.map(ask, numbers))
    assert scores == [pytest.approx(number / 100) for number in numbers]
    assert sorted(number for batch in running.reader.batches for number in batch) == sorted(numbers)


def test_the_models_own_detection_settings_count_unless_the_request_says_otherwise(
    start: Start, tiny_detr: Path
) -> None:
    detector = Detector.from_pretrained(tiny_detr, device="cpu")
    detector.detection_config = DetectionConfig(threshold={"cat": 0.2}, overlap=0.5)
    running = start(load=lambda model, settings: detector)
    content, counts = picture_bytes(), []
    for query, options in (("", {}), ("?threshold=0.1&overlap=1", {"threshold": 0.1, "overlap": 1})):
        found = detector(content, masks=False, **options)
        answer = running.detect(content, query).json()
        assert [one["score"] for one in answer["objects"]] == pytest.approx(found.scores.tolist())
        counts.append(len(found))
    assert 0 < counts[0] < counts[1]


@pytest.mark.parametrize("kind", ["detr", "panoptic"])
def test_answers_are_what_the_detector_finds(
    start: Start, kind: str, tiny_detr: Path, tiny_panoptic: Path, tmp_path: Path
) -> None:
    folder = tiny_detr if kind == "detr" else tiny_panoptic
    path = tmp_path / "picture.png"
    make_picture(120, 80).save(path)
    detector = Detector.from_pretrained(folder, device="cpu")
    running = start(
        load=lambda model, settings: load_detector(str(folder), ModelSettings(models={}, device="cpu"))
    )
    found = detector(path, threshold=0.3, max_objects=4, masks=False)
    answer = running.detect(path.read_bytes(), "?threshold=0.3&max_objects=4").json()
    assert 0 < len(found) == len(answer["objects"])
    assert [one["name"] for one in answer["objects"]] == found.names
    assert np.float32([one["score"] for one in answer["objects"]]).tolist() == found.scores.tolist()
    assert np.float32([one["box"] for one in answer["objects"]]).tolist() == found.boxes.tolist()
    if kind == "panoptic":
        wanted = detector.segment(path, threshold=0.1)
        post = {"content": path.read_bytes(), "headers": {"content-type": "image/png"}}
        answer = running.client.post("/v1/segment?threshold=0.1", **post).json()
        png = Image.open(io.BytesIO(base64.b64decode(answer["panoptic"])))
        assert (rgb_to_id(np.asarray(png)) == wanted.ids).all()
        assert [one["name"] for one in answer["segments"]] == wanted.names
