"""Makes the screenshots of the demo's page; requires the extra demo, playwright and Chromium."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from detrkit.demo.choices import ModelChoices
from detrkit.demo.server import Demo

HERE = Path(__file__).parent


def main() -> None:
    """Starts the demo and takes screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image", type=Path, default=HERE.parents[1] / "examples" / "BloodImage_00000.jpg")
    settings = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with Demo(ModelChoices([settings.model]), port=None) as demo, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page(viewport={"width": 1240, "height": 800})
        page.set_default_timeout(120_000)
        page.goto(demo.address)
        page.locator("input[type=file]").first.set_input_files(settings.image)
        found = page.get_by_role("tabpanel").locator(".detrkit-summary")
        found.filter(has_text="above").wait_for()
        _take(page, "demo-boxes")
        page.get_by_role("tab", name="Attention").click()
        page.get_by_role("button", name="Show attention").click()
        found.filter(has_text="Where the decoder looks").wait_for()
        _take(page, "demo-attention")
        page.get_by_role("tab", name="Boxes").click()
        page.get_by_label("Remove Image").click()
        page.locator("input[type=file]").first.set_input_files(
            {"name": "holiday.jpg", "mimeType": "image/jpeg", "buffer": b"this is no image"}
        )
        page.get_by_role("tabpanel").locator(".detrkit-message").filter(has_text="not an image").wait_for()
        _take(page, "demo-broken-file")
        browser.close()


def _take(page: Page, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # until the drawing is there and nothing moves
    path = HERE / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    # 256 colours keep the files small.
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    main()
