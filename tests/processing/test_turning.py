"""Large images: turned upright, and their transparency dropped, without a second one in memory."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.processing import load_image, turning


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "_LARGE", 0)
    monkeypatch.setattr(turning, "_ROWS", 7)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_large_image_is_turned_as_a_small_one(
    orientation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (31, 50, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    wanted = load_image(tmp_path / "turned.png", exif_orientation=True)
    assert wanted.size != (50, 31) or wanted.tobytes() != pixels.tobytes()
    monkeypatch.setattr(turning, "_LARGE", 0)
    monkeypatch.setattr(turning, "_ROWS", 7)
    found = load_image(tmp_path / "turned.png", exif_orientation=True)
    assert (found.size, found.mode) == (wanted.size, wanted.mode)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.usefixtures("small_is_large")
def test_the_callers_image_stays_open(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30), (1, 2, 3)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        assert load_image(image, exif_orientation=True).size == (30, 40)
        assert image.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_dropped_in_place(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    file = io.BytesIO()
    options = {"lossless": True, "exact": True} if suffix == "WEBP" else {}
    Image.fromarray(pixels).save(file, suffix, **options)
    wanted = Image.open(file).convert("RGB")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", lambda *_: pytest.fail("a second image"))
        found = load_image(file.getvalue())
    assert (found.mode, found.tobytes()) == ("RGB", pixels[..., :3].tobytes())
    for change in (lambda i: i.resize((17, 23)), lambda i: i.convert("RGBA"), lambda i: i.convert("L")):
        assert change(found).tobytes() == change(wanted).tobytes()
    image = Image.fromarray(pixels)
    load_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", pixels.tobytes())  # the caller's own
