"""The page in a real browser: ``pytest -m browser``, with playwright and Chromium installed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from detrkit.demo.choices import ModelChoices
from tests.conftest import make_picture

pytestmark = pytest.mark.browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        # Chromium's own sandbox does not work for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tiny_panoptic: Path, tiny_detr: Path) -> Iterator[str]:
    pytest.importorskip("gradio")
    from detrkit.demo.server import Demo

    with Demo(ModelChoices([str(tiny_panoptic), str(tiny_detr)]), port=None) as demo:
        yield demo.address


@pytest.fixture
def page(browser, address: str) -> Iterator[object]:
    """The open page, which may ask nobody but its server and must not fail."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(address)
    page.get_by_text("Drop an image on the left").first.wait_for()
    yield page
    page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    make_picture(240, 160).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def upload(page, path: Path) -> None:
    page.locator("input[type=file]").first.set_input_files(path)


def shown(page):
    """What the open tab says."""
    return page.get_by_role("tabpanel").locator(".detrkit-summary, .detrkit-message")


def set_threshold(page, noun: str, value: float) -> None:
    box = page.get_by_label(f"number input for Threshold of {noun}")
    box.fill(str(value))
    box.press("Enter")
    shown(page).filter(has_text=f"above {value:.2f}").wait_for()


def download(page, name: str) -> Path:
    with page.expect_download() as started:
        page.get_by_role("tabpanel").get_by_role("button", name=name).click()
    path = Path(started.value.path())
    return path.rename(path.with_name(started.value.suggested_filename))


def test_upload_slide_switch_tabs_and_download(page, picture: Path, tmp_path: Path) -> None:
    from PIL import Image

    upload(page, picture)
    shown(page).filter(has_text="above 0.5").wait_for()
    set_threshold(page, "objects", 0.2)
    rows = page.get_by_role("tabpanel").locator("tbody tr")
    many = rows.count()
    set_threshold(page, "objects", 0.8)
    assert many > rows.count()
    set_threshold(page, "objects", 0.2)

    document = download(page, "Download JSON")
    assert document.name == "photo-boxes.json"
    document = json.loads(document.read_text())
    assert len(document["annotations"]) == many
    assert document["images"] == [{"id": 1, "file_name": "photo.png", "width": 240, "height": 160}]
    drawing = download(page, "Download PNG")
    assert drawing.name == "photo-boxes.png"
    assert Image.open(drawing).size == (240, 160)

    page.get_by_role("tab", name="Panoptic map").click()
    set_threshold(page, "segments", 0.3)
    assert "annotations" in json.loads(download(page, "Download JSON").read_text())

    page.get_by_role("tab", name="Attention").click()
    page.get_by_role("button", name="Show attention").click()
    shown(page).filter(has_text="Where the decoder looks for").wait_for()
    page.get_by_role("combobox", name="Object").click()
    page.get_by_role("option").nth(1).click()
    shown(page).filter(has_text="Where the decoder looks for 1 object").wait_for()
    assert Image.open(download(page, "Download PNG")).size == (240, 160)


def test_the_arrow_keys_move_the_threshold(page, picture: Path) -> None:
    upload(page, picture)
    shown(page).filter(has_text="above 0.5").wait_for()
    page.get_by_label("range slider for Threshold of objects").press("ArrowLeft")
    shown(page).filter(has_text="above 0.49").wait_for()


def test_examples_and_models_can_be_chosen(page, tiny_detr: Path) -> None:
    page.get_by_role("button", name="Example image 2").click()
    shown(page).filter(has_text="above 0.5").wait_for()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name=tiny_detr.name, exact=True).click()
    page.get_by_role("tab", name="Panoptic map").click()
    shown(page).filter(has_text="detects boxes only").wait_for()
    page.get_by_role("tab", name="Boxes").click()
    shown(page).filter(has_text="above 0.5").wait_for()
    page.get_by_label("Remove Image").click()
    shown(page).filter(has_text="Drop an image").wait_for()
    assert page.get_by_role("tabpanel").get_by_role("button", name="Download PNG").is_disabled()


def test_a_broken_file_gets_a_kind_message_and_the_next_image_works(
    page, picture: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:900])
    upload(page, broken)
    shown(page).filter(has_text="broken.png: cannot be decoded").wait_for()
    said = page.locator("body").inner_text()
    assert "Traceback" not in said
    assert str(tmp_path) not in said
    page.get_by_label("Remove Image").click()
    upload(page, picture)
    shown(page).filter(has_text="above 0.5").wait_for()


def test_every_input_has_a_label(page) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea')].filter(field =>
            field.type !== 'file' && field.checkVisibility()
            && !field.labels?.length && !field.ariaLabel && !field.getAttribute('aria-labelledby')
        ).map(field => field.outerHTML)"""
    )
    assert unnamed == []
