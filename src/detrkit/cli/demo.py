"""``detrkit demo``: a web page to drop images on."""

from __future__ import annotations

import signal
from typing import Annotated

import typer

from detrkit.cli.options import Debug
from detrkit.common.terminal import say


def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub id, folder, or a name from: detrkit models; offered before all others. "
            "Can be repeated.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 7860,
    share: Annotated[
        bool, typer.Option("--share/--no-share", help="Ask Gradio's service for a public address.")
    ] = False,
    queue_size: Annotated[
        int,
        typer.Option(min=1, help="Most visitors that wait for the model; the next ones are told it is busy."),
    ] = 32,
    debug: Debug = False,
) -> None:
    """Open a web page to drop images on.

    Offers the models of `--model`, those that come with detrkit and those of `detrkit models`, and loads each
    when it is first chosen. The page needs nothing from the internet, except models that are not on this
    machine yet. Needs the extra `demo`.
    """
    from detrkit.demo.choices import ModelChoices
    from detrkit.demo.server import Demo

    choices = ModelChoices(model or ())
    # A server is stopped by this signal; its files should go with it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Demo(choices, host=host, port=port or None, share=share, queue_size=queue_size) as running:
        addresses = [address for address in (running.address, running.share_address) if address]
        say(f"Open {' or '.join(addresses)} in a browser. Press Ctrl-C to stop.")
        running.wait()
