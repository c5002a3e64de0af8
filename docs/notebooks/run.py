"""Runs the notebooks of this folder and stores their outputs, with images as JPEG.

python docs/notebooks/run.py
"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from detrkit.common.files import atomic_file

FOLDER = Path(__file__).resolve().parent


def run(path: Path) -> None:
    """Runs a notebook offline, in the root of the repository, and writes it with its outputs."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    notebook = nbformat.read(path, as_version=4)
    root = {"metadata": {"path": str(FOLDER.parents[1])}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=root).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ from run to run
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/jpeg" in output.get("data", {}):
                    output.data.pop("image/png", None)
    notebook.metadata.language_info = {"name": "python"}  # without this machine's versions
    with atomic_file(path) as temporary:
        nbformat.write(notebook, temporary)


if __name__ == "__main__":
    for notebook_path in sorted(FOLDER.glob("*.ipynb")):
        run(notebook_path)
