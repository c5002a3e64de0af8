"""Every row of docs/bad-input.md, through Python and through the command line."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from detrkit import Detector
from detrkit.cli import run as run_program
from detrkit.common.limits import ImageLimits
from detrkit.common.text import printable
from detrkit.data.image_sizes import read_image_sizes
from detrkit.errors import ImageError, ImageTooLargeError, SettingError
from detrkit.processing import fetching
from detrkit.processing.images import load_image
from tests.golden import ODD_IMAGES
from tests.trust.cases import ADDRESSES, COLLECTION, FILES, GROUPS, Case, Place
from tests.trust.table import PAGE, page
from tests.trust.web import BadServer, png

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes, sockets and devices are those of Unix")

ALL = [case for cases in GROUPS.values() for case in cases]
NAMED = [case for cases in (COLLECTION, FILES, ADDRESSES) for case in cases]


@pytest.fixture(scope="module")
def detector(tiny_detr: Path) -> Detector:
    return Detector.from_pretrained(tiny_detr, device="cpu")


@pytest.fixture(scope="module")
def server() -> Iterator[BadServer]:
    with BadServer() as running:
        yield running


@pytest.fixture
def place(server: BadServer) -> Iterator[Place]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield Place(folder, server)
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.contextmanager
def circumstances(case: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The network as a row wants it, and a user who may not read everything where it matters."""
    look_up = socket.getaddrinfo

    def find(host: Any, *arguments: Any, **options: Any) -> Any:
        if case.names is None or host not in case.names:
            return look_up(host, *arguments, **options)
        if case.names[host] is None:
            raise socket.gaierror(-2, "Name or service not known")
        return look_up(case.names[host], *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", find)
        if case.public is not None:
            patch.setattr(fetching, "is_public", lambda number: number in case.public)
        other_user = not case.privileged and os.geteuid() == 0
        if other_user:
            os.seteuid(65534)
        try:
            yield
        finally:
            if other_user:
                os.seteuid(0)


def rows(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.what) for case in cases]


@pytest.mark.parametrize("case", rows(ALL))
def test_a_row_in_python(
    case: Case, detector: Detector, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detector, "limits", case.limits or ImageLimits())
    source = case.make(place)
    with circumstances(case, monkeypatch):
        if case.says:
            with pytest.raises(case.error) as raised:
                case.call(detector, source)
            said = str(raised.value)
            assert case.says in said
            assert "\n" not in said
            assert len(said) < 600
            return
        found = case.call(detector, source)
    if case.size is None:
        assert found == []
    else:
        assert found.image_size == case.size[::-1]
        assert len(found) == 12


