"""Fonts for names in any script: the one that Pillow carries, else one of the system's with the letters."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from detrkit.common.log import logger

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


_SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
# Styles of a family that are tried after its plain one.
_STYLES = (
    "bold",
    "italic",
    "oblique",
    "light",
    "thin",
    "black",
    "condensed",
    "mono",
    "serif",
    "math",
    "emoji",
)
# A code point that is no character: what a font shows for it stands for whatever it lacks.
_NOBODY = "\uffff"
# Letters are looked for in this size.
_TRIAL_SIZE = 24


def legible(text: str) -> str:
    """A text as it can be drawn: letters that no font here has become their code points, with a warning.

    So different names never look alike.
    """
    missing = _missing(text, font_file(text))
    for script in sorted({_script(letter) for letter in missing}):
        _warn(script)
    return "".join(f"\\u{ord(letter):04x}" if letter in missing else letter for letter in text)


def font_for(text: str, size: int) -> Font:
    """A font for a text that is :func:`legible`, so many pixels high."""
    return _font(font_file(text), size)


@lru_cache(maxsize=1024)
def font_file(text: str) -> str | None:
    """The font file that has most letters of a text; None for the font that Pillow carries."""
    best, fewest = None, len(_missing(text, None))
    for path in _system_fonts() if fewest else ():
        lacking = len(_missing(text, path))
        if lacking < fewest:
            best, fewest = path, lacking
        if not fewest:
            break
    return best


@lru_cache(maxsize=64)
def _font(path: str | None, size: int) -> Font:
    return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


def _missing(text: str, path: str | None) -> set[str]:
    """The letters of a text that a font cannot show, control characters among them."""
    return {letter for letter in set(text) if not _has(path, letter)}


@lru_cache(maxsize=65536)
def _has(path: str | None, letter: str) -> bool:
    if unicodedata.category(letter) in ("Cf", "Mn", "Zs"):  # joiners, accents, spaces
        return True
    if not letter.isprintable():
        return False
    shown, nobody = _look(path, letter), _look(path, _NOBODY)
    return shown is not None and shown != nobody


@lru_cache(maxsize=4096)
def _look(path: str | None, letter: str) -> tuple[object, bytes] | None:
    """What a font draws for a letter; None if it cannot be used."""
    try:
        mask = _font(path, _TRIAL_SIZE).getmask(letter)
    except (OSError, ValueError, UnicodeError):  # such as a font of bitmaps, which has few sizes
        return None
    return mask.size, bytes(mask)


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    """The font files of this computer, plain styles first."""
    found = {str(path) for folder in _folders() for path in _files(folder)}
    return tuple(sorted(found, key=lambda path: (sum(s in Path(path).name.lower() for s in _STYLES), path)))


def _files(folder: Path) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, name) for name in names if name.lower().endswith(_SUFFIXES))


def _folders() -> Iterator[Path]:
    home = Path.home()
    if sys.platform == "win32":
        yield Path(os.environ.get("WINDIR", r"C:\Windows"), "Fonts")
        yield Path(os.environ.get("LOCALAPPDATA", home), "Microsoft", "Windows", "Fonts")
    elif sys.platform == "darwin":
        yield from (Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library" / "Fonts")
    else:  # where fontconfig looks
        data = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
        yield from (Path(folder, "fonts") for folder in data.split(":") if folder)
        yield Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share", "fonts")
        yield home / ".fonts"


def _script(letter: str) -> str:
    """The script of a letter, by the first word of its name."""
    word = unicodedata.name(letter, "unnamed").split()[0]
    return word if word == "CJK" else word.capitalize()


@lru_cache(maxsize=256)
def _warn(script: str) -> None:
    logger.warning(
        "no installed font has all the %s letters of the class names: they are drawn as code points; "
        "install a font "
        "that has them, such as one of Noto",
        script,
    )
