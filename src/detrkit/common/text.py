"""Wording that messages share, and comparison of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the full stop; its type if it has no message."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name: ``; did you mean 'close'?``, or nothing.

    Args:
        name: The unknown name; upper and lower case count as equal.
        known: The names to suggest.
        most: Maximum number of suggestions.
        cutoff: Minimum similarity of a suggestion, from 0 to 1.
    """
    spellings = {key.lower(): key for key in known}
    close = difflib.get_close_matches(name.lower(), spellings, n=most, cutoff=cutoff)
    return f"; did you mean {' or '.join(repr(spellings[key]) for key in close)}?" if close else ""


def folded(name: str) -> str:
    """A class name in the form in which two are compared: without surrounding spaces, whatever the case."""
    return name.strip().casefold()


def is_url(text: str) -> bool:
    """Whether a text is an http(s) URL."""
    return text.lower().startswith(("http://", "https://"))
