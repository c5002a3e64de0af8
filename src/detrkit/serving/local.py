"""Models in this process: loaded once, each batch run by the one thread of the batcher."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

from detrkit.common.errors import ImageError, SettingError
from detrkit.common.schema import JsonObject
from detrkit.inference.predictions import no_masks
from detrkit.inference.prepared import read_image
from detrkit.inference.requests import (
    RequestOptions,
    object_entries,
    segment_entries,
    things,
)
from detrkit.results.detections import Detections
from detrkit.results.panoptic import PanopticSegmentation
from detrkit.serving.backend import Answer, Kind, Task
from detrkit.serving.batching import Batcher
from detrkit.serving.problems import refusal
from detrkit.serving.settings import ModelSettings

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.detector import Detector
    from detrkit.inference.prepared import PreparedImage

Load: TypeAlias = "Callable[[str, ModelSettings], Detector]"

_Image: TypeAlias = "PreparedImage | Image"
_Found: TypeAlias = Detections | PanopticSegmentation
_Made = TypeVar("_Made")


class _BatchKind(NamedTuple):
    """What images that go through a model together have in common."""

    kind: Kind
    model: str
    options: RequestOptions
    size: tuple[int, ...]


def load_detector(model: str, settings: ModelSettings) -> Detector:
    """Loads a model as a server's settings say.

    Raises:
        DetrkitError: It cannot be loaded.
    """
    from detrkit.inference.detector import Detector

    return Detector.from_pretrained(
        model,
        engine=settings.engine,
        device=settings.device,
        dtype=settings.dtype,
        revision=settings.revision,
        queries=settings.queries,
        limits=settings.limits,
    )


class LocalBackend:
    """Answers tasks with models of this process."""

    def __init__(self, settings: ModelSettings, load: Load = load_detector) -> None:
        """Loads nothing yet.

        Args:
            settings: Which models, and how they are run.
            load: What loads a model.
        """
        self._settings, self._load = settings, load
        self._detectors: dict[str, Detector] = {}
        self._batcher: Batcher[_Image, _Found] = Batcher(
            self._run, size=settings.batch_size, max_wait=settings.max_wait
        )

    async def start(self) -> None:
        """See :meth:`detrkit.serving.backend.Backend.start`."""
        self._detectors = await in_daemon_thread(self._load_all)
        self._batcher.start()

    async def stop(self) -> None:
        """See :meth:`detrkit.serving.backend.Backend.stop`."""
        await self._batcher.stop()

    async def answer(self, task: Task) -> Answer:
        """See :meth:`detrkit.serving.backend.Backend.answer`."""
        detector = self._detectors[task.model]
        if task.kind == "segment" and not detector.has_masks:
            raise refusal(no_masks())

        try:
            finished = await self._batcher.submit(partial(self._read, task, detector))
        except (ImageError, SettingError) as error:
            raise refusal(error) from error
        return Answer(await asyncio.to_thread(_document, finished.result), finished.times)

    def describe(self, model: str) -> JsonObject:
        """See :meth:`detrkit.serving.backend.Backend.describe`."""
        detector = self._detectors[model]
        return {
            "family": detector.config.model_type,
            "classes": [{"label": one["id"], "name": one["name"]} for one in detector.categories()],
            "masks": detector.has_masks,
            "detection_config": detector.detection_config.decisions(),
        }

    def _read(self, task: Task, detector: Detector) -> tuple[_BatchKind, _Image]:
        """The image of a task, and what it has in common with those that it can be run with."""
        content, turn = task.upload.image(self._settings.limits.max_bytes), self._settings.exif_orientation
        image: _Image
        if task.kind == "detect" and detector.detection_config.tile_size is not None:
            # The detector cuts tiles from the image as it is, and prepares these.
            image = read_image(content, exif_orientation=turn, limits=detector.limits)
            size = image.size
        else:
            image = detector.prepare(content, exif_orientation=turn)
            size = image.frame.padded_size
            # Here, as it would refuse the whole batch: only segmentation looks at whole images.
            detector.detection_config.check_whole(image.frame.image_size, None)
        return _BatchKind(task.kind, task.model, task.options, size), image

    def _load_all(self) -> dict[str, Detector]:
        return {name: self._load(model, self._settings) for name, model in self._settings.models.items()}

    def _run(self, kind: Hashable, images: Sequence[_Image]) -> Sequence[_Found]:
        """The results of images of one processed size."""
        assert isinstance(kind, _BatchKind)
        detector, options = self._detectors[kind.model], kind.options.given()
        size = self._settings.batch_size
        if kind.kind == "segment":
            return list(detector.stream_segments(images, batch_size=size, **options))
        return list(detector.stream(images, batch_size=size, masks=False, **options))


def _document(found: _Found) -> JsonObject:
    """The content of an answer."""
    height, width = found.image_size
    document: dict[str, object] = {"image": {"width": width, "height": height}}
    if isinstance(found, Detections):
        return {**document, "objects": object_entries(found)}
    segments = segment_entries(found)
    with io.BytesIO() as file:
        found.to_png().save(file, format="PNG")
        png = base64.b64encode(file.getvalue()).decode()
    return {**document, "objects": things(segments), "segments": segments, "panoptic": png}


async def in_daemon_thread(function: Callable[[], _Made]) -> _Made:
    """What a function gives in a thread that no end of the process waits for, unlike an executor's."""
    loop = asyncio.get_running_loop()
    made: asyncio.Future[_Made] = loop.create_future()

    def settle(result: _Made) -> None:
        if not made.done():
            made.set_result(result)

    def fail(error: BaseException) -> None:
        if not made.done():
            made.set_exception(error)

    def call() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            try:
                result = function()
            except BaseException as error:
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=call, name="detrkit-load", daemon=True).start()
    return await made
