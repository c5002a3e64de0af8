"""What a stranger can send to the services: queries, bodies of every form, and requests to an endpoint."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import MutableMapping
from functools import cache
from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request

from detrkit.endpoint import EndpointHandler
from detrkit.serving.app import _query
from detrkit.serving.problems import RequestError
from detrkit.serving.uploads import read_upload
from tests.fuzz.base import Choices, branching_seeds, edited, json_text

_IMAGE = b"GIF89a\1\0\1\0\0\0\0;"
_MOST = 200  # bytes of an image, so that larger ones are tried
_TYPES = (
    *("", "image/png", "application/octet-stream", "application/json", "multipart/form-data; boundary=b"),
    *(
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/html",
        "application/json; charset=utf-7",
    ),
)
_QUERY: dict[str, Any] = {"threshold": "0.5", "overlap": ".7", "max_objects": "3", "model": "cells"}
_ENDPOINT: dict[str, Any] = {
    "inputs": base64.b64encode(_IMAGE).decode(),
    "parameters": {"threshold": 0.5, "overlap": 0.7, "max_objects": 3},
}
_PART = b'--b\r\nContent-Disposition: form-data; name="image"'
FORMS = (
    _PART + b'; filename="a.gif"\r\nContent-Type: image/gif\r\n\r\n' + _IMAGE + b"\r\n--b--\r\n",
    _PART + b"\r\n\r\n" + base64.b64encode(_IMAGE) + b"\r\n--b--\r\n",
)


def request(data: bytes) -> None:
    """A query, a body of some type, or a request to an endpoint: bytes, or good ones that they change."""
    choices = Choices(data)
    what = choices.number(5)
    rest = data[choices.place :]
    if what == 0:
        _ask(rest.replace(b"#", b""))
    elif what == 1:
        fields = edited(_QUERY, Choices(rest))
        _ask(urlencode(fields if isinstance(fields, dict) else {}, errors="backslashreplace").encode())
    elif what == 2:
        kind = choices.of(_TYPES)
        _send(data[choices.place :], kind)
    elif what == 3:
        _send(json_text({"image": _ENDPOINT["inputs"]}, rest), "application/json")
    else:
        found = json.loads(json.dumps(edited(_ENDPOINT, Choices(rest))))
        assert _handler()(found) == []


def _ask(query: bytes) -> None:
    scope = {"type": "http", "method": "POST", "path": "/v1/detect", "headers": [], "query_string": query}
    try:
        options, model = _query(Request(scope), "detect")
    except RequestError as error:
        _check(error)
    else:
        assert model is None or isinstance(model, str)
        assert all(value >= 0 for value in options.given().values())


def _send(body: bytes, content_type: str) -> None:
    headers = [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/detect", "headers": headers, "query_string": b""}
    half = len(body) // 2
    messages = [
        {"type": "http.request", "body": body[:half], "more_body": True},
        {"type": "http.request", "body": body[half:], "more_body": False},
    ]

    async def receive() -> MutableMapping[str, Any]:
        return messages.pop(0)

    try:
        upload = _loop().run_until_complete(read_upload(Request(scope, receive), _MOST, 10))
        assert 0 < len(upload.image(_MOST)) <= _MOST
    except RequestError as error:
        _check(error)


def _check(error: RequestError) -> None:
    assert error.status in (400, 413, 415)
    assert error.message.isprintable()
    assert 0 < len(error.message) <= 500


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def _handler() -> EndpointHandler:
    """An endpoint whose model finds nothing; other targets read images."""
    handler = EndpointHandler.__new__(EndpointHandler)
    handler.detector = lambda image, **options: []  # type: ignore[assignment]
    return handler


def request_seeds() -> list[bytes]:
    forms = [b"\2\4" + form for form in FORMS]
    queries = [b"\0" + urlencode(_QUERY).encode(), b"\0threshold=1_000&threshold=1", b"\0max_objects=%00"]
    return [*forms, *queries, b"\2\1" + _IMAGE, b"\3\0" + b'{"image": "data:,a"}', *branching_seeds(5)]
