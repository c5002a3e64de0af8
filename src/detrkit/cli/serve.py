"""``detrkit serve``: a detector as an HTTP service."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from detrkit.cli import options
from detrkit.common.errors import SettingError
from detrkit.common.terminal import quiet_libraries, say
from detrkit.serving.settings import DEFAULT_MAX_BYTES, DEFAULT_PORT, ModelSettings, ServiceSettings


def serve(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub id, folder, or a name from: detrkit models; NAME=MODEL gives it a name for requests. "
            "Can be repeated; the first one is the default.  [default: detr-resnet-50]",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")
    ] = DEFAULT_PORT,
    engine: options.Engine = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    revision: options.Revision = None,
    queries: options.Queries = None,
    batch_size: options.BatchSize = 4,
    max_wait_ms: Annotated[
        float,
        typer.Option(
            min=0,
            max=1000,
            help="Maximum milliseconds that an image waits for others, to be run in one batch.",
        ),
    ] = 5,
    queue_size: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of requests that are not yet answered; further ones are refused."
        ),
    ] = 64,
    ray: options.Ray = None,
    ray_workers: options.RayWorkers = None,
    ray_cpus: options.RayCpus = None,
    exif_orientation: options.ExifOrientation = False,
    max_pixels: options.MaxPixels = None,
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Maximum number of bytes of an image.")
    ] = DEFAULT_MAX_BYTES,
    debug: options.Debug = False,
) -> None:
    """Serve a detector over HTTP.

    `POST /v1/detect` an image, as bytes, as a form or in JSON, and get its objects as JSON; `/openapi.json`
    describes the rest. The address is printed on stdout, a line for each request on stderr. SIGTERM or Ctrl-C
    stops the server when all accepted requests are answered. With `--ray`, the models run on a Ray cluster,
    in as many replicas as there is work for. Requires the extra `serve`.
    """
    from detrkit.checkpoints.loading import is_exported
    from detrkit.checkpoints.registry import resolve_model
    from detrkit.serving import require_packages

    require_packages()
    from detrkit.serving.local import LocalBackend
    from detrkit.serving.server import listen, run_server
    from detrkit.serving.service import Service

    named = name_models(models or ["detr-resnet-50"])
    for model in named.values():
        resolve_model(model)  # a misspelt name is reported before anybody connects
    limits = options.image_limits(max_pixels, max_bytes, False)
    if not debug and not all(is_exported(resolve_model(model)) for model in named.values()):
        quiet_libraries()
    settings = ModelSettings(
        models=named,
        engine=engine,
        device=device,
        dtype=dtype,
        revision=revision,
        queries=queries,
        limits=limits,
        exif_orientation=exif_orientation,
        batch_size=batch_size,
        max_wait=max_wait_ms / 1000,
    )
    with listen(host, port) as listening:
        service = Service(
            LocalBackend(settings), named, ServiceSettings(limits=limits, queue_size=queue_size)
        )
        run_server(service, listening)
    say("Stopped; all accepted requests were answered.")


def name_models(models: Sequence[str]) -> dict[str, str]:
    """The names by which requests choose a model -> what to load.

    Args:
        models: ``MODEL`` or ``NAME=MODEL`` each. A folder without a name has the folder's.

    Raises:
        SettingError: Two have one name.
    """
    named: dict[str, str] = {}
    for text in models:
        name, equals, model = text.partition("=")
        if not equals or os.path.lexists(text) or not re.fullmatch(r"[\w.-]{1,100}", name):
            model = text
            name = Path(os.path.abspath(text)).name if os.path.isdir(text) else text  # noqa: PTH100, PTH112
        if name in named:
            raise SettingError(
                f"two models are called {name!r} ({named[name]} and {model}); "
                f"name one with --model NAME={model}"
            )
        named[name] = model
    return named
