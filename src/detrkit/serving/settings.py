"""What a server is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from detrkit.common.limits import ImageLimits

DEFAULT_PORT = 8000
DEFAULT_MAX_BYTES = 32 * 2**20
"""Maximum number of bytes of an image that a client may send."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How models are loaded and run, here or in a replica.

    Attributes:
        models: Name -> Hub id, folder or short name; the first one is the default.
        engine: As for ``Detector.from_pretrained``, like the next three.
        device: Where the engine runs.
        dtype: Type of the weights.
        revision: Branch, tag or commit on the Hub.
        queries: Object queries of two-stage models, likewise.
        limits: How large images may be.
        exif_orientation: Turn each image as its EXIF entry says; results then refer to the turned image.
        batch_size: Maximum number of images that go through a model at once.
        max_wait: Seconds that an image waits for others that are being read, to be run together.
    """

    models: Mapping[str, str]
    engine: str | None = None
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    queries: int | None = None
    limits: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=DEFAULT_MAX_BYTES))
    exif_orientation: bool = False
    batch_size: int = 4
    max_wait: float = 0.005


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """How requests are accepted.

    Attributes:
        limits: How large images may be.
        queue_size: Maximum number of requests that are accepted and not yet answered.
        patience: Seconds within which a client must send its request, and take each part of the answer.
    """

    limits: ImageLimits = field(default_factory=lambda: ImageLimits(max_bytes=DEFAULT_MAX_BYTES))
    queue_size: int = 64
    patience: float = 30.0
