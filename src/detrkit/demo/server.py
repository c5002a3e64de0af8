"""Serving the page, so that it needs nothing but this machine."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detrkit.common.errors import DetrkitError, MissingExtraError, SettingError

if TYPE_CHECKING:
    from detrkit.demo.choices import ModelChoices

MAX_FILE_SIZE = "20mb"
DEFAULT_PORT = 7860

# Whatever a library may write into the page, the browser loads from this server only.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: wss: data: blob:"
)


class Demo:
    """A running demo; use it in a ``with`` block, at whose end server and files are gone.

    Attributes:
        address: Where the page is, on this machine.
        share_address: Where it is on the internet, None where it is not.
    """

    def __init__(
        self,
        choices: ModelChoices,
        *,
        host: str = "127.0.0.1",
        port: int | None = DEFAULT_PORT,
        share: bool = False,
        queue_size: int = 32,
    ) -> None:
        """Starts the server.

        Args:
            choices: The models to offer.
            host: Address to listen on; "0.0.0.0" for all of this machine's.
            port: Port to listen on; any free one when None.
            share: Whether to ask gradio's service for a public address, which needs the internet.
            queue_size: How many visitors may wait for the model; the next ones are told that it is busy.

        Raises:
            MissingExtraError: gradio is not installed.
            SettingError: ``queue_size`` is less than 1.
            DetrkitError: The server cannot listen there.
        """
        if queue_size < 1:
            raise SettingError(f"the queue needs room for at least 1 visitor, not {queue_size}")
        self._folder = tempfile.TemporaryDirectory(prefix="detrkit-demo-", ignore_cleanup_errors=True)
        self._page: Any = None
        try:
            self._start(choices, host, port, share, queue_size)
        except BaseException:
            self.close()
            raise

    def _start(
        self, choices: ModelChoices, host: str, port: int | None, share: bool, queue_size: int
    ) -> None:
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = self._folder.name
        try:
            import gradio as gr
            from starlette.middleware import Middleware

            from detrkit.demo.page import build_page
        except ImportError as error:
            raise MissingExtraError("detrkit demo", "demo") from error
        theme = gr.themes.Default(
            primary_hue="teal",
            neutral_hue="slate",
            radius_size="md",
            # Fonts that are there; gradio's own would come from elsewhere.
            font=["ui-sans-serif", "system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        )
        examples = example_images()
        self._page = build_page(choices, examples, queue_size)
        try:
            _, self.address, self.share_address = self._page.launch(
                server_name=host,
                server_port=_free_port() if port is None else port,
                share=share,
                quiet=True,
                prevent_thread_lock=True,
                theme=theme,
                css_paths=Path(__file__).parent / "style.css",
                footer_links=[],
                ssr_mode=False,
                allowed_paths=sorted({str(example.parent) for example in examples}),
                max_file_size=MAX_FILE_SIZE,
                app_kwargs={"middleware": [Middleware(_SameOrigin)]},
            )
        except OSError as error:
            raise DetrkitError(f"cannot listen on {host}:{port} ({error}); choose another --port") from error

    def wait(self) -> None:
        """Blocks until the process is interrupted."""
        while True:
            time.sleep(1)

    def close(self) -> None:
        """Stops the server and removes the visitors' files."""
        if self._page is not None:
            self._page.close(verbose=False)
        self._folder.cleanup()

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def example_images() -> list[Path]:
    """The example images of the package, or of its repository when it runs from there."""
    places = (Path(__file__).parent / "examples", Path(__file__).parents[3] / "examples")
    return next((found for place in places if (found := sorted(place.glob("*.jpg"), reverse=True))), [])


def serve(models: Sequence[str] = (), **settings: Any) -> None:
    """Serves the page until the process is interrupted, as in a Hugging Face Space.

    Args:
        models: Hub ids, folders or short names to offer before all others.
        settings: As for :class:`Demo`.
    """
    from detrkit.demo.choices import ModelChoices

    with Demo(ModelChoices(models), **settings) as demo:
        demo.wait()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _SameOrigin:
    """ASGI middleware: tells browsers to load nothing from anywhere else."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(event: Any) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [
                    *event["headers"],
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"same-origin"),
                ]
            await send(event)

        await self._app(scope, receive, send_with_policy)
