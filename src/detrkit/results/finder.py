"""What finds objects in many images: a detector on this machine, or one on a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from typing_extensions import Self

    from detrkit.results.detection_config import DetectionConfig, Threshold
    from detrkit.results.detections import Detections
    from detrkit.results.panoptic import PanopticSegmentation


class ObjectFinder(Protocol):
    """Finds the objects in image files, as ``Detector`` and ``RayDetector`` do.

    Attributes:
        names: Label -> class name.
        detection_config: What turns scores into detections where a call does not say otherwise.
    """

    names: dict[int, str]
    detection_config: DetectionConfig

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""

    @property
    def has_masks(self) -> bool:
        """Whether the model gives masks."""

    def with_config(self, config: DetectionConfig, tiles: int | str | Sequence[int] | None = None) -> Self:
        """The same with other detection settings; see :meth:`detrkit.Detector.with_config`."""

    def stream(
        self,
        images: Sequence[Path],
        threshold: Threshold | None,
        batch_size: int,
        *,
        masks: bool | None,
        exif_orientation: bool,
    ) -> Iterator[Detections]:
        """The objects in each image, in order; see :meth:`detrkit.Detector.stream`."""

    def stream_segments(
        self, images: Sequence[Path], threshold: float, batch_size: int, *, exif_orientation: bool
    ) -> Iterator[PanopticSegmentation]:
        """The segments of each image, in order; see :meth:`detrkit.Detector.stream_segments`."""
