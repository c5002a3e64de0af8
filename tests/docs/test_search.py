"""The site's search in a real browser: ``pytest -m browser``."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.demo.test_browser import browser as browser
from tests.docs.blocks import ROOT

pytestmark = pytest.mark.browser

pytest.importorskip("material", reason="the extra docs is not installed")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(folder)]
    settings = {"NO_MKDOCS_2_WARNING": "1", "DETRKIT_SITE_MODEL": "none"}
    subprocess.run(command, env={**os.environ, **settings}, cwd=ROOT, check=True, timeout=300)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.mark.parametrize(
    ("query", "heading"),
    [("--recursive", "detrkit detect"), ("--max-objects", "More than 100 objects in an image")],
)
def test_search_finds_options_by_their_name(address: str, browser: Any, query: str, heading: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.fill("[data-md-component=search-query]", query)
    found = page.locator(".md-search-result__item h2", has_text=heading)
    found.first.wait_for(state="attached", timeout=60_000)
    page.close()
