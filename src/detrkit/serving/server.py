"""The running server: its socket, its signals and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from detrkit.common.errors import DetrkitError
from detrkit.common.terminal import Terminated, interrupt_status, log_in_one_line, say
from detrkit.serving.app import build_app
from detrkit.serving.service import Service

if TYPE_CHECKING:
    from starlette.types import ASGIApp

# Seconds that an idle connection stays open: longer than load balancers usually keep theirs.
_KEEP_ALIVE = 75

_BACKLOG = 2048

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(host: str, port: int) -> socket.socket:
    """A socket on an address and port of this machine; any free port for 0.

    Raises:
        DetrkitError: It is in use, or not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DetrkitError(f"cannot listen on {host}:{port} ({reason}); choose another --port") from error


def address(listening: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(service: Service, listening: socket.socket) -> None:
    """Serves until SIGTERM or an interrupt; the requests that were accepted are answered first.

    Until then new ones are refused with status 503. A second signal ends the process at once. The address is
    printed on stdout.

    Args:
        service: What answers; its models are loaded while the server already listens.
        listening: Where.

    Raises:
        Exception: Why the models cannot be loaded.
    """
    with _own_log(), _own_signals(), _ends_at_once_if_loading(service):
        asyncio.run(_serve(service, build_app(service), listening))
    if service.failure is not None:
        raise service.failure


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """Within the block, what the libraries log are messages of ours: one line each, without a traceback."""
    loggers = [logging.getLogger(name) for name in ("uvicorn", "asyncio")]
    before = [logger.propagate for logger in loggers]
    with log_in_one_line(*(logger.name for logger in loggers)):
        try:
            for logger in loggers:
                logger.propagate = False
            yield
        finally:
            for logger, propagate in zip(loggers, before):
                logger.propagate = propagate


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts the handlers back that were there before the event loop had its own."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(service: Service, app: ASGIApp, listening: socket.socket) -> None:
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE,
        # Answers are given by then; this is for clients that do not take theirs.
        timeout_graceful_shutdown=math.ceil(service.settings.patience),
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, _on_signal, service, number)
    where = address(listening)
    print(where, flush=True)  # from now on a signal stops the server as it should
    say(f"Listening at {where}. Loading {', '.join(service.models)}. Press Ctrl-C to stop.", address=where)
    running = asyncio.ensure_future(server.serve(sockets=[listening]))
    ended = asyncio.ensure_future(service.ended.wait())
    await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    ended.cancel()
    await running


def _on_signal(service: Service, number: signal.Signals) -> None:
    if service.stopping:
        say("Stopped at once.")
        _exit(interrupt_status(Terminated() if number == signal.SIGTERM else None))
    say(f"Stopping; requests under way: {service.pending}. A second signal stops at once.")
    service.stop()


@contextlib.contextmanager
def _ends_at_once_if_loading(service: Service) -> Iterator[None]:
    """A thread that loads a model cannot be stopped, and the interpreter had better not end around it."""
    yield
    if not service.loaded and service.failure is None:
        _exit(0)


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
