"""Images in, targets in, detections out: everything around the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

if TYPE_CHECKING:
    from detrkit.processing.images import load_frames as load_frames
    from detrkit.processing.images import load_image as load_image
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__)
