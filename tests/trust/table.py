"""Writes the tables of docs/bad-input.md from the cases: ``python -m tests.trust.table``."""

from __future__ import annotations

from pathlib import Path

from tests.trust.cases import GROUPS, Case

PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"
BEGIN, END = "<!-- tables: written by python -m tests.trust.table -->", "<!-- end of tables -->"


def _outcome(case: Case) -> str:
    if case.says:
        return f"{case.error.__name__}: *… {case.says} …*"
    size = f"read, {case.size[0]} x {case.size[1]}" if case.size else ""
    return "; ".join(part for part in (size, case.how) if part)


def tables() -> str:
    """All tables in Markdown."""
    lines = []
    for title, cases in GROUPS.items():
        lines += [f"## {title}", "", "| input | outcome |", "| --- | --- |"]
        lines += [f"| {_escape(case.what)} | {_escape(_outcome(case))} |" for case in cases]
        lines.append("")
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with its tables as they should be."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
