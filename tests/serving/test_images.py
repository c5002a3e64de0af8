"""The container images: what they install, without Docker."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each on one line."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_images_have_two_stages_run_without_rights_and_report_their_health(path: Path) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    assert names.count("FROM") == 2
    assert dict(found)["USER"] not in ("", "0", "root")
    assert "HEALTHCHECK" in names
    assert "/health/ready" in dict(found)["HEALTHCHECK"]
    assert dict(found)["ENTRYPOINT"] == '["detrkit"]'


def test_the_context_has_what_is_installed_and_nothing_else() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert all((ROOT / name).exists() for name in kept)
    assert {"pyproject.toml", "README.md", "LICENSE", "src", "examples", "requirements"} == kept


def test_the_requirements_of_the_service_are_those_of_the_extra() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = (ROOT / "requirements" / "serve.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == extras["serve"]


@pytest.mark.slow
def test_what_the_runtime_image_installs_serves_without_torch(tmp_path: Path, tiny_detr: Path) -> None:
    if not (ROOT / "requirements" / "runtime.txt").exists():
        pytest.skip("requirements/runtime.txt is not there yet")
    source, target = tmp_path / "src", tmp_path / "detrkit"
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for name, rest in instructions(ROOT / "docker" / "runtime.Dockerfile"):
        if name != "RUN" or rest.startswith("useradd"):
            continue
        words = shlex.split(rest.replace("/opt/detrkit", str(target)).replace("/src", str(source)))
        program = {"python": sys.executable, "pip": str(target / "bin" / "pip")}[words[0]]
        subprocess.run([program, *words[1:]], env=environment, check=True)
    python = str(target / "bin" / "python")
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    assert subprocess.run([python, "-c", "import torch"], **run).returncode != 0
    helped = subprocess.run([str(target / "bin" / "detrkit"), "serve", "--help"], **run)
    assert helped.returncode == 0, helped.stderr
    assert "--queue-size" in helped.stdout
