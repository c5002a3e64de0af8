"""Every kind of bad (or merely odd) input with what it gets: the tests and the table of docs/bad-input.md.

``python -m tests.trust.table`` writes the table.
"""

from __future__ import annotations

import base64
import io
import os
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from detrkit.common.limits import ImageLimits
from detrkit.errors import AnnotationError, DetrkitError, ImageError, SettingError
from tests.conftest import make_picture
from tests.golden import ODD_IMAGES
from tests.trust.web import BadServer, png

RGB = np.asarray(make_picture(60, 40))
SIZE = (60, 40)

# What the rows of addresses need: the server is on this computer.
HERE = ImageLimits(allow_private=True, timeout=10)
HURRIED = ImageLimits(allow_private=True, timeout=0.4)
SMALL = ImageLimits(allow_private=True, timeout=10, max_bytes=2**20)


@dataclass(frozen=True)
class Place:
    """Where a row makes what it needs."""

    folder: Path
    server: BadServer

    def file(self, name: str, content: bytes) -> Path:
        """A file with a content."""
        path = self.folder / name
        path.write_bytes(content)
        return path

    def picture(self, image: Image.Image, name: str = "photo.png", **options: Any) -> Path:
        """An image's file."""
        image.save(self.folder / name, **options)
        return self.folder / name

    def address(self, name: str) -> str:
        """An address of the server."""
        return f"{self.server.url}/{name}"


