"""What every engine gives: a model that is called with images, whatever machinery runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeGuard

if TYPE_CHECKING:
    from torch import Tensor

    from detrkit.models.outputs import ObjectDetectionOutput, SegmentationOutput


class ModelConfig(Protocol):
    """What is asked of a model's configuration, that of Transformers or an exported model's.

    Attributes:
        model_type: The family's, as ``config.json`` has it.
        id2label: Label -> class name.
        num_channels: Channels of the images.
    """

    model_type: str
    id2label: Mapping[int, str]
    num_channels: int

    @property
    def object_queries(self) -> int:
        """How many object queries the model has."""


class RunnableModel(Protocol):
    """A detection model: eager, compiled or exported."""

    config: ModelConfig

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> ObjectDetectionOutput:
        """Detects objects.

        Args:
            pixel_values: (batch, channels, height, width) normalised images.
            pixel_mask: (batch, height, width), nonzero where pixels are real; None when nothing is padded.
        """


class RunnableSegmenter(RunnableModel, Protocol):
    """A model that also gives masks."""

    @property
    def detector(self) -> RunnableModel:
        """The model without its masks."""

    def segment(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, threshold: float = 0.85
    ) -> SegmentationOutput:
        """Detects objects and gives the masks of those above a threshold; arguments as of a call."""


def has_masks(model: RunnableModel) -> TypeGuard[RunnableSegmenter]:
    """Whether a model gives masks."""
    return hasattr(model, "segment")
