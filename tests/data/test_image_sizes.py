"""Sizes read from headers are the sizes of the images that training and evaluation load."""

from __future__ import annotations

import pytest
from PIL import Image

from detrkit.common.errors import ImageError
from detrkit.data.checks import check_dataset
from detrkit.data.image_sizes import read_image_sizes
from detrkit.processing import load_image
from tests.data.synthetic import make_document, write_dataset


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


@pytest.mark.parametrize("name", ["a\0b.png", "a\ud800.png", "n" * 5000 + ".png"], ids=ascii)
def test_a_name_that_no_file_can_have_is_an_error_of_its_image(tmp_path, name):
    Image.new("RGB", (30, 20)).save(tmp_path / "sound.png")
    error, size = read_image_sizes([tmp_path / name, tmp_path / "sound.png"])
    assert isinstance(error, (FileNotFoundError, ImageError))
    assert (size.height, size.width) == (20, 30)


@pytest.mark.parametrize("name", ["a\0b.png", "a\ud800.png"], ids=ascii)
def test_a_document_with_such_a_name_keeps_its_other_images(tmp_path, name):
    document = make_document()
    document["images"][0]["file_name"] = name
    checked = check_dataset(write_dataset(tmp_path, document))
    assert ("missing_image", 1) in [(problem.kind, problem.count) for problem in checked.problems]
    assert len(checked.dataset) == len(document["images"]) - 1