@pytest.mark.parametrize("case", rows([case for case in NAMED if case.says]))
def test_a_row_on_the_command_line_is_one_line_and_status_2(
    case: Case,
    place: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = case.limits or ImageLimits()
    source = case.make(place)
    if limits.timeout != ImageLimits().timeout:  # which has no option
        usual = {**ImageLimits.__init__.__kwdefaults__, "timeout": limits.timeout}
        monkeypatch.setattr(ImageLimits.__init__, "__kwdefaults__", usual)
    options = ["--max-pixels", limits.max_pixels, "--max-bytes", limits.max_bytes]
    options += ["--allow-private-addresses"] if limits.allow_private else []
    with circumstances(case, monkeypatch):
        status = run_program(["detect", str(source), *map(str, options)])  # no model is needed
    printed = capsys.readouterr()
    assert (status, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert "Traceback" not in printed.err
    assert printable(str(source)[:20]) in printed.err or "password" in str(source)


@pytest.mark.parametrize("command", ["detect", "segment", "explain"])
def test_every_command_that_reads_images_takes_the_limits(
    command: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = place.file("photo.png", png())
    elsewhere = ["--save-dir", str(place.folder / "out")] if command == "explain" else []
    for source, option, says in (
        (photo, ("--max-pixels", "99"), "60x40 exceeds 99 pixels"),
        (place.address("photo.png"), (), "pass allow_private=True (--allow-private-addresses)"),
        (
            place.address("photo.png"),
            ("--allow-private-addresses", "--max-bytes", "9"),
            "larger than 9 bytes",
        ),
    ):
        assert run_program([command, str(source), *elsewhere, *option]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert says in printed.err
    assert not (place.folder / "out").exists()


def test_a_pipe_among_the_images_of_a_data_set_is_not_waited_for(place: Place) -> None:
    os.mkfifo(place.folder / "pipe.png")
    photo = place.file("photo.png", png())
    refused, size = read_image_sizes([place.folder / "pipe.png", photo])
    assert isinstance(refused, ImageError)
    assert size[:2] == (40, 60)


def test_two_dozen_at_once_as_a_user_starts_the_program(place: Place, tiny_detr: Path) -> None:
    chosen = [case for case in FILES if case.says and case.limits is None and case.privileged]
    chosen += [case for case in ADDRESSES if case.says and not (case.limits or case.names or case.public)]
    skipped = {"folder", "missing file", "name with a null byte", "<(command) without output"}
    sources = []
    for number, case in enumerate(case for case in chosen if case.what not in skipped):
        folder = place.folder / str(number)
        folder.mkdir()
        sources.append(str(case.make(Place(folder, place.server))))
    assert len(sources) > 20
    photo = place.file("photo.png", png())
    command = [sys.executable, "-m", "detrkit", "detect", *sources, "-", "--model", str(tiny_detr)]
    with photo.open("rb") as file:
        # Through a pipe, as after "curl ... |".
        cat = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
        done = subprocess.run(
            [*command, "--json", "-"],
            stdin=cat.stdout,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        cat.wait()
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert '"width": 60' in done.stdout
    for source in sources:
        if "password" not in source:
            assert sum(source[:300] in line for line in done.stderr.splitlines()) >= 1, source
    lines = done.stderr.split("\n")[:-1]
    end = lines.index(f"{len(sources)} of {len(sources) + 1} inputs could not be read:")
    # What was said of each on the way stands once more below.
    listed = lines[end + 1 :]
    assert len(listed) == len(sources)
    assert all(line.startswith("  ") and line[2:] in lines[:end] for line in listed), done.stderr


def test_the_page_holds_the_table_of_these_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "write it anew: python -m tests.trust.table"
    assert sum(line.startswith("| ") for line in text.splitlines()) - 2 * len(GROUPS) >= 60
    assert len({case.what for case in COLLECTION + FILES}) == len(COLLECTION + FILES)


def test_every_file_of_the_collection_has_a_row(place: Place) -> None:
    files = {case.make(place) for case in COLLECTION}
    assert files == set(ODD_IMAGES.iterdir()) - {ODD_IMAGES / "README.md"}


def test_a_redirect_into_a_private_network_is_never_asked_for(
    place: Place, server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.asked.clear()
    monkeypatch.setattr(fetching, "is_public", lambda number: number == "127.0.0.1")
    with pytest.raises(ValueError, match=r"127\.0\.0\.2"):
        load_image(f"{server.url}/to-private")
    assert server.asked == ["/to-private"]


@pytest.mark.parametrize(
    "number",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fc00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::a00:1",
        "192.88.99.1",
        "fec0::1",
        "64:ff9b:1::808:808",
        "::ffff:0:808:808",
        "::808:808",
        "3fff::1",
        "5f00::1",
        "100::1",
        "2001::1",
        "2001:2::1",
        "2001:db8::1",
        "4000::1",
        "fe80::1%2",
    ],
)
def test_addresses_that_are_not_public(number: str) -> None:
    assert not fetching.is_public(number)


@pytest.mark.parametrize(
    "number", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::"]
)
def test_addresses_that_are_public(number: str) -> None:
    assert fetching.is_public(number)


def test_a_proxy_is_not_asked_for_a_private_address(
    server: BadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.asked.clear()
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(ValueError, match="not on the public internet"):
        load_image("http://10.0.0.7/photo.png")
    assert server.asked == []
    monkeypatch.setattr(fetching, "is_public", lambda number: True)
    with pytest.raises(ValueError, match="404"):  # the server is no proxy, but it was asked
        load_image("http://10.0.0.7/photo.png")
    assert server.asked == ["http://10.0.0.7/photo.png"]


def test_the_environment_sets_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETRKIT_MAX_PIXELS", "1000")
    monkeypatch.setenv("DETRKIT_ALLOW_PRIVATE_ADDRESSES", "1")
    assert (ImageLimits().max_pixels, ImageLimits().allow_private) == (1000, True)
    monkeypatch.setenv("DETRKIT_MAX_PIXELS", "many")
    with pytest.raises(SettingError, match="DETRKIT_MAX_PIXELS must be a number"):
        ImageLimits()


def test_pillows_own_limit_is_lifted_for_a_file_and_put_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    path = place.file("photo.png", png(80, 60))
    assert load_image(path, limits=ImageLimits(max_pixels=None)).size == (80, 60)
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_pillows_own_limit_is_no_limit_of_the_pages_of_a_tiff(
    compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    pixels = np.arange(60 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 80, 3)
    first, second = (PIL.Image.fromarray(page) for page in (pixels, pixels[::-1]))
    path = tmp_path / "pages.tif"
    first.save(path, compression=compression, save_all=True, append_images=[second])
    limits = ImageLimits(max_pixels=80 * 60)
    for number, wanted in enumerate((pixels, pixels[::-1])):
        np.testing.assert_array_equal(load_image(path, frame=number, limits=limits), wanted)
    with pytest.raises(ImageTooLargeError, match="80x60 exceeds 4799 pixels"):
        load_image(path, limits=ImageLimits(max_pixels=80 * 60 - 1))
