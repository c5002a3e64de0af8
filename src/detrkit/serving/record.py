"""One line in the log for each request."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from detrkit.common.schema import JsonObject
from detrkit.common.terminal import count, say
from detrkit.common.text import first_line
from detrkit.serving.batching import Times
from detrkit.serving.problems import ClientGoneError
from detrkit.serving.service import Service

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

RECORD = "detrkit.record"
"""Where the record of a request is in its ASGI scope."""

CLIENT_GONE = 499
"""nginx's status for a client that is not there any more; only in the log."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(kw_only=True)
class RequestRecord:
    """What there is to say of a request.

    Attributes:
        id: The client's ``X-Request-Id``, or one of ours; the answer has it too.
        start: When it came, in seconds.
        status: HTTP status of the answer.
        accepted: Whether it has a place in the queue.
        received: Bytes of the image.
        model: Name of the model.
        document: The answer.
        times: Where the time was spent.
        error: Why there is none.
    """

    id: str
    start: float = field(default_factory=time.monotonic)
    status: int = 0
    accepted: bool = False
    received: int | None = None
    model: str | None = None
    document: JsonObject | None = None
    times: Times | None = None
    error: str | None = None

    def log(self, method: str, path: str, client: str | None) -> None:
        """Prints the line."""
        milliseconds = round((time.monotonic() - self.start) * 1000, 1)
        facts: dict[str, object] = {"request": self.id, "method": method, "path": path, "client": client}
        facts |= {"status": self.status, "ms": milliseconds, "model": self.model, "bytes": self.received}
        text = f"{method} {path} {self.status} in {milliseconds:.0f} ms"
        if self.document is not None:
            size = self.document["image"]
            objects = len(self.document.get("segments", self.document["objects"]))
            facts |= {"width": size["width"], "height": size["height"], "objects": objects}
            what = "segment" if "segments" in self.document else "object"
            text += f": {self.model}, {size['width']}x{size['height']}, {count(objects, what)}"
        if self.times is not None:
            facts |= {
                f"{name}_ms": round(getattr(self.times, name) * 1000, 1) for name in ("read", "wait", "model")
            }
            facts["batch"] = self.times.batch
        if self.error is not None:
            facts["error"] = self.error
            text += f": {self.error}"
        known: dict[str, Any] = {name: value for name, value in facts.items() if value is not None}
        say(text, title="Error" if self.status >= 500 and self.status != 503 else None, **known)


class Recorder:
    """ASGI middleware around everything: the record of a request, its line in the log, its metrics.

    What goes wrong inside is answered with an error that does not say what it was; the log does.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: frozenset[str]) -> None:
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(id=given if _ID.fullmatch(given) else uuid.uuid4().hex[:16])
        scope[RECORD] = record

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode())]
            try:
                await asyncio.wait_for(send(message), self._service.settings.patience)
            except asyncio.TimeoutError as error:
                raise ClientGoneError from error

        try:
            await self._app(scope, receive, send_on)
        except ClientGoneError:
            record.status, record.error = CLIENT_GONE, "the client closed the connection, or does not read"
        except Exception as error:  # the application has answered it
            record.error = f"{type(error).__name__}: {first_line(error)}"
        finally:
            if record.accepted:
                self._service.release()
            self._finish(scope, record)

    def _finish(self, scope: Scope, record: RequestRecord) -> None:
        path, client = scope["path"], scope.get("client")
        known = path if path in self._paths else "other"
        self._service.metrics.answered(known, record.status, time.monotonic() - record.start)
        record.log(scope["method"][:20], path[:200], client[0] if client else None)
