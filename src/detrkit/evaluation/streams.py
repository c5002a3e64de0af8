"""What a detector gives of a data set's images: broken ones left out, the time measured, progress shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from detrkit.common.errors import ImageError
from detrkit.common.log import logger
from detrkit.common.progress import with_progress
from detrkit.data.coco import DetectionDataset
from detrkit.processing.images import load_image
from detrkit.results.finder import ObjectFinder

if TYPE_CHECKING:
    from detrkit.results.detections import Detections


_Item = TypeVar("_Item")


class Clock:
    """Adds up the time that an iterator takes, without that of its consumer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item


def detections_of(
    detector: ObjectFinder,
    dataset: DetectionDataset,
    *,
    batch_size: int,
    limit: int | None,
    strict: bool,
    masks: bool = False,
    clock: Clock | None = None,
) -> Iterator[tuple[int, Detections]]:
    """Place and detections, whatever their score, of a checked data set's images, but for unreadable ones.

    Raises:
        ImageError: No image can be read, or ``strict`` is set and one cannot.
    """
    stream = partial(detector.stream, threshold=0.0, masks=masks)
    return results_of(
        stream, dataset, batch_size=batch_size, limit=limit, strict=strict, clock=clock or Clock()
    )


def results_of(
    stream: Callable[..., Iterator[_Item]],
    dataset: DetectionDataset,
    *,
    batch_size: int,
    limit: int | None,
    strict: bool,
    clock: Clock,
) -> Iterator[tuple[int, _Item]]:
    """Place and result of a checked data set's images, but for unreadable ones.

    Args:
        stream: Gives the result of each image, as the methods of a detector whose names begin with "stream".
        dataset: The data set.
        batch_size: Maximum number of images that go through the model at once.
        limit: Only use the first so many images.
        strict: Raise an error if an image cannot be read.
        clock: Measures the time.

    Raises:
        ImageError: No image can be read, or ``strict`` is set and one cannot.
    """
    stream = partial(stream, batch_size=batch_size, exif_orientation=dataset.upright)
    count = len(dataset.document["images"][:limit])

    def read() -> Iterator[tuple[int, _Item]]:
        todo = list(range(count))
        done = 0
        while todo:
            given = 0
            try:
                for result in stream([dataset.path(place) for place in todo]):
                    given, done = given + 1, done + 1
                    yield todo[given - 1], result
                return
            except ImageError:
                if strict:
                    raise
                todo = todo[given:]
                broken = next((place for place in todo if not _reads(dataset, place)), None)
                if broken is None:
                    raise
                todo.remove(broken)
        if not done:
            raise ImageError(f"{dataset.source}: none of the {count} images can be read")

    yield from with_progress(clock.time(read()), count, "Evaluating")


def _reads(dataset: DetectionDataset, place: int) -> bool:
    """Whether an image can be read; says why not."""
    try:
        load_image(dataset.path(place), exif_orientation=dataset.upright)
    except ImageError as error:
        logger.warning("left out of the evaluation: %s", error)
        return False
    return True
