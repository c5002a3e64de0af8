"""The notebooks are run from top to bottom: as plain Python, and in the slow run in a kernel."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.blocks import ROOT
from tests.docs.test_code_blocks import Python

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def cells_of(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_of_a_notebook_runs(path: Path, folder: Path, environment: dict[str, str]) -> None:
    with Python(folder, environment) as python:
        for number, cell in enumerate(cells_of(path), 1):
            python.run("".join(cell["source"]), f"{path.name}, cell {number}")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel(
    path: Path, folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / name.lower()))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert last.outputs, "the last cell shows nothing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_its_results(path: Path) -> None:
    outputs = [output for cell in cells_of(path) for output in cell["outputs"]]
    assert all(cell["outputs"] for cell in cells_of(path) if "=" not in "".join(cell["source"][-1:]))
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert any("image/jpeg" in output.get("data", {}) for output in outputs)
    assert not any("image/png" in output.get("data", {}) for output in outputs)  # five times as large


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_of_the_site_shows_the_results_of_a_notebook(path: Path) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["notebook_files"](path)
    page, *images = made.items()
    for name, content in images:
        assert f"]({name})" in page[1]
        assert Image.open(io.BytesIO(content)).format == "JPEG"
    assert images
    assert "```text" in page[1]
