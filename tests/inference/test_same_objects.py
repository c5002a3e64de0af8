"""The same detection settings give the same objects, whatever runs the model and whoever asks."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detrkit import DetectionConfig, Detector, pipeline
from tests.conftest import make_picture, read_json

WHOLE = DetectionConfig(
    threshold={"N/A": 0.99, "cat": 0.975, "remote": 0.3, "couch": 0.3},
    overlap=0.4,
    class_agnostic=True,
    max_objects=7,
    calibration={"cat": [(0.0, 0.0), (0.5, 0.35), (1.0, 1.0)], "couch": [(0.0, 0.1), (1.0, 0.9)]},
)
CONFIGS = {"whole": WHOLE, "tiles": replace(WHOLE, tile_size=(60, 80), tile_overlap=0.3)}

Objects = list[tuple[str, float, list[float]]]
"""Class name, score and xyxy box in pixels of each object, the best first."""


class Asked:
    """A model with detection settings, asked for the objects of one image in all ways.

    Attributes:
        model: Folder of the model and its settings.
        exported: The same of the model as it was exported for onnxruntime.
        image: The image file.
        folder: An empty folder.
    """

    def __init__(self, model: Path, exported: Path, image: Path, folder: Path) -> None:
        self.model, self.exported, self.image, self.folder = model, exported, image, folder

    def detector(self, engine: str = "torch", model: Path | None = None) -> Objects:
        return objects(Detector.from_pretrained(model or self.model, engine=engine, device="cpu")(self.image))

    def command(self) -> Objects:
        from detrkit.cli import run

        document = self.folder / "out.json"
        assert run(["detect", str(self.image), "--model", str(self.model), "--json", str(document)]) == 0
        return entries(read_json(document))

    def page(self) -> Objects:
        from detrkit.demo.results import Result

        detector = Detector.from_pretrained(self.model, device="cpu")
        document = Result.of(str(self.image), "image.png", detector, "model").boxes(None).document
        assert document is not None
        return entries(document)

    def http(self) -> Objects:
        testclient = pytest.importorskip("starlette.testclient")
        from detrkit.serving.app import build_app
        from detrkit.serving.local import LocalBackend
        from detrkit.serving.service import Service
        from detrkit.serving.settings import ModelSettings
        from tests.conftest import wait_until

        models = {"tiny": str(self.model)}
        service = Service(LocalBackend(ModelSettings(models=models, device="cpu")), models)
        with testclient.TestClient(build_app(service)) as client:
            wait_until(lambda: service.ready)
            answer = client.post("/v1/detect", content=self.image.read_bytes()).json()
        return [(one["name"], one["score"], one["box"]) for one in answer["objects"]]

    def cluster(self) -> Objects:
        pytest.importorskip("ray")
        from detrkit.inference.cluster import RayDetector

        detector = RayDetector(self.model, address="local", workers=1, cpus=1, device="cpu")
        [found] = detector.stream([self.image], masks=False)
        return objects(found)


def objects(found: Any) -> Objects:
    return [(one.name, one.score, one.box.tolist()) for one in found]


def entries(document: Any) -> Objects:
    names = {one["id"]: one["name"] for one in document["categories"]}
    found = []
    for one in document["annotations"]:
        x, y, width, height = one["bbox"]
        found.append((names[one["category_id"]], one["score"], [x, y, x + width, y + height]))
    return found


WAYS: dict[str, Callable[[Asked], Objects]] = {
    "onnx": lambda asked: asked.detector("onnx", asked.exported),
    "openvino": lambda asked: asked.detector("openvino", asked.exported),
    "command": Asked.command,
    "page": Asked.page,
    "http": Asked.http,
}
SLOW: dict[str, Callable[[Asked], Objects]] = {
    "compile": lambda asked: asked.detector("compile"),
    "cluster": Asked.cluster,
}


@pytest.fixture(scope="module")
def exported(tiny_deformable_detr: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from detrkit.checkpoints.loading import load_pretrained
    from detrkit.engines.export import export_model

    out = tmp_path_factory.mktemp("exported") / "onnx"
    model, processor = load_pretrained(str(tiny_deformable_detr), None)
    export_model(model, out, "onnx", processor=processor, verify=False)
    return out


@pytest.fixture(params=CONFIGS)
def asked(
    request: pytest.FixtureRequest, tiny_deformable_detr: Path, exported: Path, tmp_path: Path
) -> Asked:
    shutil.copytree(tiny_deformable_detr, tmp_path / "model")
    for model in (tmp_path / "model", exported):
        CONFIGS[request.param].save_pretrained(model)
    make_picture(150, 110, seed=3).save(tmp_path / "image.png")
    return Asked(tmp_path / "model", exported, tmp_path / "image.png", tmp_path)


@pytest.mark.parametrize("way", [*WAYS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_way_of_asking_gives_the_same_objects(asked: Asked, way: str) -> None:
    wanted, found = asked.detector(), {**WAYS, **SLOW}[way](asked)
    assert [name for name, *_ in found] == [name for name, *_ in wanted]
    np.testing.assert_allclose([score for _, score, _ in found], [score for _, score, _ in wanted], atol=1e-4)
    np.testing.assert_allclose([box for *_, box in found], [box for *_, box in wanted], atol=0.01)


def test_pipelines_and_endpoints_give_the_same_objects_in_whole_pixels(
    tiny_deformable_detr: Path, tmp_path: Path
) -> None:
    from detrkit.endpoint import EndpointHandler

    shutil.copytree(tiny_deformable_detr, tmp_path / "model")
    WHOLE.save_pretrained(tmp_path / "model")
    image = make_picture(150, 110, seed=3)
    content = io.BytesIO()
    image.save(content, "PNG")
    wanted = objects(Detector.from_pretrained(tmp_path / "model", device="cpu")(image))
    names, scores, boxes = zip(*wanted)
    by_endpoint = EndpointHandler(str(tmp_path / "model"))({"inputs": content.getvalue()})
    by_pipeline = pipeline("object-detection", model=str(tmp_path / "model"), device="cpu")(image)
    for found in (by_endpoint, by_pipeline):
        assert [one["label"] for one in found] == list(names)
        np.testing.assert_allclose([one["score"] for one in found], scores, atol=1e-4)
        np.testing.assert_allclose([list(one["box"].values()) for one in found], boxes, atol=1.01)


SETTINGS = ("threshold", "overlap", "class_agnostic", "max_objects", "calibration", "tile_size")


def test_each_of_the_settings_matters_here(tiny_deformable_detr: Path) -> None:
    detector, image = Detector.from_pretrained(tiny_deformable_detr), make_picture(150, 110, seed=3)
    config = CONFIGS["tiles"]
    wanted = objects(detector.with_config(config)(image))
    assert len(wanted) == config.max_objects
    for name in SETTINGS:
        other = replace(config, **{name: getattr(DetectionConfig(), name)})
        assert objects(detector.with_config(other)(image)) != wanted, name
