"""The code blocks of a page, and what is said above them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

RUN = ("bash", "python")
SHOWN = ("text", "json", "yaml", "dockerfile", "html")  # not code that could be run

_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<mark>not run|slow): (?P<reason>.+?) -->\n)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n"
    r"(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: What stands behind the fence.
        code: Its text.
        line: The line of the page that the fence is on.
        mark: "not run" or "slow" where a comment above says so, otherwise "".
        reason: What the comment gives as the reason.
    """

    language: str
    code: str
    line: int
    mark: str
    reason: str


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        code = "".join(line.removeprefix(match["indent"]) for line in match["code"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(match["language"], code, line, match["mark"] or "", match["reason"] or ""))
    return found


def pages() -> list[Path]:
    """README.md and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
