"""The running program: from its start to its end by a signal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from detrkit.cli.serve import name_models
from detrkit.errors import MissingExtraError, SettingError
from tests.cli.conftest import Run, detrkit_here, working_directory  # noqa: F401 - fixtures
from tests.conftest import make_picture, wait_until
from tests.docs.blocks import ROOT, blocks_of
from tests.serving.conftest import number_image

pytest.importorskip("uvicorn")


def get(url: str, content: bytes | None = None) -> tuple[int, dict]:
    """Status and content of an answer; 0 where there is none."""
    headers = {"Content-Type": "image/png"} if content else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


class Program:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], address: str, log: Path) -> None:
        self.process, self.address, self._log = process, address, log

    def said(self) -> str:
        return self._log.read_text()


@contextmanager
def serving(log: Path, *arguments: object, wait: bool = True) -> Iterator[Program]:
    """Starts the program, and waits until it is ready or only until it listens."""
    command = [sys.executable, "-m", "detrkit", "serve", "--port", "0", *map(str, arguments)]
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            command,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        try:
            assert process.stdout is not None
            program = Program(process, process.stdout.readline().strip(), log)
            assert program.address.startswith("http://127.0.0.1:"), program.said()
            while wait and get(f"{program.address}/health/ready")[0] != 200:
                assert process.poll() is None, program.said()
                time.sleep(0.1)
            yield program
        finally:
            process.kill()


def run_the_pages_client(address: str, folder: Path) -> None:
    """Runs what docs/serve.md shows, with the address of this server."""
    make_picture(120, 80).save(folder / "photo.jpg")
    blocks = [block for block in blocks_of(ROOT / "docs" / "serve.md") if "/v1/detect?" in block.code]
    assert [block.language for block in blocks] == ["bash", "python"]
    for block, program in zip(blocks, (["bash", "-c"], [sys.executable, "-c"])):
        if block.language == "bash" and not shutil.which("curl"):
            continue
        code = block.code.replace("http://127.0.0.1:8000", address).replace("threshold=0.6", "threshold=0.1")
        done = subprocess.run([*program, code], cwd=folder, capture_output=True, text=True, check=True)
        assert "cat" in done.stdout or "remote" in done.stdout or "couch" in done.stdout


def test_it_serves_until_sigterm_and_answers_what_it_accepted(tiny_detr: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--model", tiny_detr, "--device", "cpu") as program:
        run_the_pages_client(program.address, tmp_path)
        url = f"{program.address}/v1/detect"
        content = number_image(100, 1500, 1000)
        assert get(url, content)[0] == 200
        with ThreadPoolExecutor(24) as pool:
            answers = [pool.submit(get, url, content) for _ in range(60)]
            wait_until(lambda: sum(one.done() for one in answers) >= 3)
            program.process.send_signal(signal.SIGTERM)
            statuses = [one.result()[0] for one in answers]
        assert program.process.wait(60) == 0, program.said()
    # Those that came too late have been refused, with 503 or, once all was answered, by the closed port.
    assert set(statuses) <= {200, 503, 0}
    said = program.said()
    asked_before = 1 + (2 if shutil.which("curl") else 1)
    assert said.count("POST /v1/detect 200") == statuses.count(200) + asked_before
    assert said.count("POST /v1/detect 503") == statuses.count(503)
    assert statuses.count(200) >= 3
    assert "Stopped; all accepted requests were answered." in said
    assert "Traceback" not in said


def test_sigterm_while_the_models_are_loaded_ends_it_at_once(tiny_detr: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--model", tiny_detr, wait=False) as program:
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 0, program.said()
    assert "Stopping; requests under way: 0" in program.said()
    assert "Traceback" not in program.said()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tiny_detr: Path, tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--model", tiny_detr, "--device", "cpu") as program:
        address = program.address.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as client:
            head = ("POST /v1/detect HTTP/1.1", "Host: x", "Content-Type: image/png", "Content-Length: 99")
            client.sendall(("\r\n".join(head) + "\r\n\r\n").encode())  # the server waits for the body
            wait_until(
                lambda: (
                    b"detrkit_pending_requests 1"
                    in urllib.request.urlopen(f"{program.address}/metrics").read()
                )
            )
            program.process.send_signal(signal.SIGTERM)
            wait_until(lambda: "Stopping; requests under way: 1" in program.said())
            assert program.process.poll() is None
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(60) == 143
    assert "Traceback" not in program.said()


def test_mistakes_are_one_line_before_anybody_connects(detrkit_here: Run, tiny_detr: Path) -> None:  # noqa: F811
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, message in (
            (["--model", "detr-resnet-5O"], "did you mean 'detr-resnet-50"),
            (["--model", "a=detr-resnet-50", "--model", f"a={tiny_detr}"], "two models are called 'a'"),
            (["--model", tiny_detr, "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--model", tiny_detr, "--host", "no such host"], "cannot listen on no such host"),
            (["--model", tiny_detr, "--queue-size", 0], "--queue-size"),
        ):
            done = detrkit_here("serve", *arguments)
            assert (done.returncode, done.stdout) == (2, "")
            assert message in done.stderr
            assert done.stderr.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_program_with_one_line(
    detrkit_here: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    done = detrkit_here("serve", "--model", tmp_path / "model", "--port", 0)
    assert done.returncode == 2
    assert done.stdout.startswith("http://127.0.0.1:")
    assert "config.json" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from detrkit import serving

    monkeypatch.setattr(serving, "_PACKAGES", ("no_such_package",))
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[serve\]'"):
        serving.require_packages()


def test_models_have_names_for_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/cells", "odd=name"):
        Path(folder).mkdir(parents=True)
    given = ["detr-resnet-50", "facebook/detr-resnet-101", "runs/cells", "old=runs/cells", "odd=name"]
    assert name_models(given) == {
        "detr-resnet-50": "detr-resnet-50",
        "facebook/detr-resnet-101": "facebook/detr-resnet-101",
        "cells": "runs/cells",
        "old": "runs/cells",
        "odd=name": "odd=name",
    }
    Path("other/cells").mkdir(parents=True)
    with pytest.raises(SettingError, match="name one with --model NAME=other/cells"):
        name_models(["runs/cells", "other/cells"])
