"""Detection on many machines at once, with Ray Data.

Workers hold the model and read the images themselves, so every machine must find these under the same name:
on shared storage, or at an address. The results come back to the process that asked, as they
are made. What a worker or a machine had not finished when it was lost is done again by the others.

Example:
    ```python
    from detrkit.inference.cluster import RayDetector

    detector = RayDetector("facebook/detr-resnet-50", address="head-node:6379")
    for position, found in detector.results(paths, threshold=0.7):
        print(paths[position], found)
    ```
"""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from detrkit.common.errors import DetrkitError, ImageError, SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.text import is_url
from detrkit.inference.ray_connection import AUTO, connect, import_ray, shares
from detrkit.inference.tiles import Tiles, with_tiles
from detrkit.results.detection_config import DetectionConfig, DetectionRule, Threshold
from detrkit.results.detections import Detections
from detrkit.results.panoptic import PanopticSegmentation

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from detrkit.common.schema import Category
    from detrkit.inference.detector import Detector
    from detrkit.processing.array_processor import ArrayImageProcessor
    from detrkit.processing.image_processor import DetrImageProcessorBase

Found: TypeAlias = Detections | PanopticSegmentation | ImageError
"""What is in an image, or why it cannot be read."""

_Result = TypeVar("_Result", Detections, PanopticSegmentation)

# A worker does so many images at a time, and what it was doing is done again when it is lost: few enough for
# that, many enough for the cost of handing them over. A long job has larger portions, so that their number
# stays within what one process can keep track of.
_PORTION = 16
_MOST_PORTIONS = 20_000


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a worker needs to load its detector.

    Attributes:
        threads: Threads for PyTorch; None leaves it to the engine and its device.
    """

    model: str
    engine: str | None
    device: str | None
    dtype: str | None
    revision: str | None
    queries: int | None
    limits: ImageLimits
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What a worker does with images.

    Attributes:
        segments: Whether it segments, rather than detects.
        options: Of ``Detector.stream`` or ``stream_segments``.
        exif_orientation: Turn each image as its EXIF entry says.
        config: What turns scores into detections.
    """

    segments: bool
    options: dict[str, Any]
    exif_orientation: bool
    config: DetectionConfig


