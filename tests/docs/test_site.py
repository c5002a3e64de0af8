"""The site as mkdocs builds it."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import detrkit
from detrkit.families import FAMILIES

pytest.importorskip("material", reason="the extra docs is not installed")
pytest.importorskip("mkdocstrings_handlers.python", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; any warning of mkdocs is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        # The page that runs a model has tests of its own; exporting it takes a minute.
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "DETRKIT_SITE_MODEL": "none"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def page(site: Path, name: str) -> str:
    return (site / name / "index.html").read_text(encoding="utf-8")


def test_the_reference_has_every_public_name(site: Path) -> None:
    pages = "".join(page(site, f"reference/{name}") for name in ("detector", *FAMILIES))
    headings = set(re.findall(r'<h2 id="detrkit\.(\w+)"', pages))
    assert headings == {name for name in detrkit.__all__ if not name.startswith("__")}


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    import typer

    from detrkit.cli import app

    text = page(site, "reference/commands")
    named = {
        word for code in re.findall(r"<code>(-.*?)</code>", text) for word in re.findall(r"[^\s,|]+", code)
    }
    for name, command in typer.main.get_command(app).commands.items():
        assert f'<h2 id="detrkit-{name}"' in text
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert named.issuperset(parameter.opts), (name, parameter.opts)


def test_a_drawing_is_part_of_the_page_and_has_no_colours_of_its_own_for_text(site: Path) -> None:
    text = page(site, "how-detr-works")
    assert text.count('<figure class="drawing"') == len(list(FIGURES.glob("*.svg")))
    assert "<style>" not in text[text.index('<figure class="drawing"') :].split("</figure>")[0]


def test_the_drawings_are_those_of_the_script() -> None:
    script = runpy.run_path(str(FIGURES / "draw.py"))
    made = {f"{make.__name__}.svg": make().svg() for make in script["FIGURES"]}
    assert made == {path.name: path.read_text(encoding="utf-8") for path in FIGURES.glob("*.svg")}


def test_no_role_of_another_documentation_tool_is_printed(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not re.search(r":(class|func|mod|meth):", path.read_text(encoding="utf-8")), path