def detect(detector: Any, source: Any) -> Any:
    """The main job, with a threshold that keeps everything."""
    return detector(source, threshold=0)


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        what: The input in words.
        make: Makes it.
        size: (width, height) in pixels of the image where it is read.
        says: Part of the error's message where it is refused.
        how: What is done to an odd image, for the table.
        limits: The detector's limits, where not the usual ones.
        error: Class of the error.
        call: What is asked of the detector.
        public: IP addresses that count as public in this row; those that really are when None.
        names: What a look-up of a name gives in this row; None for a name that does not exist.
        privileged: Whether root, who may read everything, is refused too.
    """

    what: str
    make: Callable[[Place], Any]
    size: tuple[int, int] | None = None
    says: str = ""
    how: str = ""
    limits: ImageLimits | None = None
    error: type[DetrkitError | ValueError] = ImageError
    call: Callable[[Any, Any], Any] = detect
    public: tuple[str, ...] | None = None
    names: dict[str, str | None] | None = None
    privileged: bool = True


def odd(name: str) -> Callable[[Place], Path]:
    """A file of the collection of odd images."""
    return lambda place: ODD_IMAGES / name


def constant(value: Any) -> Callable[[Place], Any]:
    """Something that needs no place."""
    return lambda place: value


def from_server(name: str) -> Callable[[Place], str]:
    """An address of the server."""
    return lambda place: place.address(name)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def _jpeg() -> bytes:
    file = io.BytesIO()
    make_picture(300, 200).save(file, "JPEG")
    return file.getvalue()


def _text_bomb(place: Place) -> Path:
    """A PNG file whose comment unpacks to 80 million letters."""
    from PIL.PngImagePlugin import PngInfo

    comment = PngInfo()
    comment.add_text("Comment", "a" * 80_000_000, zip=True)
    return place.picture(Image.new("RGB", (8, 8)), pnginfo=comment)


def _named_pipe(place: Place) -> Path:
    os.mkfifo(place.folder / "pipe.png")
    return place.folder / "pipe.png"


def _socket(place: Place) -> str:
    name = os.path.relpath(place.folder / "s.png")  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
    return name


def _sparse(place: Place) -> Path:
    path = place.file("huge.png", png())
    os.truncate(path, 2**40)
    return path


def _forbidden(place: Place) -> Path:
    path = place.file("secret.png", png())
    path.chmod(0)
    return path


def _link(place: Place, target: str) -> Path:
    (place.folder / "link.png").symlink_to(target)
    return place.folder / "link.png"


def _substitution(content: bytes) -> Callable[[Place], str]:
    """What a shell makes of ``<(command)``."""

    def make(place: Place) -> str:
        read, write = os.pipe()

        def run() -> None:
            try:
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(content)
            except OSError:
                pass  # the reader had enough

        threading.Thread(target=run, daemon=True).start()
        return f"/dev/fd/{read}"

    return make


def _closed_port(place: Place) -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/photo.png"


def _tiff(values: np.ndarray) -> Callable[[Place], Path]:
    return lambda place: place.picture(Image.fromarray(values), "photo.tif")


def _frames(name: str) -> Callable[[Place], Path]:
    frames = [make_picture(60, 40, seed) for seed in range(3)]
    return lambda place: place.picture(frames[0], name, save_all=True, append_images=frames[1:])


def _processed(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda detector, source: detector.processor(images=source, **options)


def _set(**options: Any) -> Callable[[Any, Any], Any]:
    return lambda detector, source: detector(source, **options)


def _post_processed(detector: Any, source: Any) -> Any:
    outputs = {"logits": torch.zeros(1, 5, 4), "pred_boxes": torch.zeros(1, 5, 4)}
    return detector.processor.post_process_object_detection(outputs, target_sizes=source)


COLLECTION = [
    Case(
        "black and white with a transparent colour",
        odd("1_trns.png"),
        (64, 64),
        how="transparency is dropped",
    ),
    Case("JPEG with several APP13 blocks", odd("app13-multiple.jpg"), (256, 160)),
    Case("animated GIF", odd("chi.gif"), (320, 240), how="the first frame, with a warning"),
    Case(
        "GIF that claims 4364696535 pixels",
        odd("decompression_bomb.gif"),
        says="too many pixels to open safely",
    ),
    Case("PNG with non-ASCII text", odd("high_ascii_chars.png"), (750, 30)),
    Case("WebP", odd("hopper.webp"), (128, 128)),
    Case("gray JPEG", odd("hopper_gray.jpg"), (128, 128), how="gray in all three channels"),
    Case(
        "JPEG with EXIF orientation 2 (mirrored)",
        odd("hopper_orientation_2.jpg"),
        (128, 128),
        how="as stored, with a warning; exif_orientation=True turns it",
    ),
    Case(
        "JPEG with EXIF orientation 6 (lying)",
        odd("hopper_orientation_6.jpg"),
        (128, 128),
        how="as stored, with a warning; exif_orientation=True turns it",
    ),
    Case(
        "16-bit gray with a transparent shade",
        odd("i_trns.png"),
        (64, 64),
        how="no value is above 255, so they count as 8 bits",
    ),
    Case("JPEG with a broken EXIF block", odd("invalid-exif.jpg"), (200, 200), how="as stored"),
    Case("JPEG of one pixel with its density in centimetres", odd("jfif_unit_cm.jpg"), (1, 1)),
    Case(
        "PNG with 16 bits per channel",
        odd("mode_16bit.png"),
        (128, 64),
        how="8 bits, transparency dropped",
    ),
    Case(
        "rectangle with an EXIF orientation",
        odd("orientation_rectangle.jpg"),
        (2, 1),
        how="as stored, with a warning",
    ),
    Case("palette with one transparent colour", odd("p_trns_single.png"), (64, 64), how="colours looked up"),
    Case("palette with many transparent colours", odd("pil123p.png"), (162, 150), how="colours looked up"),
    Case("CMYK JPEG", odd("pil_sample_cmyk.jpg"), (100, 100), how="converted to RGB"),
    Case("truncated PNG", odd("truncated_image.png"), says="the file is damaged, fetch it again"),
    Case("truncated JPEG", odd("truncated_jpeg.jpg"), says="the file is damaged, fetch it again"),
    Case(
        "gray with transparency, uncompressed",
        odd("uncompressed_la.png"),
        (128, 128),
        how="transparency is dropped",
    ),
]

FILES = [
    Case("missing file", lambda p: p.folder / "missing.jpg", says="no such file; check the path"),
    Case("folder", lambda p: p.folder, says="is a folder, not an image; name the files in it"),
    Case("empty file", lambda p: p.file("a.jpg", b""), says="the file is empty"),
    Case(
        "text",
        lambda p: p.file("a.jpg", b"hello"),
        says="not an image that Pillow can read; convert it to JPEG or PNG",
    ),
    Case(
        "web page saved as a JPEG",
        lambda p: p.file("a.jpg", b"<html>404</html>"),
        says="not an image that Pillow can read",
    ),
    Case(
        "SVG drawing",
        lambda p: p.file("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        says="not an image that Pillow can read",
    ),
    Case("PDF document", lambda p: p.file("a.pdf", b"%PDF-1.7\n"), says="not an image that Pillow can read"),
    Case(
        "half a JPEG", lambda p: p.file("a.jpg", _jpeg()[:2000]), says="the file is damaged, fetch it again"
    ),
    Case(
        "PNG with a flipped byte in its size",
        lambda p: p.file("a.png", png().replace(b"IHDR\0", b"IHDR\1", 1)),
        says="not an image that Pillow can read",
    ),
    Case("PNG with the name of a JPEG", lambda p: p.file("a.jpg", png()), SIZE, how="by its content"),
    Case("name without a suffix", lambda p: p.file("photo", png()), SIZE, how="by its content"),
    Case("name with a null byte", constant("photo\0.png"), says="cannot be opened"),
    Case("name of 5000 characters", constant("a" * 5000), says="cannot be opened"),
    Case(
        "file without read permission",
        _forbidden,
        says="cannot be read (no permission); change its permissions",
        privileged=False,
    ),
    Case("link to a photo", lambda p: _link(p, str(p.file("photo.png", png()))), SIZE),
    Case("link to nothing", lambda p: _link(p, "gone.png"), says="no such file; check the path"),
    Case("link to itself", lambda p: _link(p, "link.png"), says="cannot be opened"),
    Case("named pipe", _named_pipe, says="is a named pipe, not a file"),
    Case("device that never ends", constant("/dev/zero"), says="is a device, not a file"),
    Case("device that is empty", constant("/dev/null"), says="is a device, not a file"),
    Case("socket", _socket, says="is a socket, not a file"),
    Case(
        "process substitution, <(command)",
        _substitution(png()),
        SIZE,
        how="/dev/stdin, /dev/fd/N: the user connected these",
    ),
    Case("<(command) without output", _substitution(b""), says="the file is empty"),
    Case(
        "<(command) with more output than max_bytes",
        _substitution(bytes(2**21)),
        says="more than 1048576 bytes came in; raise max_bytes",
        limits=SMALL,
    ),
    Case("file of a terabyte", _sparse, says="bytes are more than an image of"),
    Case("image of 100 megapixels", lambda p: p.picture(Image.new("1", (10_000, 10_000))), (10_000, 10_000)),
    Case(
        "PNG of 200 bytes that claims 10 gigapixels",
        lambda p: p.file("a.png", png_header(100_000, 100_000)),
        says="100000x100000 exceeds 178956970 pixels; shrink it, or raise max_pixels",
    ),
    Case(
        "image above max_pixels",
        lambda p: p.picture(Image.new("1", (2000, 2000))),
        says="2000x2000 exceeds 1000000 pixels; shrink it, or raise max_pixels",
        limits=ImageLimits(max_pixels=1_000_000),
    ),
    Case(
        "the same with a higher max_pixels",
        lambda p: p.picture(Image.new("1", (2000, 2000))),
        (2000, 2000),
        limits=ImageLimits(max_pixels=4_000_000),
    ),
    Case(
        "truncated image of 200 megapixels with a higher max_pixels",
        lambda p: p.file("a.png", png_header(20_000, 10_000)),
        says="the file is damaged",
        limits=ImageLimits(max_pixels=200_000_000),
    ),
    Case("PNG whose comment unpacks to 80 megabytes", _text_bomb, says="the file is damaged"),
    Case(
        "image of 1 x 10000",
        lambda p: p.picture(make_picture(1, 10_000)),
        (1, 10_000),
        how="resized to one pixel by the longest edge",
    ),
    Case(
        "image of 10000 x 1",
        lambda p: p.picture(make_picture(10_000, 1)),
        (10_000, 1),
        how="resized to one pixel by the longest edge",
    ),
    Case("image of 1 x 1", lambda p: p.picture(make_picture(1, 1)), (1, 1)),
    Case("GIF of three frames", _frames("photo.gif"), SIZE, how="the first frame, with a warning"),
    Case("TIFF of three pages", _frames("photo.tif"), SIZE, how="the first page, with a warning"),
    Case(
        "32-bit gray TIFF",
        _tiff(np.full((40, 60), 40_000, np.int32)),
        SIZE,
        how="no value is above 255, so they count as 8 bits",
    ),
    Case(
        "TIFF of real numbers", _tiff(np.full((40, 60), 0.5, np.float32)), SIZE, how="0..1 scaled to 8 bits"
    ),
    Case(
        "TIFF with NaN",
        _tiff(np.full((40, 60), np.nan, np.float32)),
        says="holds NaN or infinite values; replace them before use",
    ),
    Case(
        "TIFF with values above 16 bits",
        _tiff(np.full((40, 60), 10**6, np.int32)),
        says="integers must be in 0..255 or 0..65535",
    ),
]

ADDRESSES = [
    Case(
        "URL with an incomplete IPv6 address",
        lambda p: "http://[::1/photo.png",
        says="is not an address (Invalid IPv6 URL); check it",
    ),
    Case(
        "URL with a non-numeric port",
        lambda p: "http://localhost:port/photo.png",
        says="cannot be fetched (nonnumeric port: 'port')",
        limits=HERE,
    ),
    Case("data: URL", constant("data:image/png;base64," + base64.b64encode(png()).decode()), SIZE),
    Case("data: URL with invalid base64", lambda p: "data:image/png;base64,??", says="is not valid base64"),
    Case("image on a web server", from_server("photo.png"), SIZE, limits=HERE),
    Case("image that has moved", from_server("moved.png"), SIZE, limits=HERE, how="redirects are followed"),
    Case(
        "redirect to itself",
        from_server("loop"),
        says="too many redirects (more than 5); check the URL",
        limits=HERE,
    ),
    Case(
        "redirect to a file on this computer",
        from_server("to-file"),
        says="redirects to a URL of scheme 'file', which is refused",
        limits=HERE,
    ),
    Case(
        "redirect to FTP",
        from_server("to-ftp"),
        says="redirects to a URL of scheme 'ftp', which is refused",
        limits=HERE,
    ),
    Case(
        "redirect into a private network",
        from_server("to-private"),
        says="resolves to 127.0.0.2, which is not on the public internet",
        public=("127.0.0.1",),
    ),
    Case(
        "this computer",
        from_server("photo.png"),
        says="which is not on the public internet; pass allow_private=True",
    ),
    Case(
        "this computer by name",
        constant("http://localhost/photo.png"),
        says="resolves to localhost (127.0.0.1), which is not on the public internet",
        names={"localhost": "127.0.0.1"},
    ),
    Case(
        "this computer as an integer IP address",
        constant("http://2130706433/photo.png"),
        says="(127.0.0.1), which is not on the public internet",
    ),
    Case(
        "this computer in IPv6",
        constant("http://[::1]/photo.png"),
        says="resolves to ::1, which is not on the public internet",
    ),
    Case(
        "this computer, IPv4 mapped to IPv6",
        constant("http://[::ffff:127.0.0.1]/photo.png"),
        says="which is not on the public internet",
    ),
    Case(
        "computer in a private network",
        constant("http://192.168.0.1/photo.png"),
        says="resolves to 192.168.0.1, which is not on the public internet",
    ),
    Case(
        "link-local address, where clouds keep secrets",
        constant("https://169.254.169.254/latest"),
        says="resolves to 169.254.169.254, which is not on the public internet",
    ),
    Case(
        "public name of a private address",
        constant("http://photos.example/a.png"),
        says="resolves to photos.example (10.0.0.7), which is not on the public internet",
        names={"photos.example": "10.0.0.7"},
    ),
    Case(
        "name that does not exist",
        constant("https://gone.example/a.png"),
        says="check the URL and the connection",
        names={"gone.example": None},
    ),
    Case("closed port", _closed_port, says="check the URL and the connection", limits=HERE),
    Case(
        "status 404",
        from_server("gone.png"),
        says="the server answered 404 Not Found; check the URL",
        limits=HERE,
    ),
    Case("status 500", from_server("broken"), says="the server answered 500", limits=HERE),
    Case(
        "web page instead of an image",
        from_server("page.png"),
        says="not an image that Pillow can read",
        limits=HERE,
    ),
    Case("response without content", from_server("nothing"), says="the file is empty", limits=HERE),
    Case("response that is not HTTP", from_server("nonsense"), says="cannot be fetched", limits=HERE),
    Case(
        "truncated response",
        from_server("short.png"),
        says="the connection ended before the file did; try again",
        limits=HERE,
    ),
    Case(
        "response that announces a terabyte",
        from_server("large"),
        says="larger than 1048576 bytes; raise max_bytes",
        limits=SMALL,
    ),
    Case(
        "endless response",
        from_server("endless"),
        says="larger than 1048576 bytes; raise max_bytes",
        limits=SMALL,
    ),
    Case(
        "response that arrives too slowly",
        from_server("slow"),
        says="no complete answer after 0.4 seconds; check the connection",
        limits=HURRIED,
    ),
    Case(
        "response whose headers arrive too slowly",
        from_server("slow-headers"),
        says="no complete answer after 0.4 seconds; check the connection",
        limits=HURRIED,
    ),
    Case(
        "FTP",
        constant("ftp://example.org/a.jpg"),
        says="URLs of scheme 'ftp' are not supported; use http, https, file or a path",
    ),
    Case("file: URL", lambda p: p.file("my photo.png", png()).as_uri(), SIZE),
    Case(
        "file: URL on another computer",
        constant("file://server/photo.png"),
        says="refers to a file on another computer; write file:///path",
    ),
    Case(
        "URL with a user name and password",
        constant("http://user:password@example.org/a.png"),
        says="http://example.org: addresses with a user name or password are not supported",
    ),
    Case("URL without a host", constant("http:///photo.png"), says="cannot be fetched"),
    Case("URL with text as the port", constant("http://example.org:port/a.png"), says="cannot be fetched"),
    Case("URL with a space", constant("http://example.org/a photo.png"), says="cannot be fetched"),
]

ARRAYS = [
    Case("uint8, channels last", constant(RGB), SIZE),
    Case("uint8, channels first", constant(np.ascontiguousarray(RGB.transpose(2, 0, 1))), SIZE),
    Case("gray", constant(RGB[..., 0]), SIZE, how="gray in all three channels"),
    Case("boolean", constant(RGB[..., 0] > 127), SIZE, how="black and white"),
    Case("RGBA", constant(np.dstack([RGB, RGB[..., :1]])), SIZE, how="transparency is dropped"),
    Case("real numbers in 0..1", constant(RGB / 255), SIZE),
    Case("real numbers in 0..255", constant(RGB.astype(np.float32)), SIZE),
    Case("uint16", constant(RGB.astype(np.uint16) * 257), SIZE, how="scaled to 8 bits"),
    Case("int64 in 0..255", constant(RGB.astype(np.int64)), SIZE),
    Case("bfloat16 tensor", constant(torch.from_numpy(RGB / 255).bfloat16()), SIZE),
    Case(
        "complex numbers",
        constant(RGB.astype(np.complex64)),
        says="cannot be of dtype complex64; pass uint8, or floats",
    ),
    Case("object array", constant(RGB.astype(object)), says="cannot be of dtype object"),
    Case("text", constant(RGB.astype(str)), says="cannot be of dtype <U"),
    Case(
        "two channels", constant(RGB[..., :2]), says="can be the channels (1, 3 or 4); pass gray, RGB or RGBA"
    ),
    Case("five channels", constant(np.zeros((40, 60, 5), np.uint8)), says="can be the channels (1, 3 or 4)"),
    Case("one dimension", constant(np.zeros(7)), says="has 2 or 3 dimensions, not 1"),
    Case("five dimensions", constant(np.zeros((1, 1, 3, 4, 5))), says="has 2 or 3 dimensions, not 4"),
    Case("no pixels", constant(np.zeros((0, 5, 3))), says="the image array is empty"),
    Case(
        "NaN",
        constant(np.full((4, 5, 3), np.nan)),
        says="holds NaN or infinite values; replace them before use",
    ),
    Case("infinity", constant(np.full((4, 5, 3), np.inf)), says="holds NaN or infinite values"),
    Case("NaN in a tensor", constant(torch.full((3, 4, 5), torch.nan)), says="holds NaN or infinite values"),
    Case("integers below 0", constant(np.full((4, 5, 3), -1)), says="holds values from -1 to -1"),
    Case(
        "integers above 65535",
        constant(np.full((4, 5, 3), 70_000)),
        says="integers must be in 0..255 or 0..65535",
    ),
    Case("None", constant(None), says="cannot read an image from NoneType"),
    Case("number", constant(7), says="cannot read an image from int"),
    Case("bytes of a file", constant(png()), SIZE),
    Case("open file", lambda p: io.BytesIO(png()), SIZE),
    Case("bytes that are not an image", constant(b"hello"), says="not an image that Pillow can read"),
    Case("file opened as text", lambda p: io.StringIO("hello"), says="open it with mode 'rb'"),
]

PHOTO = make_picture(*SIZE)

LISTS = [
    Case("empty list", constant([]), how="an empty list"),
    Case("empty batch", constant(np.zeros((0, 3, 40, 60), np.uint8)), how="an empty list"),
    Case(
        "list with a missing file",
        lambda p: [PHOTO, p.folder / "missing.jpg"],
        says="missing.jpg: no such file",
    ),
    Case("list with None", constant([PHOTO, None]), says="cannot read an image from NoneType"),
    Case(
        "threshold above 1",
        constant(PHOTO),
        says="threshold must be between 0 and 1, not 2",
        error=SettingError,
        call=_set(threshold=2),
    ),
    Case(
        "threshold below 0",
        constant(PHOTO),
        says="threshold must be between 0 and 1, not -0.1",
        error=SettingError,
        call=_set(threshold=-0.1),
    ),
    Case(
        "threshold NaN",
        constant(PHOTO),
        says="threshold must be between 0 and 1, not nan",
        error=SettingError,
        call=_set(threshold=float("nan")),
    ),
    Case(
        "threshold as text",
        constant(PHOTO),
        says="threshold must be between 0 and 1, not 'high'",
        error=SettingError,
        call=_set(threshold="high"),
    ),
    Case(
        "batch_size 0",
        constant([PHOTO]),
        says="batch_size must be at least 1, not 0",
        error=SettingError,
        call=_set(batch_size=0),
    ),
    Case(
        "batch_size 1.5",
        constant([PHOTO]),
        says="batch_size must be a whole number, not 1.5",
        error=SettingError,
        call=_set(batch_size=1.5),
    ),
    Case(
        "max_objects 0",
        constant(PHOTO),
        says="max_objects must be at least 1, not 0",
        error=SettingError,
        call=_set(max_objects=0),
    ),
    Case(
        "masks from a model without masks",
        constant(PHOTO),
        says="detects boxes only; masks need a panoptic model",
        error=SettingError,
        call=_set(masks=True),
    ),
    Case(
        "max_pixels 0",
        constant(0),
        says="max_pixels must be above 0, not 0",
        error=SettingError,
        call=lambda _, value: ImageLimits(max_pixels=value),
    ),
    Case(
        "processor: no images",
        constant([]),
        says="no image given; pass an image or a list of images",
        call=_processed(),
    ),
    Case(
        "processor: fewer annotations than images",
        constant([PHOTO, PHOTO]),
        says="The number of images (2) and annotations (1) do not match",
        error=AnnotationError,
        call=_processed(annotations=[{"image_id": 1, "annotations": []}]),
    ),
    Case(
        "processor: more target sizes than images",
        constant([(40, 60), (40, 60)]),
        says="target_sizes",
        error=ValueError,
        call=_post_processed,
    ),
    Case(
        "processor: size of a billion",
        constant(PHOTO),
        says="would be resized to 1500000000x1000000000",
        call=_processed(size={"shortest_edge": 10**9}),
    ),
    Case(
        "processor: 1 x 10000 without a longest edge",
        constant(make_picture(1, 10_000)),
        says="would be resized to 800x8000000",
        call=_processed(size={"shortest_edge": 800, "longest_edge": 10**9}),
    ),
    Case(
        "processor: pad_size of a billion",
        constant(PHOTO),
        says="is more than 4 times as long as the images",
        call=_processed(pad_size={"height": 10**9, "width": 10**9}),
    ),
    Case(
        "processor: size 0",
        constant(PHOTO),
        says="holds a length below 1 pixel",
        error=ValueError,
        call=_processed(size={"shortest_edge": 0, "longest_edge": 1}),
    ),
    Case(
        "processor: standard deviation 0",
        constant(PHOTO),
        says="image_std must be finite and above 0",
        error=ValueError,
        call=_processed(image_std=[0, 1, 1]),
    ),
    Case(
        "processor: channels in the middle",
        constant(RGB),
        says="input_data_format must be",
        call=_processed(input_data_format="middle"),
    ),
]

GROUPS: dict[str, list[Case]] = {
    "Files that programs have trouble with": COLLECTION,
    "Files": FILES,
    "Addresses": ADDRESSES,
    "Arrays and objects": ARRAYS,
    "Lists and settings": LISTS,
}
