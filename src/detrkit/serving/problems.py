"""Why a request gets no answer, as its HTTP status and one line."""

from __future__ import annotations

from collections.abc import Mapping

from detrkit.common.errors import ImageError, ImageTooLargeError, SettingError
from detrkit.common.text import printable

# A line longer than this says nothing more; a request may hold names of any length.
_LONGEST = 500


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        message: One line that says why, and what to do.
        headers: Headers of the answer.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, headers)
        self.status = status
        self.message = printable(" ".join(message.split()))[:_LONGEST]
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client closed the connection before the answer was ready."""


def refusal(error: ImageError | SettingError) -> RequestError:
    """What a client is told about its image or options."""
    return RequestError(413 if isinstance(error, ImageTooLargeError) else 400, str(error))
