"""The state of a server: loading, ready or stopping, and the requests that it has accepted."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping

from detrkit.common.terminal import say
from detrkit.common.text import did_you_mean
from detrkit.serving.backend import Answer, Backend, Task
from detrkit.serving.metrics import Metrics
from detrkit.serving.problems import RequestError
from detrkit.serving.settings import ServiceSettings

# How much the last image counts in the average of the time that one takes.
_LAST_COUNTS = 0.1
_LONGEST_PAUSE = 60


class Service:
    """Accepts requests for models as long as there is room, and counts those that are under way.

    Attributes:
        models: Name -> what it was loaded from; the first one is the default.
        settings: How requests are accepted.
        metrics: What is counted.
        failure: Why the models could not be loaded.
        loaded: Whether the models are loaded.
        stopping: Whether the server was asked to stop.
        ended: Set when the models cannot be loaded, or all requests are answered after ``stop``.
    """

    def __init__(
        self, backend: Backend, models: Mapping[str, str], settings: ServiceSettings | None = None
    ) -> None:
        self.models, self.settings = dict(models), settings or ServiceSettings()
        self.metrics = Metrics()
        self.failure: Exception | None = None
        self.ended = asyncio.Event()
        self._backend = backend
        self.loaded = self.stopping = False
        self._pending = 0
        self._seconds = 0.0  # that an image takes
        self._loading: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return self.loaded and not self.stopping

    @property
    def pending(self) -> int:
        """Requests that are accepted and not yet answered."""
        return self._pending

    def start(self) -> None:
        """Starts to load the models; requests are accepted once they are there."""
        self._loading = asyncio.get_running_loop().create_task(self._load())

    async def _load(self) -> None:
        start = time.monotonic()
        try:
            await self._backend.start()
            self.loaded = True
            say(f"Ready: {', '.join(self.models)} loaded in {time.monotonic() - start:.1f} s.")
        except Exception as error:
            self.failure = error
            self.ended.set()

    def stop(self) -> None:
        """Accepts no more requests; ``ended`` is set when those that were accepted are answered."""
        self.stopping = True
        if not self._pending:
            self.ended.set()

    async def close(self) -> None:
        """Lets go of the models."""
        if self._loading is not None:
            self._loading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loading
        if self.loaded:
            await self._backend.stop()

    def check_ready(self) -> None:
        """Raises the error for requests that come too early or too late."""
        if self.stopping:
            raise RequestError(503, "the server is stopping; ask another one", {"Retry-After": "5"})
        if not self.loaded:
            raise RequestError(503, "the server is loading its models; try again", {"Retry-After": "5"})

    def accept(self) -> None:
        """Takes a place in the queue, to be given back with ``release``.

        Raises:
            RequestError: The server is not ready, or the queue is full.
        """
        self.check_ready()
        if self._pending >= self.settings.queue_size:
            pause = min(max(1, math.ceil(self._pending * self._seconds)), _LONGEST_PAUSE)
            raise RequestError(
                429,
                f"the queue is full ({self.settings.queue_size} requests); try again in {pause} s",
                {"Retry-After": str(pause)},
            )
        self._pending += 1

    def release(self) -> None:
        """Gives back a place in the queue."""
        self._pending -= 1
        if self.stopping and not self._pending:
            self.ended.set()

    def model(self, name: str | None) -> str:
        """The name of the model that a request asks for; the first one by default.

        Raises:
            RequestError: There is no such model.
        """
        if name is None:
            return next(iter(self.models))
        if name not in self.models:
            known = ", ".join(self.models)
            hint = did_you_mean(name[:100], self.models)
            raise RequestError(400, f"unknown model {name[:100]!r}{hint}; available: {known}")
        return name

    async def answer(self, task: Task) -> Answer:
        """Answers a task.

        Raises:
            RequestError: It is refused.
        """
        answer = await self._backend.answer(task)
        times = answer.times
        took = times.model / max(times.batch, 1)
        self._seconds = took if not self._seconds else self._seconds + _LAST_COUNTS * (took - self._seconds)
        self.metrics.done(task.model, times)
        return answer

    def describe(self, model: str) -> dict[str, object]:
        """What ``GET /v1/model`` says."""
        self.check_ready()
        limits = self.settings.limits
        return {
            "model": model,
            "models": list(self.models),
            **self._backend.describe(model),
            "limits": {"max_pixels": limits.max_pixels, "max_bytes": limits.max_bytes},
        }