class RayDetector:
    """A model on the machines of a Ray cluster; gives what :class:`detrkit.Detector` gives.

    Attributes:
        config: The model's configuration.
        names: Class id -> class name.
        has_masks: Whether the model gives masks, so that it can segment.
        detection_config: What turns scores into detections where a call does not say otherwise.
        workers: Maximum number of processes that hold the model.
        cpus: Cores of each.
        gpus: Graphics cards of each, 0 or 1.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        address: str = AUTO,
        workers: int | None = None,
        cpus: int | None = None,
        engine: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        queries: int | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        """Connects to a cluster; the workers start with the first images.

        Args:
            model: A Hub id, a short name, or a folder that every machine finds under this name.
            address: The cluster's head, "host:port" or "ray://host:port". "auto" stands for the cluster that
                this process is connected to, that the variable RAY_ADDRESS names or that runs on this
                machine, and starts one on this machine if there is none; "local" always starts one.
            workers: Maximum number of processes that hold the model; by default as many as there are cores or
                cards for.
            cpus: Cores of each; by default those of the smallest machine, up to 8.
            engine: As for ``Detector.from_pretrained``, like the others.
            device: By default a graphics card for each worker where the cluster has some.
            dtype: "float32" (the default), "float16" or "bfloat16".
            revision: Branch, tag or commit on the Hub.
            queries: As for ``Detector.from_pretrained``.
            limits: Maximum size of image files, and the addresses that may be opened; None for the defaults.

        Raises:
            MissingExtraError: Ray is not installed.
            SettingError: The cluster cannot be reached, or does not have the requested cores.
            CheckpointError: The model cannot be found, read or used.
        """
        from detrkit.checkpoints.loading import read_detection_config, read_model_files
        from detrkit.checkpoints.registry import resolve_model
        from detrkit.engines.names import ENGINES

        if engine not in (None, *ENGINES):  # its packages must be where the workers are, not here
            raise SettingError(f"unknown engine {engine!r}; use one of: {', '.join(ENGINES)}")
        ray = import_ray()
        name = resolve_model(os.fspath(model))
        if os.path.isdir(name):  # noqa: PTH112 - a Hub id is not a path
            name = os.path.abspath(name)  # noqa: PTH100 - workers have a working directory of their own
        files = read_model_files(name, revision, queries)
        self.config = files.config
        self.names = {int(label): str(text) for label, text in self.config.id2label.items()}
        self.has_masks = files.has_masks
        self.detection_config = read_detection_config(name, revision)
        DetectionRule(self.detection_config, self.names)  # a class that the model does not have
        connect(ray, address)
        self.workers, self.cpus, self.gpus = shares(ray.nodes(), workers, cpus, device)
        on_cpu = not self.gpus
        self._settings = _Settings(
            model=name,
            engine=engine,
            device=device or ("cpu" if on_cpu else None),
            dtype=dtype,
            revision=revision,
            queries=queries,
            limits=limits or ImageLimits(),
            threads=self.cpus if on_cpu else None,
        )

    def __repr__(self) -> str:
        return f"RayDetector({self._settings.model}, {self.workers} workers of {self.cpus} cores)"

    def results(
        self,
        sources: Sequence[str | os.PathLike[str]],
        threshold: Threshold | None = None,
        batch_size: int = 1,
        *,
        masks: bool = False,
        max_objects: int | None = None,
        overlap: float | None = None,
        class_agnostic: bool | None = None,
        tiles: Tiles = None,
        segments: bool = False,
        exif_orientation: bool = False,
    ) -> Iterator[tuple[int, Found]]:
        """What is in each image, in the order in which they get done.

        Args:
            sources: Paths or addresses of images.
            threshold: As for a call of ``Detector``, with segments 0.85 by default.
            batch_size: Maximum number of images that go through the model at once.
            masks: Whether to give a mask for each object.
            max_objects: As for a call of ``Detector``, like the next three.
            overlap: See there.
            class_agnostic: See there.
            tiles: See there.
            segments: Give a ``PanopticSegmentation`` instead of ``Detections``.
            exif_orientation: Turn each image as its EXIF entry says.

        Returns:
            An iterator of the position in ``sources`` and the result, or the ``ImageError`` of an image that
            cannot be read. Each position comes once.

        Raises:
            SettingError: A number is out of range, or the model gives no masks.
            DetrkitError: The workers cannot go on.
        """
        from detrkit.inference.predictions import no_masks
        from detrkit.inference.prepared import check_numbers

        check_numbers(0, batch_size)
        if (masks or segments) and not self.has_masks:
            raise no_masks()
        options: dict[str, Any] = {"batch_size": batch_size}
        config = self.detection_config
        if segments:
            options["threshold"] = 0.85 if threshold is None else threshold
        else:
            options["masks"] = masks
            config = config.with_options(
                threshold=threshold, max_objects=max_objects, overlap=overlap, class_agnostic=class_agnostic
            )
            config = with_tiles(config, tiles, self._load_processor)
            DetectionRule(config, self.names)  # a class that the model does not have
        work = _Work(segments=segments, options=options, exif_orientation=exif_orientation, config=config)
        return self._results([_for_workers(source) for source in sources], work)

    def with_config(self, config: DetectionConfig, tiles: Tiles = None) -> RayDetector:
        """The same detector with other detection settings, see :meth:`detrkit.Detector.with_config`."""
        DetectionRule(config, self.names)
        other = copy.copy(self)
        other.detection_config = with_tiles(config, tiles, self._load_processor)
        return other

    def categories(self, found: Collection[int] = ()) -> list[Category]:
        """The model's classes for a COCO document, see :meth:`detrkit.Detector.categories`."""
        from detrkit.inference.predictions import listed_categories

        maps = None
        if self.has_masks:
            maps = getattr(self.config, "is_thing_map", None), self._load_processor().is_thing_map
        return listed_categories(self.names, found, maps)

    def _load_processor(self) -> DetrImageProcessorBase | ArrayImageProcessor:
        from detrkit.checkpoints.opening import open_processor

        return open_processor(self._settings.model, self._settings.revision)

    def stream(
        self,
        images: Iterable[str | os.PathLike[str]],
        threshold: Threshold | None = None,
        batch_size: int = 1,
        *,
        masks: bool | None = None,
        max_objects: int | None = None,
        overlap: float | None = None,
        class_agnostic: bool | None = None,
        tiles: Tiles = None,
        exif_orientation: bool = False,
    ) -> Iterator[Detections]:
        """Like ``Detector.stream``: the results in the order of the images, which must be files or addresses.

        Results that came before those of earlier images are held in memory until these are there.
        """
        with_masks = self.has_masks if masks is None else masks
        options: dict[str, Any] = {"masks": with_masks, "max_objects": max_objects, "overlap": overlap}
        options |= {"class_agnostic": class_agnostic, "tiles": tiles}
        found = self.results(
            list(images), threshold, batch_size, exif_orientation=exif_orientation, **options
        )
        return _in_order(found, Detections)

    def stream_segments(
        self,
        images: Iterable[str | os.PathLike[str]],
        threshold: float = 0.85,
        batch_size: int = 1,
        *,
        exif_orientation: bool = False,
    ) -> Iterator[PanopticSegmentation]:
        """Like ``Detector.stream_segments``, with images as for :meth:`stream`."""
        found = self.results(
            list(images), threshold, batch_size, segments=True, exif_orientation=exif_orientation
        )
        return _in_order(found, PanopticSegmentation)

    def _results(self, sources: list[str], work: _Work) -> Iterator[tuple[int, Found]]:
        import ray
        from ray.data import ActorPoolStrategy

        if not sources:
            return
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        portions = min(math.ceil(len(sources) / _PORTION), _MOST_PORTIONS)
        rows = [{"position": i, "source": source} for i, source in enumerate(sources)]
        done = ray.data.from_items(rows, override_num_blocks=portions).map_batches(
            _Worker,
            fn_constructor_args=(self._settings, work),
            batch_size=None,
            compute=ActorPoolStrategy(min_size=1, max_size=self.workers, max_tasks_in_flight_per_actor=2),
            num_cpus=self.cpus,
            num_gpus=self.gpus,
        )
        given: set[int] = set()
        try:
            for batch in done.iter_batches(batch_size=None, batch_format="numpy"):
                for position, result in zip(batch["position"].tolist(), batch["result"]):
                    if position in given:
                        continue
                    given.add(position)
                    found = pickle.loads(result)  # written by our own worker a moment ago
                    if isinstance(found, _Failure):
                        raise DetrkitError(found.message)
                    yield position, found
        except ray.exceptions.RayError as error:
            raise _readable(error) from error
        if len(given) < len(sources):
            raise DetrkitError(
                f"{len(sources) - len(given)} of {len(sources)} images were lost with a machine of the "
                "cluster; run the same command again with --resume"
            )


