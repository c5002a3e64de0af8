"""Sizes read from headers are the sizes of the images that training and evaluation load."""

from __future__ import annotations

import pytest
from PIL import Image

from detrkit.data.image_sizes import read_image_sizes
from detrkit.processing import load_image


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("exif_orientation", [False, True])
def test_the_size_is_that_of_the_loaded_image(tmp_path, suffix, exif_orientation):
    path = tmp_path / f"turned.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    loaded = load_image(path, exif_orientation=exif_orientation)
    # Pillow itself turns a TIFF, whether asked to or not.
    assert loaded.size == ((20, 30) if exif_orientation or suffix == "tif" else (30, 20))
    (size,) = read_image_sizes([path])
    assert size.frame(exif_orientation) == (loaded.height, loaded.width)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow warns of it
def test_an_unreadable_exif_block_does_not_lose_the_image(tmp_path):
    path = tmp_path / "broken.jpg"
    Image.new("RGB", (30, 20)).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_image(path, exif_orientation=True).size == (30, 20)
    assert read_image_sizes([path])[0].frame(True) == (20, 30)
