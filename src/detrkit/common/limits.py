"""Limits for images from untrusted sources."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from detrkit.common.errors import SettingError

DEFAULT_MAX_PIXELS = 178_956_970
"""Maximum number of pixels of an image: twice Pillow's warning limit, above which Pillow itself refuses."""

PIXELS_VARIABLE = "DETRKIT_MAX_PIXELS"
PRIVATE_VARIABLE = "DETRKIT_ALLOW_PRIVATE_ADDRESSES"


def _default_max_pixels() -> int:
    text = os.environ.get(PIXELS_VARIABLE, "").strip()
    if not text:
        return DEFAULT_MAX_PIXELS
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise SettingError(f"{PIXELS_VARIABLE} must be a number of pixels above 0, not {text[:100]!r}")
    return int(text)


def _default_allow_private() -> bool:
    return os.environ.get(PRIVATE_VARIABLE, "").strip().lower() in ("1", "true", "yes", "on")


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """How large an image may be, and where it may come from.

    Attributes:
        max_pixels: Maximum number of pixels to decode; None for no limit. By default the environment variable
            ``DETRKIT_MAX_PIXELS``, or 178956970.
        max_bytes: Maximum number of bytes to read from a URL or a pipe; None for no limit. (A file may have
            eight bytes for each of ``max_pixels``.)
        timeout: Seconds that fetching a URL may take in total, from name resolution to the last byte.
        max_redirects: Maximum number of redirects of a URL.
        allow_private: Whether a URL may lead to this computer or to a network that the public internet does
            not reach (loopback, private, link-local and the like). By default only if the environment
            variable ``DETRKIT_ALLOW_PRIVATE_ADDRESSES`` is 1.

    Raises:
        SettingError: A limit is not above 0.
    """

    max_pixels: int | None = field(default_factory=_default_max_pixels)
    max_bytes: int | None = 256 * 2**20
    timeout: float = 30.0
    max_redirects: int = 5
    allow_private: bool = field(default_factory=_default_allow_private)

    def __post_init__(self) -> None:
        """Checks the limits."""
        for name in ("max_pixels", "max_bytes", "timeout"):
            value = getattr(self, name)
            if value is None and name != "timeout":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise SettingError(f"{name} must be above 0, not {value!r}")
        if not isinstance(self.max_redirects, int) or self.max_redirects < 0:
            raise SettingError(f"max_redirects must be 0 or more, not {self.max_redirects!r}")

    @property
    def max_file_bytes(self) -> int | None:
        """Maximum number of bytes of a file: 8 per pixel, more than an image file of that size needs."""
        return None if self.max_pixels is None else max(self.max_pixels * 8, 2**20)
