"""A web server that misbehaves in all the ways of the table of bad input."""

from __future__ import annotations

import contextlib
import http.server
import io
import threading
import time
from types import TracebackType

from tests.conftest import make_picture


def png(width: int = 60, height: int = 40) -> bytes:
    """The bytes of a picture's file."""
    file = io.BytesIO()
    make_picture(width, height).save(file, "PNG")
    return file.getvalue()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        # The client has often gone before all is said.
        with contextlib.suppress(OSError):
            getattr(self, "answer_" + self.path.strip("/").partition(".")[0].replace("-", "_"), self.gone)()

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def gone(self) -> None:
        self.send_error(404)

    def send(self, content: bytes, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def answer_photo(self) -> None:
        self.send(png())

    def answer_moved(self) -> None:
        self.send(b"", 302, Location="/photo.png")

    def answer_loop(self) -> None:
        self.send(b"", 301, Location="/loop")

    def answer_to_file(self) -> None:
        self.send(b"", 302, Location="file:///etc/hostname")

    def answer_to_ftp(self) -> None:
        self.send(b"", 307, Location="ftp://example.org/photo.png")

    def answer_to_private(self) -> None:
        port = self.server.server_address[1]
        self.send(b"", 302, Location=f"http://127.0.0.2:{port}/photo.png")

    def answer_broken(self) -> None:
        self.send_error(500)

    def answer_large(self) -> None:
        self.send(b"", Content_Length=10**12)

    def answer_endless(self) -> None:
        self.send(b"")
        while True:
            self.wfile.write(bytes(2**16))

    def answer_slow(self) -> None:
        self.send(b"")
        while True:
            self.wfile.write(b"\x89")
            self.wfile.flush()
            time.sleep(0.05)

    def answer_slow_headers(self) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        while True:
            self.wfile.write(b"X")
            self.wfile.flush()
            time.sleep(0.05)

    def answer_short(self) -> None:
        self.send(png()[:100], Content_Length=len(png()))

    def answer_page(self) -> None:
        self.send(b"<html>Please log in</html>")

    def answer_nothing(self) -> None:
        self.send(b"")

    def answer_nonsense(self) -> None:
        self.wfile.write(b"220 welcome to something else\r\n\r\n")


class BadServer(http.server.ThreadingHTTPServer):
    """Serves on this computer while it is a context.

    Attributes:
        asked: The paths that were asked for.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []

    def handle_error(self, *_: object) -> None:
        """Says nothing: clients leave in the middle on purpose."""

    @property
    def url(self) -> str:
        """What an address of this server begins with."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> BadServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()
        self.server_close()
