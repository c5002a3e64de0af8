"""Models in the replicas of a Ray Serve application; this process accepts requests and passes them on.

Detection changes nothing, so a request can be done again: when a replica or its machine is lost, its requests
go to another one.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from detrkit.common.errors import DetrkitError, MissingExtraError, SettingError
from detrkit.common.log import logger
from detrkit.common.schema import JsonObject
from detrkit.common.text import first_line
from detrkit.inference.batching import WAITING_GROUPS
from detrkit.inference.ray_connection import CLIENT, connect, import_ray, shares
from detrkit.serving.backend import Answer, Task
from detrkit.serving.local import LocalBackend, in_daemon_thread
from detrkit.serving.problems import RequestError
from detrkit.serving.settings import ModelSettings

# How often a request is passed on before it is given up; the pauses between are longer each time.
_TRIES, _PAUSE = 6, 0.2

# A replica that has so many batches to do is busy; Ray then starts another one.
_BUSY = 2


class Replica:
    """What runs in a replica: the same models, batches and answers as in a server of one process."""

    async def __init__(  # type: ignore[misc] # Ray awaits it
        self, settings: ModelSettings, threads: int | None
    ) -> None:
        """Loads the models.

        Args:
            settings: Which models, and how they are run.
            threads: Threads for the model on a CPU; None leaves it to the engine.
        """
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray sets it to 1 where a replica has no whole core
        self._backend = LocalBackend(settings)
        await self._backend.start()

    async def answer(self, task: Task) -> Answer | RequestError:
        """The answer to a task, or why it is refused; an error that is raised Ray prints in full."""
        try:
            return await self._backend.answer(task)
        except RequestError as error:
            return error

    async def describe(self, model: str) -> JsonObject:
        """See :meth:`detrkit.serving.backend.Backend.describe`."""
        return self._backend.describe(model)


class RayBackend:
    """Answers tasks with the replicas of a Ray Serve application, which Ray starts as they are needed."""

    def __init__(
        self,
        settings: ModelSettings,
        *,
        address: str,
        port: int,
        replicas: int | None = None,
        cpus: int | None = None,
    ) -> None:
        """Connects to a cluster; the replicas start with ``start``.

        Args:
            settings: Which models, and how they are run.
            address: Of the cluster, as for :class:`detrkit.inference.cluster.RayDetector`.
            port: Where this server listens, which tells its application from others on the cluster.
            replicas: Maximum number of replicas; by default as many as there are cores or cards for.
            cpus: Cores of each; by default those of the smallest machine, up to 8.

        Raises:
            MissingExtraError: Ray Serve is not installed.
            SettingError: The cluster cannot be reached, or does not have the requested cores.
        """
        if address.startswith(CLIENT):
            raise SettingError(
                f"the service cannot run outside the cluster at {address}; start it on a machine of the "
                "cluster, with --ray auto or --ray host:port"
            )
        ray = import_ray()
        try:
            importlib.import_module("ray.serve")
        except ImportError as error:
            raise MissingExtraError("detrkit serve --ray", "serve,ray") from error
        # Replicas have a working directory of their own.
        models = {
            name: os.path.abspath(model) if os.path.isdir(model) else model  # noqa: PTH100, PTH112
            for name, model in settings.models.items()
        }
        self._settings = replace(settings, models=models)
        connect(ray, address)
        self._shares = shares(ray.nodes(), replicas, cpus, settings.device)
        self._name = re.sub(r"\W+", "-", f"detrkit-{socket.gethostname()}-{port}")
        self._handle: Any = None
        self._retried: tuple[type[Exception], ...] = ()
        self._final: tuple[type[Exception], ...] = ()
        self._described: dict[str, JsonObject] = {}

    async def start(self) -> None:
        """See :meth:`detrkit.serving.backend.Backend.start`."""
        await in_daemon_thread(self._deploy)
        for model in self._settings.models:
            self._described[model] = await self._handle.describe.remote(model)

    async def stop(self) -> None:
        """See :meth:`detrkit.serving.backend.Backend.stop`."""
        from ray import serve

        await in_daemon_thread(lambda: serve.delete(self._name))

    async def answer(self, task: Task) -> Answer:
        """See :meth:`detrkit.serving.backend.Backend.answer`."""
        for attempt in range(_TRIES):
            if attempt:
                await asyncio.sleep(_PAUSE * 2**attempt)
            try:
                found = await self._handle.answer.remote(task)
            except self._final:
                raise
            except self._retried as error:
                logger.warning("a replica was lost (%s); its request goes to another one", first_line(error))
                continue
            if isinstance(found, RequestError):
                raise found
            assert isinstance(found, Answer)
            return found
        raise RequestError(503, "the cluster is losing replicas; try again", {"Retry-After": "5"})

    def describe(self, model: str) -> JsonObject:
        """See :meth:`detrkit.serving.backend.Backend.describe`."""
        return self._described[model]

    def _deploy(self) -> None:
        import ray
        from ray import serve
        from ray.serve.config import AutoscalingConfig
        from ray.serve.exceptions import RayServeException
        from ray.serve.schema import LoggingConfig

        self._retried = (ray.exceptions.RayError, RayServeException)
        self._final = (ray.exceptions.RayTaskError,)  # what was raised there would be raised again
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        most, cpus, gpus = self._shares
        size = self._settings.batch_size
        deployment = serve.deployment(
            Replica,
            name="Replica",
            max_constructor_retry_count=1,
            max_ongoing_requests=WAITING_GROUPS * size,
            autoscaling_config=AutoscalingConfig(
                min_replicas=1, max_replicas=most, target_ongoing_requests=_BUSY * size
            ),
            ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
            logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
        )
        try:
            serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="ERROR"))
            self._handle = serve.run(
                deployment.bind(self._settings, None if gpus else cpus), name=self._name, route_prefix=None
            )
        except (RuntimeError, *self._retried) as error:
            application = serve.status().applications.get(self._name)
            deployments = application.deployments.values() if application else ()
            reason = _cause([str(error), *(deployment.message for deployment in deployments)])
            serve.delete(self._name)
            raise DetrkitError(f"the replicas cannot be started: {reason}") from error


def _cause(said: Sequence[str]) -> str:
    """The line of Ray's messages that says what is wrong in a replica."""
    lines = [line.strip() for text in said for line in text.splitlines() if line.strip()]
    causes = [line.partition(": ")[2] for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    return (causes or lines)[-1]
