"""Files from web addresses, without trust in whoever answers there."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import queue
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin, urlsplit

from detrkit.common.errors import ImageError
from detrkit.common.limits import ImageLimits

WEB_SCHEMES = ("http", "https")

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 2**16

# A network whose addresses hold an IPv4 address in their last bits: translation to IPv4 (RFC 6052).
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")

# What the public internet does not reach, from IANA's registries of special-purpose addresses. Written out,
# as what Python takes for global changes with its version.
_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
        *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    )
)
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")  # all else is local, for special purposes or unassigned
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
)


def fetch(url: str, limits: ImageLimits) -> bytes:
    """The content of an http or https address.

    Redirects are followed to http and https only. An address on a private network is refused unless
    ``limits`` allow it; the check is of the numbers that a connection is made to, after the name was looked
    up and for every redirect. Where the environment names a proxy, that makes the connections; then names
    that this computer can look up are checked before the proxy is asked.

    Args:
        url: The address.
        limits: Its maximum size and duration, and the addresses that may be opened.

    Raises:
        ImageError: It cannot be fetched within the limits.
    """
    # The wait is here and the work in a thread, for nothing else bounds the time of a look-up of a name, or
    # of a server that sends a byte now and then.
    download = _Download(url, limits)
    thread = threading.Thread(target=download.run, name="detrkit-fetch", daemon=True)
    thread.start()
    try:
        outcome = download.outcome.get(timeout=limits.timeout)
    except queue.Empty:
        download.abandon()
        raise ImageError(
            f"{url}: no complete answer after {limits.timeout:g} seconds; check the connection, or fetch it "
            "yourself"
        ) from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class _Download:
    """One file on its way.

    Attributes:
        outcome: Gets the content, or the error that ended the download.
    """

    def __init__(self, url: str, limits: ImageLimits) -> None:
        self.outcome: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._url = url
        self._limits = limits
        self._deadline = time.monotonic() + limits.timeout
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()
        self._abandoned = False
        self._opener = urllib.request.OpenerDirector()  # neither file: nor ftp:, and no redirects of its own
        for handler in (urllib.request.ProxyHandler(), _PlainHandler(self), _SecureHandler(self)):
            self._opener.add_handler(handler)

    def run(self) -> None:
        """Downloads."""
        try:
            self.outcome.put(self._fetched())
        finally:
            self._hold(None)

    def _fetched(self) -> bytes | Exception:
        try:
            return self._follow()
        except ImageError as error:
            return error
        except (OSError, ValueError, http.client.HTTPException) as error:
            # URLError, time-outs, malformed addresses and answers that are no HTTP
            reason = _printable(getattr(error, "reason", None) or str(error) or type(error).__name__)
            return ImageError(f"{self._url}: cannot be fetched ({reason}); check the URL and the connection")
        except Exception as error:  # raised where the content is waited for
            return error

    def abandon(self) -> None:
        """Ends the connection, and with it the thread that waits for it."""
        self._abandoned = True
        with self._lock, contextlib.suppress(OSError):  # it has ended already
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def _hold(self, sock: socket.socket | None) -> None:
        """Keeps a handle of the connection's own: encryption takes the socket itself over."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = None if sock is None else sock.dup()

    def connect(self, host: str, port: int, *, checked: bool) -> socket.socket:
        """A connection to the first address of a host that may be used and answers.

        Args:
            host: Name or number.
            port: Port.
            checked: Whether the address must be a public one.
        """
        error: OSError | ImageError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            if checked and not self._limits.allow_private and not is_public(str(address[0])):
                error = self._private(host, str(address[0]))
                continue
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(self._remaining())
            self._hold(sock)
            try:
                sock.connect(address)
            except OSError as refused:
                sock.close()
                error = refused
                continue
            return sock
        raise error

    def check_before_proxy(self, host: str) -> None:
        """Refuses a private address that a proxy would be asked for."""
        if self._limits.allow_private:
            return
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError:
            return  # a name that only the proxy knows
        for *_, address in found:
            if not is_public(str(address[0])):
                raise self._private(host, str(address[0]))

    def _follow(self) -> bytes:
        url = self._url
        for _ in range(self._limits.max_redirects + 1):
            with self._open(url) as response:
                target = response.headers.get("Location")
                if response.status in _REDIRECTS and target:
                    url = urljoin(url, target)
                    self._check_redirect(url)
                    continue
                if response.status != 200:
                    raise ImageError(
                        f"{self._url}: the server answered {response.status} {_printable(response.reason)}; "
                        "check the URL"
                    )
                return self._read(response)
        raise ImageError(
            f"{self._url}: too many redirects (more than {self._limits.max_redirects}); check the URL"
        )

    def _open(self, url: str) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        if parts.username is not None:
            # Named without them: errors end up in logs.
            raise ImageError(
                f"{parts.scheme}://{parts.hostname}: addresses with a user name or password are not "
                "supported; fetch the image yourself"
            )
        request = urllib.request.Request(url, headers={"User-Agent": "detrkit"})
        response = self._opener.open(request, timeout=self._remaining())
        if response is None:
            raise ImageError(f"{self._url}: cannot be fetched; check the URL")
        return response

    def _check_redirect(self, url: str) -> None:
        scheme = urlsplit(url).scheme
        if scheme not in WEB_SCHEMES:
            raise ImageError(
                f"{self._url}: redirects to a URL of scheme {scheme!r}, which is refused; only http and "
                "https are followed"
            )

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        limit = self._limits.max_bytes
        announced = response.headers.get("Content-Length") or ""
        if limit is not None and announced.isdecimal() and int(announced) > limit:
            raise self._too_large()
        content = bytearray()
        # read1 gives what is there: a read of a whole chunk could wait many times the limit.
        while chunk := response.read1(_CHUNK):
            content += chunk
            if limit is not None and len(content) > limit:
                raise self._too_large()
            self._remaining()
        if announced.isdecimal() and len(content) < int(announced):
            raise ImageError(f"{self._url}: the connection ended before the file did; try again")
        return bytes(content)

    def _remaining(self) -> float:
        seconds = self._deadline - time.monotonic()
        if seconds <= 0 or self._abandoned:
            raise TimeoutError("timed out")
        return seconds

    def _too_large(self) -> ImageError:
        return ImageError(
            f"{self._url}: larger than {self._limits.max_bytes} bytes; raise max_bytes (--max-bytes) if you "
            "trust it"
        )

    def _private(self, host: str, number: str) -> ImageError:
        address = number if number == host else f"{host} ({number})"
        return ImageError(
            f"{self._url}: resolves to {address}, which is not on the public internet; pass "
            f"allow_private=True "
            "(--allow-private-addresses) if that is meant"
        )


