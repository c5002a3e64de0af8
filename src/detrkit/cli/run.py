"""The images of one call of a command on their way through a model."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from detrkit.cli.output import picture_names
from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits
from detrkit.common.terminal import say
from detrkit.inference.inputs import ImageInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.cluster import RayDetector

# Whatever is found in an image; knows its ``source``.
_Result = TypeVar("_Result", bound=Any)


@dataclass
class ImageRun:
    """The images of one call on their way through a model.

    Attributes:
        inputs: The images that the user named.
        exif_orientation: Whether to turn images as their EXIF entry says.
        debug: Whether to show tracebacks of images that cannot be read.
        limits: How large image files may be and which addresses are asked.
        failures: Why images could not be read so far, a line each.
    """

    inputs: Sequence[ImageInput]
    exif_orientation: bool
    debug: bool
    limits: ImageLimits = field(default_factory=ImageLimits)
    failures: list[str] = field(default_factory=list)
    _read: deque[tuple[int, Image]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.picture_names = picture_names(self.inputs)

    def read(self) -> Iterator[tuple[int, Image]]:
        """Position and picture of every image that can be read; the others are reported on stderr."""
        from detrkit.inference.prepared import read_image

        for position, item in enumerate(self.inputs):
            try:
                image = read_image(item.source, exif_orientation=self.exif_orientation, limits=self.limits)
            except ImageError as error:
                if self.debug:
                    traceback.print_exc()
                self._report(error)
            else:
                yield position, image

    def results(
        self,
        stream: Callable[[Iterator[Image]], Iterator[_Result]],
        readable: Iterator[tuple[int, Image]],
        description: str,
    ) -> Iterator[tuple[int, Image, _Result]]:
        """Position, picture and result of every readable image, in order.

        Args:
            stream: Turns pictures into results, one each, in their order.
            readable: What ``read`` gives.
            description: What the progress bar says.
        """
        from detrkit.common.progress import with_progress

        for result in with_progress(stream(self._remember(readable)), len(self.inputs), description):
            position, image = self._read.popleft()
            result.source = self.inputs[position].source
            yield position, image, result

    def ray_results(self, detector: RayDetector, **options: Any) -> Iterator[tuple[int, None, Any]]:
        """The same from the workers of a cluster: without the pictures, and in the order they get done.

        Args:
            detector: The workers.
            options: For ``RayDetector.results``.
        """
        from detrkit.common.progress import with_progress

        sources = [item.source for item in self.inputs]
        found = detector.results(sources, exif_orientation=self.exif_orientation, **options)
        for position, result in with_progress(found, len(sources), "Detecting"):
            if isinstance(result, ImageError):
                self._report(result)
            else:
                result.source = sources[position]
                yield position, None, result

    def _report(self, error: ImageError) -> None:
        self.failures.append(str(error))
        say(str(error))

    def _remember(self, readable: Iterator[tuple[int, Image]]) -> Iterator[Image]:
        """Hands pictures on (in the detector's thread), keeping those whose results are still to come."""
        for position, image in readable:
            self._read.append((position, image))
            yield image
