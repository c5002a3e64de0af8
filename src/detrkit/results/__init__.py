"""What was found in an image: detections, panoptic segmentations, their drawings and documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

if TYPE_CHECKING:
    from detrkit.results.drawing import draw_boxes as draw_boxes
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__)