def is_public(number: str) -> bool:
    """Whether an IP address is one of the public internet, also where it is wrapped into another one."""
    address = ipaddress.ip_address(number)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and address in _TRANSLATED:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(str(inner))
    return address in _UNICAST_V6 and not any(address in network for network in _NOT_PUBLIC_V6)


def _printable(said: object) -> str:
    """One short line of what a server said, which may hold anything."""
    return "".join(letter for letter in " ".join(str(said).split()) if letter.isprintable())[:200]


class _PlainConnection(http.client.HTTPConnection):
    """A connection that asks a download for its socket."""

    download: _Download
    checked: bool

    def connect(self) -> None:
        """Connects, through a proxy's tunnel where there is one."""
        self.sock = self.download.connect(self.host, self.port, checked=self.checked)
        if getattr(self, "_tunnel_host", None):
            self._tunnel()  # type: ignore[attr-defined]


class _SecureConnection(http.client.HTTPSConnection, _PlainConnection):
    """The same, encrypted; the standard library wraps what ``connect`` of the plain one gives."""


class _PlainHandler(urllib.request.HTTPHandler):
    def __init__(self, download: _Download) -> None:
        super().__init__()
        self.download = download

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connection(_PlainConnection, self.download, request), request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def __init__(self, download: _Download) -> None:
        super().__init__()
        self.download = download

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_connection(_SecureConnection, self.download, request), request)


def _connection(
    kind: type[_PlainConnection], download: _Download, request: urllib.request.Request
) -> Callable[..., _PlainConnection]:
    """How ``do_open`` is to connect for a request: with a check of where to, or to the user's proxy."""
    wanted = urlsplit(request.full_url)
    proxied = request.host != wanted.netloc
    if proxied:
        download.check_before_proxy(wanted.hostname or "")

    def connection(host: str, **options: Any) -> _PlainConnection:
        made = kind(host, **options)
        made.download, made.checked = download, not proxied
        return made

    return connection
