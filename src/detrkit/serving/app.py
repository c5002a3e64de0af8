"""The HTTP side of the server: routes, and the form of answers and errors."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from detrkit.common.errors import SettingError
from detrkit.inference.requests import RequestOptions, read_options
from detrkit.serving.backend import OPTIONS_OF, Kind, Task
from detrkit.serving.metrics import CONTENT_TYPE
from detrkit.serving.openapi import document
from detrkit.serving.problems import ClientGoneError, RequestError, refusal
from detrkit.serving.record import CLIENT_GONE, RECORD, Recorder, RequestRecord
from detrkit.serving.service import Service
from detrkit.serving.uploads import read_upload

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_Made = TypeVar("_Made")

PATHS: dict[str, Kind] = {"/v1/detect": "detect", "/v1/segment": "segment"}

# Neither "nan" nor "1_000", which Python takes for numbers too.
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})(e[+-]?\d{1,3})?", re.IGNORECASE | re.ASCII)


def build_app(service: Service) -> ASGIApp:
    """The ASGI application of a service, which starts to load its models when it starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    routes = _Routes(service)
    app = Starlette(
        routes=[
            *(Route(path, routes.infer(kind), methods=["POST"]) for path, kind in PATHS.items()),
            Route("/v1/model", routes.model),
            Route("/health/live", routes.live),
            Route("/health/ready", routes.is_ready),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.openapi),
        ],
        exception_handlers={RequestError: _refused, HTTPException: _not_routed, Exception: _failed},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return Recorder(app, service, frozenset(route.path for route in app.routes))


class _Routes:
    """What answers each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._openapi = document(service.models, service.settings.limits.max_bytes)

    def infer(self, kind: Kind) -> Callable[[Request], Awaitable[Response]]:
        """What answers a POST of an image."""

        async def answer(request: Request) -> Response:
            record: RequestRecord = request.scope[RECORD]
            self._service.check_ready()
            options, name = _query(request, kind)
            record.model = model = self._service.model(name)
            self._service.accept()
            record.accepted = True
            limits, patience = self._service.settings.limits, self._service.settings.patience
            upload = await read_upload(request, limits.max_bytes, patience)
            record.received = len(upload.content)
            task = Task(kind=kind, model=model, upload=upload, options=options)
            found = await _while_connected(request, self._service.answer(task))
            record.times, record.document = found.times, found.document
            return JSONResponse({"model": model, **found.document})

        return answer

    async def model(self, request: Request) -> Response:
        """Classes and limits of a model."""
        self._service.check_ready()
        return JSONResponse(self._service.describe(self._service.model(_only(request, "model"))))

    async def live(self, request: Request) -> Response:
        """Whether the process should be left alone."""
        return JSONResponse({"status": "live"})

    async def is_ready(self, request: Request) -> Response:
        """Whether requests should be sent here."""
        self._service.check_ready()
        return JSONResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """The counters."""
        text = self._service.metrics.text(self._service.pending, self._service.ready)
        return Response(text, media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """The description of all this."""
        return JSONResponse(self._openapi)


def _query(request: Request, kind: Kind) -> tuple[RequestOptions, str | None]:
    """The options of a request and the name of its model."""
    values = {name: _number(_only(request, name) or "") for name in request.query_params if name != "model"}
    try:
        return read_options(values, (*OPTIONS_OF[kind], "model")), _only(request, "model")
    except SettingError as error:
        raise refusal(error) from error


def _only(request: Request, name: str) -> str | None:
    values = request.query_params.getlist(name)
    if len(values) > 1:
        raise RequestError(400, f"parameter {name[:100]!r} is given {len(values)} times; pass it once")
    return cast("str", values[0]) if values else None


def _number(text: str) -> float | str:
    """The number that a text is, or the text, which whoever expects a number refuses."""
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


async def _while_connected(request: Request, work: Awaitable[_Made]) -> _Made:
    """What work gives; it is given up when the client closes the connection.

    Raises:
        ClientGoneError: It did.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({done, watch}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        raise ClientGoneError
    finally:
        for one in (done, watch):
            one.cancel()


def _error(status: int, message: str, headers: Any = None) -> Response:
    return JSONResponse({"error": message}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    request.scope[RECORD].error = error.message
    return _error(error.status, error.message, error.headers)


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "unknown path; /openapi.json lists the paths",
        405: f"{request.method[:20]} is not supported here; use {(error.headers or {}).get('Allow', 'GET')}",
    }.get(error.status_code, str(error.detail))
    request.scope[RECORD].error = message
    return _error(error.status_code, message, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGoneError):
        return Response(status_code=CLIENT_GONE)  # which nobody reads
    return _error(500, f"internal error; see the server's log for request {request.scope[RECORD].id}")
