"""Every code block of README.md and the documentation is run, page by page, from top to bottom.

The internet is stood in for by a Hub on the loopback address with tiny models, and what a reader has
(pictures, data sets) by small ones, see conftest.py. A block with ``<!-- not run: reason -->`` above it is
left out, one with ``<!-- slow: reason -->`` only run with ``-m slow``, as are the pages in SLOW_PAGES.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT, RUN, SHOWN, Block, blocks_of, pages

#: What is run instead of what a page says; everything else is run as it stands.
SUBSTITUTIONS = (
    (r"pip install (\.|'\.\[train\]') && ", ""),  # the tests run what is installed
    (r"--epochs \d+", "--epochs 1 --device cpu --workers 0"),
    (r"epochs=\d+", 'epochs=1, device="cpu", workers=0'),
    (r"--batch-size 4", "--batch-size 2"),
    (r"torchrun --nproc-per-node \d+", "torchrun --nproc-per-node 2"),
    (r"--size 800x1066", "--size 64x96 --repeats 1"),
    (r"accelerate launch --num_processes \d+", "accelerate launch --cpu --num_processes 2"),
)

#: Pages whose commands take more than a few seconds together.
SLOW_PAGES = {"docs/tutorials/deploy.md"}

#: How many blocks of a page are not run. A new one has to be entered here.
NOT_RUN = {
    "README.md": 1,
    "docs/bad-input.md": 4,
    "docs/browser.md": 1,
    "docs/count.md": 1,
    "docs/demo.md": 3,
    "docs/export.md": 2,
    "docs/hub.md": 3,
    "docs/large-images.md": 2,
    "docs/large-jobs.md": 3,
    "docs/offline.md": 3,
    "docs/performance.md": 8,
    "docs/reproduce.md": 3,
    "docs/serve.md": 6,
    "docs/several-gpus.md": 1,
    "docs/start.md": 1,
    "docs/tables.md": 1,
    "docs/thresholds.md": 3,
    "docs/tutorials/deploy.md": 4,
    "docs/tutorials/fine-tune.md": 2,
    "docs/video.md": 2,
}

#: Files that are there when a page's blocks have been run.
RESULTS = {
    "README.md": ["out/BloodImage_00000.jpg"],
    "docs/index.md": ["out/BloodImage_00000.jpg"],
    "docs/start.md": ["out/photo.jpg", "results.json", "drawn.jpg"],
    "docs/count.md": ["counts.csv", "objects.csv", "objects.jsonl"],
    "docs/annotation-tools.md": ["sheet.jpg", "predictions.json"],
    "docs/change-the-model.md": ["gated-detr/model.safetensors", "one-layer-detr/model.safetensors"],
    "docs/operate.md": ["objects.csv", "results.json"],
    "docs/large-images.md": ["out/slide.png", "slide.json"],
    "docs/large-jobs.md": ["results.json"],
    "docs/video.md": ["drawn/clip.mp4", "clip.json", "clip.csv", "cells.csv"],
    "docs/tutorials/fine-tune.md": ["cell-detector/predictions.png", "cell-detector-3/model.safetensors"],
    "docs/tutorials/panoptic.md": ["segments/panoptic.json", "my-panoptic/model.safetensors"],
    "docs/tutorials/deploy.md": ["my-onnx/model.onnx", "my-openvino/model.xml"],
}

PAGES = {page.relative_to(ROOT).as_posix(): blocks_of(page) for page in pages()}


def runs(page: str, slow: bool) -> list[Block]:
    """The blocks of a page that are run; in the slow run all, so that what they build on is there."""
    left_out = ("not run",) if slow else ("not run", "slow")
    return [block for block in PAGES[page] if block.language in RUN and block.mark not in left_out]


def is_slow(page: str) -> bool:
    return page in SLOW_PAGES or any(block.mark == "slow" for block in PAGES[page])


def run_page(page: str, slow: bool, folder: Path, environment: dict[str, str]) -> None:
    with Python(folder, environment) as python:
        for block in runs(page, slow):
            code = block.code
            for pattern, replacement in SUBSTITUTIONS:
                code = re.sub(pattern, replacement, code)
            if block.language == "python":
                python.run(code, f"{page}:{block.line}")
                continue
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{page}:{block.line}\n{code}\n{done.stdout}\n{done.stderr}"
    for name in RESULTS.get(page, ()):
        assert (folder / name).is_file(), name


class Python:
    """One Python process in which the blocks of a page are run one after another."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._address = folder, environment["WARM_PROCESS"]

    def __enter__(self) -> Python:
        self._output = (self._folder / "python-output.txt").open("w+")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(300)
        self._socket.connect(self._address)
        message = {"kind": "python", "folder": str(self._folder)}
        streams = [self._output.fileno()] * 3
        socket.send_fds(self._socket, [json.dumps(message).encode() + b"\n"], streams)
        self._answers: Iterator[str] = self._socket.makefile()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._output.close()

    def run(self, code: str, where: str) -> None:
        self._socket.sendall(json.dumps(code).encode() + b"\n")
        status = next(self._answers, "the process ended")
        if status != "0\n":
            self._output.seek(0)
            pytest.fail(f"{where}\n{code}\n{self._output.read()[-3000:]}")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in SLOW_PAGES and runs(page, False)])
def test_the_blocks_of_a_page_run(page: str, folder: Path, environment: dict[str, str]) -> None:
    run_page(page, False, folder, environment)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if is_slow(page)])
def test_the_slow_blocks_of_a_page_run(page: str, folder: Path, environment: dict[str, str]) -> None:
    run_page(page, True, folder, environment)


def test_blocks_that_are_not_run_are_counted_and_give_a_reason() -> None:
    left_out = {
        page: [block for block in blocks if block.mark == "not run"] for page, blocks in PAGES.items()
    }
    for page, blocks in left_out.items():
        for block in blocks:
            print(f"{page}:{block.line}: {block.reason}")
    assert {page: len(blocks) for page, blocks in left_out.items() if blocks} == NOT_RUN


def test_every_block_says_its_language() -> None:
    wrong = [
        f"{page}:{block.line}" for page, blocks in PAGES.items() for block in blocks
        if block.language not in RUN + SHOWN
    ]  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_every_option_is_known_to_the_program(page: str) -> None:
    # Blocks that are not run would otherwise name options that there are no longer.
    import typer

    from detrkit.cli import app

    program = typer.main.get_command(app)
    for block in PAGES[page]:
        if block.language != "bash":
            continue
        for call in re.findall(
            r"(?:^|&& |-m )detrkit ([a-z].*)$", block.code.replace("\\\n", " "), re.MULTILINE
        ):
            command, rest = program, shlex.split(call, comments=True)
            while rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest.pop(0)]
            assert command is not program, f"{page}:{block.line}"
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            unknown = {word for word in rest if word.startswith("--")} - known
            assert not unknown, f"{page}:{block.line}"


def test_scripts_that_pages_name_exist() -> None:
    text = "".join(block.code for blocks in PAGES.values() for block in blocks)
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script


def test_files_that_the_readme_links_to_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
