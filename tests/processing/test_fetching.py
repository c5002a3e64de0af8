"""Time-outs of images from the web."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits
from detrkit.processing.fetching import _Download, fetch
from tests.trust.web import BadServer

HURRIED = ImageLimits(allow_private=True, timeout=0.2)


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "detrkit-fetch"]


def assert_no_fetch_thread_stays() -> None:
    for thread in fetch_threads():
        thread.join(20)
    assert fetch_threads() == []


def test_a_hanging_name_look_up_ends_in_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def look_up(*_: Any, **__: Any) -> list[Any]:
        answer.wait()
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    try:
        with pytest.raises(ImageError, match=r"example\.org/a\.jpg: no complete answer after 0\.2 seconds"):
            fetch("http://example.org/a.jpg", HURRIED)
    finally:
        answer.set()
    assert_no_fetch_thread_stays()


@pytest.mark.parametrize("path", ["slow", "slow-headers"])
def test_after_a_time_out_no_thread_reads_on(path: str) -> None:
    with BadServer() as server:
        with pytest.raises(ImageError, match=f"{server.url}/{path}: "):
            fetch(f"{server.url}/{path}", HURRIED)
        assert_no_fetch_thread_stays()


def test_giving_up_ends_a_connection_that_encryption_has_taken_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        download = _Download("https://localhost/a.jpg", HURRIED)
        connected = download.connect("127.0.0.1", server.getsockname()[1], checked=False)
        with socket.socket(fileno=connected.detach()) as encrypted:  # as ssl does
            encrypted.settimeout(5)
            download.abandon()
            assert encrypted.recv(1) == b""
