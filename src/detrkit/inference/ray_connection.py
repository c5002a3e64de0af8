"""Connecting to a Ray cluster, and how its machines are shared among processes that hold a model."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from detrkit.common.errors import MissingExtraError, SettingError
from detrkit.common.schema import JsonObject
from detrkit.common.text import first_line

AUTO = "auto"
LOCAL = "local"
CLIENT = "ray://"
"""How an address begins that leads into a cluster from outside."""

# More cores than this do not make one image much faster; another worker does more with them.
_MOST_CPUS = 8


def is_ray_address(text: str) -> bool:
    """Whether a text is what ``RayDetector`` takes for an address, and not the name of a file."""
    host, _, port = text.removeprefix(CLIENT).rpartition(":")
    return text in (AUTO, LOCAL) or (
        bool(host) and "/" not in host and re.fullmatch("[0-9]{1,5}", port) is not None
    )


def import_ray() -> ModuleType:
    """Ray, or the error that says what to install."""
    # Ray would ask its makers' server, at the end of every run, to count it, and log on
    # stderr. What stops a job reaches us as an exception.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("detection on a Ray cluster", "ray") from error
    return ray


def connect(ray: ModuleType, address: str) -> None:
    """Connects this process to a cluster, as :class:`detrkit.inference.cluster.RayDetector` does.

    Raises:
        SettingError: It cannot be reached.
    """
    if not is_ray_address(address):
        raise SettingError(
            f"{address!r} is not the address of a Ray cluster; pass host:port, ray://host:port, auto or local"
        )
    if ray.is_initialized():
        if address in (AUTO, ray.get_runtime_context().gcs_address):
            return
        ray.shutdown()
    try:
        with _nothing_on_stderr():
            # The dashboard of a cluster that is started for this process would take longer than the cluster.
            quiet = {"log_to_driver": False, "logging_level": "ERROR"}
            own = {} if address.startswith(CLIENT) else {"include_dashboard": False}
            ray.init(address=None if address == AUTO else address, **quiet, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SettingError(
            f"cannot reach the Ray cluster at {address} ({first_line(error)}); start one with: "
            "ray start --head"
        ) from error


@contextlib.contextmanager
def _nothing_on_stderr() -> Iterator[None]:
    """For what C++ writes there: that it was told to write nothing."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def shares(
    nodes: Sequence[JsonObject], workers: int | None, cpus: int | None, device: str | None
) -> tuple[int, int, int]:
    """How many processes there can be, and the cores and graphics cards of each.

    Args:
        nodes: The machines, from ``ray.nodes()``.
        workers: Maximum number of processes; None for as many as fit.
        cpus: Cores of each; None for those of the smallest machine, up to 8.
        device: Where they run the model.

    Raises:
        SettingError: The cluster does not have so much.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    if not alive:
        raise SettingError("the Ray cluster has no machine with a free core")
    cores = [int(resources["CPU"]) for resources in alive]
    cards = [int(resources.get("GPU", 0)) for resources in alive]
    gpus = int(sum(cards) > 0 and device != "cpu")
    if cpus is None:
        cpus = min(min(cores), _MOST_CPUS)
        if gpus:  # every card has its worker
            cpus = max(1, min(n // card for n, card in zip(cores, cards) if card))
    if cpus < 1 or cpus > max(cores):
        raise SettingError(
            f"no machine of the Ray cluster has {cpus} cores for a worker; the largest has {max(cores)}"
        )
    if gpus:
        room = sum(min(card, n // cpus) for n, card in zip(cores, cards))
    else:
        room = sum(n // cpus for n in cores)
    if workers is not None and workers < 1:
        raise SettingError(f"there must be at least 1 worker, not {workers}")
    return max(1, room if workers is None else workers), cpus, gpus