@dataclass(frozen=True)
class _Failure:
    """Why a worker can do nothing, sent like a result; what a worker raises Ray prints in full."""

    message: str


class _Worker:
    """A process that holds the detector and does one portion of the images after another."""

    def __init__(self, settings: _Settings, work: _Work) -> None:
        import torch

        from detrkit.inference.detector import Detector

        if settings.threads is not None:
            # As many as a run on one machine of this size would use, whatever Ray has set: sums of another
            # number of threads may differ in their last digits.
            torch.set_num_threads(settings.threads)
        self.failure: _Failure | None = None
        try:
            detector = Detector.from_pretrained(
                settings.model,
                engine=settings.engine,
                device=settings.device,
                dtype=settings.dtype,
                revision=settings.revision,
                queries=settings.queries,
                limits=settings.limits,
            )
            self.detector: Detector = detector.with_config(work.config)
        except DetrkitError as error:
            self.failure = _Failure(str(error))
            return
        stream: Callable[..., Iterator[Detections | PanopticSegmentation]] = self.detector.stream
        if work.segments:
            stream = self.detector.stream_segments
        self.stream = partial(stream, **work.options)
        self.exif_orientation = work.exif_orientation

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int] | list[bytes]]:
        """Positions and sources in, positions and pickled results out."""
        positions = [int(position) for position in batch["position"]]
        results: Sequence[Found | _Failure | None] = [self.failure] * len(positions)
        if self.failure is None:
            try:
                results = self._results([str(source) for source in batch["source"]])
            except DetrkitError as error:
                results = [_Failure(str(error))] * len(positions)
        return {"position": positions, "result": [pickle.dumps(result) for result in results]}

    def _results(self, sources: list[str]) -> list[Found]:
        from detrkit.inference.prepared import read_image

        results: dict[int, Found] = {}
        readable: list[int] = []

        def images() -> Iterator[Image]:
            for place, source in enumerate(sources):
                try:
                    image = read_image(
                        source, exif_orientation=self.exif_orientation, limits=self.detector.limits
                    )
                except ImageError as error:
                    results[place] = ImageError(str(error))
                else:
                    readable.append(place)
                    yield image

        for number, result in enumerate(self.stream(images())):
            result.source = sources[readable[number]]
            results[readable[number]] = result
        return [results[place] for place in range(len(sources))]


def _for_workers(source: str | os.PathLike[str]) -> str:
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise ImageError(f"workers of a cluster read files and addresses, not {kind}; name the file")
    text = os.fspath(source)
    return text if is_url(text) or "://" in text else os.path.abspath(text)  # noqa: PTH100 - links stay as they are


def _in_order(found: Iterable[tuple[int, Found]], kind: type[_Result]) -> Iterator[_Result]:
    waiting: dict[int, Found] = {}
    following = 0
    for position, result in found:
        waiting[position] = result
        while following in waiting:
            result = waiting.pop(following)
            if isinstance(result, ImageError):
                raise result
            assert isinstance(result, kind)
            yield result
            following += 1


def _readable(error: Exception) -> DetrkitError:
    """One line for what Ray says in many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1] if lines else type(error).__name__
    return DetrkitError(f"the workers of the Ray cluster cannot continue: {said}")
