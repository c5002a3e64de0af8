"""A server in this process, whose model reads a number off each image."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detrkit import DetectionConfig, Detections, DetrConfig, ImageLimits, PanopticSegmentation
from detrkit.inference.prepared import ImageFrame, PreparedImage, read_image
from detrkit.serving.app import build_app
from detrkit.serving.local import LocalBackend
from detrkit.serving.service import Service
from detrkit.serving.settings import ModelSettings, ServiceSettings
from tests.conftest import wait_until

LIMITS = ImageLimits(max_pixels=10_000, max_bytes=20_000)


def number_image(number: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG file that ``NumberReader`` reads a number from 0 to 255 off."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def image_number(image: PreparedImage | Image.Image) -> int:
    return image.getpixel((0, 0))[0] if isinstance(image, Image.Image) else image.pixel_values


def size_of(image: PreparedImage | Image.Image) -> tuple[int, int]:
    """Height and width."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.frame.image_size


class NumberReader:
    """Stands in for a detector: one object, whose score is the image's number in hundredths.

    Attributes:
        batches: Numbers of the images that were run together.
        images: All that were run.
        options: Of each run.
        gate: Runs wait until it is set.
    """

    names: dict[int, str] = {0: "N/A", 1: "number"}  # noqa: RUF012
    detection_config = DetectionConfig(threshold=0.25)

    def __init__(self, *, has_masks: bool = False, limits: ImageLimits = LIMITS) -> None:
        self.has_masks, self.limits, self.config = has_masks, limits, DetrConfig()
        self.batches: list[list[int]] = []
        self.images: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()

    def categories(self) -> list[dict[str, Any]]:
        return [{"id": 1, "name": "number"}]

    def prepare(self, image: bytes, exif_orientation: bool = False) -> PreparedImage:
        read = read_image(image, exif_orientation=exif_orientation, limits=self.limits)
        size = read.height, read.width
        frame = ImageFrame(
            image_size=size,
            processed_size=size,
            padded_size=size,
            source=None,
            exif_orientation=exif_orientation,
        )
        return PreparedImage(pixel_values=read.getpixel((0, 0))[0], pixel_mask=None, frame=frame)

    def _run(self, images: list[PreparedImage], options: dict[str, Any]) -> list[int]:
        numbers = [image_number(image) for image in images]
        assert len({size_of(image) for image in images}) == 1
        self.images += images
        self.batches.append(numbers)
        self.options.append(options)
        assert self.gate.wait(60)
        if 66 in numbers:
            raise ZeroDivisionError("a secret of the model")
        return numbers

    def stream(self, images: list[PreparedImage], **options: Any) -> Iterator[Detections]:
        for number, image in zip(self._run(images, options), images):
            yield Detections(
                boxes=np.array([[0.5, 1.25, 20, number]], np.float32),
                scores=np.array([number / 100], np.float32),
                labels=np.array([1]),
                names=["number"],
                image_size=size_of(image),
            )

    def stream_segments(self, images: list[PreparedImage], **options: Any) -> Iterator[PanopticSegmentation]:
        for number, image in zip(self._run(images, options), images):
            ids = np.zeros(size_of(image), np.int32)
            ids[2:5, 3:9] = number
            yield PanopticSegmentation(
                ids=ids,
                segments=[{"id": number, "category_id": 1, "isthing": True, "area": 18, "score": 0.9}],
                names=["number"],
                image_size=size_of(image),
            )


class Running:
    """A server in this process: ``client`` talks to it, ``service`` is its state."""

    def __init__(self, client: Any, service: Service, reader: NumberReader) -> None:
        self.client, self.service, self.reader = client, service, reader

    def detect(self, content: bytes, query: str = "", **options: Any) -> Any:
        """POSTs the bytes of an image."""
        headers = {"content-type": "image/png"} | options.pop("headers", {})
        return self.client.post(f"/v1/detect{query}", content=content, headers=headers, **options)


Start = Callable[..., Running]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a server whose models are all one number reader."""
    testclient = pytest.importorskip("starlette.testclient")
    pytest.importorskip("prometheus_client")
    pytest.importorskip("python_multipart")
    with contextlib.ExitStack() as stack:

        def start_it(
            reader: NumberReader | None = None,
            *,
            models: dict[str, str] | None = None,
            load: Callable[..., Any] | None = None,
            wait: bool = True,
            settings: dict[str, Any] | None = None,
            **service_settings: Any,
        ) -> Running:
            reader = reader or NumberReader()
            named = models or {"reader": "a-folder"}
            limits = {"limits": reader.limits}
            backend = LocalBackend(
                replace(ModelSettings(models=named, **limits), **(settings or {})),
                load or (lambda model, settings: reader),
            )
            service = Service(backend, named, ServiceSettings(**limits, **service_settings))
            client = stack.enter_context(testclient.TestClient(build_app(service)))
            if wait:
                wait_until(lambda: service.ready or service.failure)
            return Running(client, service, reader)

        yield start_it


@pytest.fixture
def running(start: Start) -> Running:
    return start()
