"""The page "Try it in the browser" in a real browser: ``pytest -m browser``.

It needs playwright, Chromium, and the npm package onnxruntime-web, whose folder is named by the variable
DETRKIT_ONNXRUNTIME_WEB.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from detrkit import Detector
from tests.demo.test_browser import browser as browser
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.browser

pytest.importorskip("material", reason="the extra docs is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

SAMPLE = ROOT / "examples" / "BloodImage_00000.jpg"
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


def build(folder: Path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "DETRKIT_ONNXRUNTIME_WEB" not in os.environ:
        pytest.skip("DETRKIT_ONNXRUNTIME_WEB is not set")
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given, directory=site)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=WIDTHS)
def page(request, browser, address: str) -> Iterator[Any]:
    """The open page, which may ask nobody but its server, and must not fail."""
    width, height = WIDTHS[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(120_000)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(f"{request.method} {request.url}"))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(f"{address}/browser/")
    page.locator("#detect[data-state=waiting]").wait_for()
    yield page
    page.close()
    assert [one for one in asked if not one.startswith((f"GET {address}", "GET data:", "GET blob:"))] == []
    assert errors == []


def counts(page) -> dict[str, int]:
    page.locator("#detect[data-state=done]").wait_for()
    rows = page.locator("#detect .counts tr").all()
    return {row.locator("th").inner_text().strip(): int(row.locator("td").inner_text()) for row in rows}


def set_thresholds(page, value: float) -> None:
    for slider in page.get_by_label("Threshold").all():
        slider.fill(str(value))


def test_the_sample_has_the_cells_of_the_command_at_every_threshold(page) -> None:
    detector = Detector.from_pretrained("blood-cells", device="cpu")
    page.get_by_role("button", name="Use the sample").click()
    for threshold in (None, 0.3, 0.7):  # the first as detection settings have it
        found = counts(page)
        if threshold is not None:
            set_thresholds(page, threshold)
            found = counts(page)
        names = detector(SAMPLE, threshold=threshold).names
        expected = {name: names.count(name) for name in ("Platelets", "RBC", "WBC")}
        assert found == {**expected, "All": len(names)}
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]


def test_a_file_of_ones_own_and_one_that_is_no_image(page, tmp_path: Path) -> None:
    page.locator("input[type=file]").set_input_files(SAMPLE)
    assert counts(page)["All"] > 0
    set_thresholds(page, 0.95)
    assert counts(page)["All"] == 0
    assert page.get_by_text("No cell scores above the threshold").is_visible()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    page.locator("input[type=file]").set_input_files(tmp_path / "broken.jpg")
    page.locator("#detect[data-state=failed]").wait_for()
    assert page.get_by_text(re.compile("not an image that the browser can read")).is_visible()
    page.locator("input[type=file]").set_input_files(SAMPLE)
    set_thresholds(page, 0.5)
    assert counts(page)["All"] > 0
