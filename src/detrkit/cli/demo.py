"""``detrkit demo``: a web page to drop images on."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from detrkit.cli import options
from detrkit.common.terminal import say


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub id, folder, or a name from: detrkit models; listed first. Can be repeated.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share/--no-share", help="Get a public URL from Gradio's service.")
    ] = False,
    queries: options.Queries = None,
    queue_size: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of waiting requests; further ones are refused."),
    ] = 32,
    debug: options.Debug = False,
) -> None:
    """Open a web page to drop images on.

    The page offers the models of `--model`, the bundled ones and those of `detrkit models`, and loads a model
    when it is first selected. It needs the internet only to download models. Requires the extra `demo`.
    """
    from detrkit.demo.choices import ModelChoices
    from detrkit.demo.server import Demo

    choices = ModelChoices(model or (), queries=queries)
    # A server is stopped by this signal, and should then remove its files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Demo(choices, host=host, port=port or None, share=share, queue_size=queue_size) as running:
        addresses = [address for address in (running.address, running.share_address) if address]
        say(f"Open {' or '.join(addresses)} in a browser. Press Ctrl-C to stop.")
        running.wait()
