"""Wording that messages share, and comparison of names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

# Controls, the characters that mark, embed, override or isolate a direction or end a line, and halves of
# surrogate pairs, which no file can hold.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

_Key = TypeVar("_Key")
_Known = TypeVar("_Known")


def first_line(error: BaseException) -> str:
    """The first line of an error's message without the full stop; its type if it has no message."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def printable(text: str) -> str:
    """A text for a terminal or log: escapes for controls and for what turns the writing around."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def markdown(text: str) -> str:
    """A name from elsewhere in Markdown: as it is if it has only letters, digits and the like, or as code."""
    plain = re.fullmatch(r"[\w ,'/()]+([-.][\w ,'/()]+)*", text) and text == " ".join(text.split())
    return text if plain else code(text)


def code(text: str) -> str:
    """A name from elsewhere as code in Markdown, where neither HTML nor Markdown has an effect."""
    return f"`{printable(' '.join(text.split())).replace('`', chr(39))}`"


def spreadsheet_cell(value: object) -> object:
    """A value for a CSV file: a text that a spreadsheet would run as a formula gets a quote in front."""
    return (
        f"'{value}"
        if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
        else value
    )


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


def match_names(names: Mapping[_Key, str], known: Mapping[_Known, str]) -> dict[_Key, _Known]:
    """Finds class names among those of a model or data set.

    An exact match wins. Otherwise case and surrounding spaces do not count, unless several known names differ
    only in these: then none of them is taken.

    Args:
        names: The names to find, by key.
        known: The names to find them among, by key; of equal ones the first counts.

    Returns:
        Key of ``names`` -> key of ``known``, for the names that were found.
    """
    spellings: dict[str, dict[str, _Known]] = {}
    for place, name in known.items():
        spellings.setdefault(fold_name(name), {}).setdefault(name, place)
    found = {}
    for key, name in names.items():
        same = spellings.get(fold_name(name), {})
        if name in same or len(same) == 1:
            found[key] = same.get(name, next(iter(same.values())))
    return found


def fold_name(name: str) -> str:
    """A class name without what people type differently: case, and blanks at its ends or in a row."""
    return " ".join(name.split()).casefold()


def percent(value: float) -> str:
    """A fraction in percent with one decimal; a dash for no number, which COCO's evaluation gives as -1."""
    return f"{100 * value:.1f}" if value >= 0 else "-"


def is_url(text: str) -> bool:
    """Whether a text is an http(s) or data URL, which names no file of this computer."""
    return text[:8].lower().startswith(("http://", "https://", "data:"))


def is_data_url(text: str) -> bool:
    """Whether a text is a URL that holds its content."""
    return text[:5].lower() == "data:"


def without_password(address: str) -> str:
    """An address without the user name and password in it, which have no place in logs and documents."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]*://)[^/?#]*@", r"\1", address)


def short_name(source: str) -> str:
    """A path or address as messages and tables show it: no password, and not all of a data URL."""
    return f"{source[:30]}..." if is_data_url(source) and len(source) > 30 else without_password(source)
