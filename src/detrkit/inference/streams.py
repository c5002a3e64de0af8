"""Images on their way through a detector: prepared ahead, run in batches, given back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, cast

from detrkit.common.errors import SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.progress import with_progress
from detrkit.engines.placement import Device, is_cuda
from detrkit.inference.batching import map_in_threads, read_ahead, run_in_groups
from detrkit.inference.prepared import (
    PreparedImage,
    check_numbers,
    is_one_image,
    prepare_image,
    read_pixels,
    reading_threads,
)
from detrkit.inference.running import Batch, ModelRunner
from detrkit.inference.tiles import TiledPrediction, TiledRun, Tiles
from detrkit.processing.array_processor import ArrayImageProcessor
from detrkit.results.detection_config import DetectionConfig, TileRule

if TYPE_CHECKING:
    from detrkit.inference.predictions import OutputReader
    from detrkit.processing.image_processor import DetrImageProcessorBase
    from detrkit.processing.images import ImageSource
    from detrkit.results.detections import Detections

_Result = TypeVar("_Result")


class CallOptions(TypedDict, total=False):
    """What a call of a detector takes beside images, threshold and batch size."""

    masks: bool | None
    max_objects: int | None
    overlap: float | None
    class_agnostic: bool | None
    tiles: Tiles
    exif_orientation: bool


BatchRun: TypeAlias = "Callable[[Batch], Iterable[_Result]] | TiledRun"
"""Gives the results of a batch of images, or finds the objects of images in tiles."""


def detecting(
    runner: ModelRunner, reader: OutputReader, config: DetectionConfig, masks: bool | None
) -> BatchRun[Detections]:
    """What finds the objects of images with detection settings.

    Args:
        runner: Runs the model.
        reader: Reads its outputs.
        config: The settings.
        masks: Whether to give a mask for each object; by default if the model has masks.

    Raises:
        SettingError: The model gives no masks, or does not have a class that the settings name.
    """
    rule, shape = reader.rule(config), config.tile_shape
    with_masks = reader.has_masks if masks is None else masks
    model = runner.masks_above(rule.least_score) if with_masks else runner.without_masks
    first = rule if shape is None else TileRule(config, reader.names)

    def run(batch: Batch) -> Iterator[Detections]:
        outputs = runner.outputs(batch, model)
        return reader.detections(outputs, [item.frame for item in batch], first, with_masks)

    if shape is None:
        return run
    return TiledRun(run=run, config=config, names=reader.names)


def detecting_by_layer(
    runner: ModelRunner, reader: OutputReader, configs: Sequence[DetectionConfig]
) -> Callable[[Batch], Iterator[list[Detections]]]:
    """What finds the objects of images at each decoder layer, the last layer's last, with each settings.

    Raises:
        SettingError: The settings cut images into tiles.
    """
    if any(config.tile_shape is not None for config in configs):
        raise SettingError("decoder layers are compared on whole images; leave out tiles (--tiles 0)")
    rules = [reader.rule(config) for config in configs]

    def run(batch: Batch) -> Iterator[list[Detections]]:
        outputs, frames = runner.outputs(batch, runner.by_layer), [item.frame for item in batch]
        layers = [
            {"logits": logits, "pred_boxes": boxes}
            for logits, boxes in zip(outputs["logits"], outputs["pred_boxes"])
        ]
        found = [reader.detections(layer, frames, rule, False) for rule in rules for layer in layers]
        yield from map(list, zip(*found))

    return run


@dataclass(frozen=True)
class ImageStreams:
    """How a detector takes in images.

    Attributes:
        processor: The model's image processor.
        device: Where the model runs.
        limits: Maximum size of image files, and the addresses that may be opened.
        batch_size: Maximum number of images that go through the model at once.
        exif_orientation: Whether to turn each image as its EXIF entry says.
    """

    processor: DetrImageProcessorBase | ArrayImageProcessor
    device: Device
    limits: ImageLimits
    batch_size: int = 1
    exif_orientation: bool = False

    def __post_init__(self) -> None:
        """Raises a SettingError for a batch size that cannot be."""
        check_numbers(0, self.batch_size)

    def prepare(self, image: ImageSource | PreparedImage) -> PreparedImage:
        """Reads and resizes an image."""
        return prepare_image(image, self.processor, for_gpu=is_cuda(self.device), **self._reading)

    def results(self, images: Iterable[ImageSource], run: BatchRun[_Result]) -> Iterator[_Result]:
        """The result of each image, in order."""
        threads, size = reading_threads(self.device), self.batch_size
        if isinstance(run, TiledRun):
            found = (prediction.detections() for prediction in self.in_tiles(images, run))
            return cast("Iterator[_Result]", found)  # Detections, as the caller has it from detecting()
        ready = read_ahead(map_in_threads(self.prepare, images, threads), depth=size + 1)
        return run_in_groups(ready, run, kind=lambda item: item.frame.padded_size, size=size)

    def in_tiles(self, images: Iterable[ImageSource], run: TiledRun) -> Iterator[TiledPrediction]:
        """What is in the tiles of each image, in order."""
        read = partial(read_pixels, processor=self.processor, **self._reading)
        threads = reading_threads(self.device)
        return run.stream(images, read, self.prepare, self.exif_orientation, self.batch_size, threads)

    def one_or_many(self, images: Any, run: BatchRun[_Result], description: str) -> _Result | list[_Result]:
        """The result for one image, or the list of those for many, with a progress bar."""
        if is_one_image(images):
            if isinstance(run, TiledRun):
                return next(self.results([images], run))
            return next(iter(run([self.prepare(images)])))
        total = len(images) if hasattr(images, "__len__") else None
        return list(with_progress(self.results(images, run), total, description))

    @property
    def _reading(self) -> dict[str, Any]:
        return {"exif_orientation": self.exif_orientation, "limits": self.limits}
