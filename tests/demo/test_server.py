"""The running page, as programs see it; test_browser.py has what people see."""

from __future__ import annotations

import gc
import json
import socket
import sys
import threading
import urllib.error
import urllib.request
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from detrkit.cli import run
from detrkit.demo.choices import ModelChoices
from detrkit.errors import DetrkitError, MissingExtraError, SettingError
from tests.conftest import wait_until
from tests.demo.conftest import NumberReader, number_picture

THRESHOLDS = (False, 0.5, 0.85)  # not the model's own


def test_a_missing_gradio_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from detrkit.demo.server import Demo

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[demo\]'"):
        Demo(ModelChoices())


def test_the_command_tells_mistakes_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--model", "detr-resnet-5O"]) == 2
    assert run(["demo", "--queue-size", "0"]) == 2
    assert "did you mean 'detr-resnet-50" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gradio_client() -> object:
    pytest.importorskip("gradio")
    return pytest.importorskip("gradio_client")


class Running:
    """A demo whose only loaded model is a number reader, and what talks to it."""

    def __init__(self, demo, reader: NumberReader, gradio_client, downloads: Path) -> None:
        self.demo, self.reader, self.library = demo, reader, gradio_client
        self.downloads = downloads
        self.address = demo.address.rstrip("/")

    def client(self):
        # A machine may be busy.
        patient = {"timeout": 120}
        return self.library.Client(
            self.address, download_files=self.downloads, verbose=False, httpx_kwargs=patient
        )

    def ask(self, client, picture: Path):
        return client.submit(
            self.library.handle_file(picture), "numbers/model", *THRESHOLDS, api_name="/detect"
        )

    @property
    def waiting(self) -> int:
        return len(self.demo._page._queue)

    def status_of(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"{self.address}{path}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture
def start(number_reader: NumberReader, gradio_client: object, tmp_path: Path) -> Iterator[object]:
    from detrkit.demo.server import Demo

    demos = []

    def start(**settings: object) -> Running:
        choices = ModelChoices(["numbers/model"], load=lambda model: number_reader)
        demos.append(Demo(choices, port=None, **settings))
        return Running(demos[-1], number_reader, gradio_client, tmp_path / "downloads")

    yield start
    number_reader.gate.set()
    for demo in demos:
        demo.close()


def annotations(answer: tuple) -> list[dict]:
    """The boxes in the JSON file of an answer."""
    document = json.loads(Path(answer[3]["value"]).read_text())
    assert [entry["file_name"] for entry in document["images"]] == [
        Path(answer[2]["value"]).name.replace("-boxes", "")
    ]
    return document["annotations"]


def serve_many(running: Running, clients: int, folder: Path) -> None:
    """Many at once: everybody gets the answer to the own image, and only that."""
    running.reader.gate.set()
    pictures = [number_picture(folder, number) for number in range(clients)]
    connected = list(ThreadPoolExecutor(8).map(lambda _: running.client(), pictures))
    begin = threading.Barrier(clients)

    def visit(number: int) -> int:
        begin.wait()
        found = annotations(running.ask(connected[number], pictures[number]).result(timeout=120))
        assert [entry["bbox"][0] for entry in found] == [number]
        return found[0]["category_id"]

    with ThreadPoolExecutor(clients) as visitors:
        assert list(visitors.map(visit, range(clients))) == list(range(clients))
    assert sorted(running.reader.seen) == list(range(clients))  # each once


def test_many_visitors_at_once_get_the_answers_to_their_own_images(start, tmp_path: Path) -> None:
    serve_many(start(), 6, tmp_path)


@pytest.mark.slow
def test_thirty_two_visitors_at_once_get_the_answers_to_their_own_images(start, tmp_path: Path) -> None:
    serve_many(start(queue_size=32), 32, tmp_path)


def test_a_full_queue_is_told_at_once_and_those_who_wait_are_served_in_their_order(
    start, tmp_path: Path
) -> None:
    running = start(queue_size=2)
    client = running.client()
    pictures = [number_picture(tmp_path, number) for number in range(4)]
    jobs = []
    for waiting, picture in enumerate(pictures[:3]):  # one with the model, two that wait
        jobs.append(running.ask(client, picture))
        wait_until(lambda: running.reader.entered.is_set() and running.waiting == waiting)  # noqa: B023
    with pytest.raises(Exception, match=r"(?i)queue is full"):
        running.ask(client, pictures[3]).result(timeout=120)
    assert running.reader.seen == []
    running.reader.gate.set()
    assert [annotations(job.result(timeout=120))[0]["category_id"] for job in jobs] == [0, 1, 2]
    assert running.reader.seen == [0, 1, 2]
    # There is room again.
    assert annotations(running.ask(client, pictures[3]).result(timeout=120))[0]["category_id"] == 3


def test_a_broken_file_gets_a_message_and_a_fault_of_ours_tells_nothing_of_the_inside(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = start()
    running.reader.gate.set()
    client = running.client()
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    _, details, png, document, *_ = running.ask(client, broken).result(timeout=120)
    assert "broken.png: not an image" in details
    assert (png["value"], document["value"]) == (None, None)

    monkeypatch.setattr(NumberReader, "predict", lambda *_: {}["secret"])
    details = running.ask(client, number_picture(tmp_path, 1)).result(timeout=120)[1]
    assert "Something went wrong" in details
    assert "secret" not in details
    assert "Traceback" not in details


def test_a_model_that_made_room_is_not_held_by_its_results(gradio_client: object, tmp_path: Path) -> None:
    from detrkit.demo.server import Demo

    loaded: dict[str, weakref.ref[NumberReader]] = {}

    def load(model: str) -> NumberReader:
        reader = NumberReader()
        reader.gate.set()
        loaded[model] = weakref.ref(reader)
        return reader

    with Demo(ModelChoices(["a/a", "b/b"], capacity=1, load=load), port=None) as demo:
        running = Running(demo, NumberReader(), gradio_client, tmp_path / "downloads")
        picture = gradio_client.handle_file(number_picture(tmp_path, 1))
        visitors = {model: running.client() for model in ("a/a", "b/b")}
        for model, client in visitors.items():
            client.submit(picture, model, *THRESHOLDS, api_name="/detect").result(timeout=120)
        gc.collect()
        assert [loaded[model]() is None for model in visitors] == [True, False]


def test_nothing_of_the_server_is_told_and_files_go_with_it(start, tmp_path: Path) -> None:
    running = start()
    running.reader.gate.set()
    folder = Path(running.demo._folder.name)
    running.ask(running.client(), number_picture(tmp_path, 1)).result(timeout=120)
    assert any(folder.rglob("picture-1-boxes.png"))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in ("/etc/passwd", secret, Path(__file__), Path(__file__).parents[2] / "pyproject.toml"):
        assert running.status_of(f"/gradio_api/file={path}") in (403, 404)
    assert running.status_of("/config") == 200
    with urllib.request.urlopen(f"{running.address}/", timeout=10) as answer:
        policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self' ")
    assert "http" not in policy
    running.demo.close()
    assert not folder.exists()


def test_a_taken_port_and_an_empty_queue_are_refused(gradio_client: object) -> None:
    from detrkit.demo.server import Demo

    with pytest.raises(SettingError, match="at least 1"):
        Demo(ModelChoices(), queue_size=0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DetrkitError, match=f"127.0.0.1:{port}.*--port"):
            Demo(ModelChoices(), port=port)
