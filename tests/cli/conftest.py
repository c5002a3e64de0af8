"""The program: as a user starts it, and in the tests' process where starting it would only cost time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


def start_detrkit(*arguments: object) -> subprocess.Popen[str]:
    """Starts ``python -m detrkit`` without the internet, for a test that stops it."""
    return subprocess.Popen(
        [sys.executable, "-m", "detrkit", *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.PIPE,
        text=True,
        # A process started from one that ignores interrupts would ignore them too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.fixture
def working_directory(tmp_path: Path) -> Path:
    """An empty folder to start the program in."""
    folder = tmp_path / "working-directory"
    folder.mkdir()
    return folder


@pytest.fixture
def detrkit(working_directory: Path) -> Run:
    """Runs ``python -m detrkit`` without the internet, its output not a terminal."""

    def run(
        *arguments: object, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "detrkit", *map(str, arguments)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
            cwd=working_directory,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


@pytest.fixture
def detrkit_here(
    working_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Run]:
    """Runs the program in this process, which spares it the import of torch."""
    from transformers.utils import logging as transformers_logging

    from detrkit.cli import run as run_program

    monkeypatch.chdir(working_directory)
    verbosity = transformers_logging.get_verbosity()

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        status = run_program([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    with warnings.catch_warnings():  # the program prints warnings in its own way
        yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
