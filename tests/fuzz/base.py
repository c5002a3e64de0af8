"""What fuzz targets are made of: choices read from bytes, edited documents, and the errors they may raise."""

from __future__ import annotations

import copy
import json
import math
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from detrkit.errors import DetrkitError, MissingExtraError

_Option = TypeVar("_Option")

WEIRD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 255, 256, 2**31, -(2**63), 2**64, 10**30),
    *(0.0, 0.5, -0.5, 1e-9, 1e9, 1e308, math.inf, -math.inf, math.nan),
    *("", "0", "1", "a", "N/A", "../../x.png", "/dev/zero", "\ud800", "\0", "http://localhost/", "x" * 300),
    *([], {}, [[]], [0], [0, 0, 0, 0], [1, 2, 3], ["a"], {"a": 1}, [None, None, None, None]),
    *([1e30, 1e30, 1, 1], [10, 10, -5, -5], [math.nan] * 4, [[1, 1, 9, 1, 9, 9]], [[1, 1, 2]]),
    *({"counts": "zz", "size": [4, 4]}, {"counts": [3, 4], "size": [2, 2]}, {"height": 0, "width": -1}),
]


class Choices:
    """A stream of decisions read from bytes; when they run out, every decision is the first."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def number(self, below: int) -> int:
        """An integer from 0 to below - 1, below being at most 65536."""
        size = 1 if below <= 256 else 2
        part = self.data[self.place : self.place + size]
        self.place += size
        return int.from_bytes(part, "little") % below

    def of(self, options: Sequence[_Option]) -> _Option:
        return options[self.number(len(options))]

    def real(self) -> float:
        """Any float32, with those that matter more often than by chance."""
        part = self.data[self.place : self.place + 4]
        self.place += 4
        if len(part) < 4:
            return 0.0
        if part[0] < 64:
            return [0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, 1e38, 1e-38, 88.8, -104.0][
                part[1] % 11
            ]
        return float(struct.unpack("<f", part)[0])


def edited(document: Any, choices: Choices) -> Any:
    """A document with up to five of its places changed."""
    document = {"root": copy.deepcopy(document)}
    for _ in range(1 + choices.number(5)):
        holder, key = choices.of(list(_places(document)))
        what = choices.number(8)
        if what == 0 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif what == 1 and holder is not document:
            del holder[key]
        elif what == 2 and isinstance(holder, dict) and holder is not document:
            holder[str(choices.of(WEIRD))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(choices.of(WEIRD))
    return document["root"]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in list(pairs):
        yield node, key
        yield from _places(child)


def json_text(document: Any, data: bytes) -> bytes:
    """JSON made of bytes: the bytes themselves, or a document changed as they say."""
    if data[:1] < b"\x10":
        return data[1:]
    return json.dumps(edited(document, Choices(data[1:]))).encode()


@cache
def folder() -> Path:
    """A folder for the files that have to be files, in memory where there is such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="detrkit-fuzz-", dir=memory if memory.is_dir() else None))


def branching_seeds(branches: int) -> list[bytes]:
    """Bytes that lead into each branch of a target whose first choice is one of so many."""
    return [
        bytes([branch, mask, *range(start, start + 40)])
        for branch in range(branches)
        for mask in (0, 1)
        for start in (0, 90, 200)
    ]


def no_seeds() -> list[bytes]:
    """Bytes that lead into the branches."""
    return [
        bytes([first]) + bytes(range(start, start + 40))
        for first in (0, 70, 140, 210)
        for start in (0, 90, 200)
    ]


@dataclass(frozen=True)
class Target:
    """Something to fuzz.

    Attributes:
        run: Takes the bytes.
        seeds: What to start from.
        errors: Raised where the input is to blame.
        longest: Most bytes that are tried.
    """

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]] = no_seeds
    errors: tuple[type[Exception], ...] = (DetrkitError,)
    longest: int = 512

    def __call__(self, data: bytes) -> None:
        """Runs it; lets through what is not one of the errors."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.run(data)
            except MissingExtraError:
                raise
            except self.errors:
                pass
