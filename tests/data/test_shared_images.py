from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from detrkit.data import DetectionDataset, check_dataset, shared_images
from detrkit.data.shared_images import describe_shared_images
from tests.golden import DATA, needs_data

WIDTH, HEIGHT = 320, 240


def photo(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Smooth large shapes with details on them, as a photo has."""
    noise = np.random.default_rng(seed)
    layers = [
        Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for side in (5, 40)
    ]
    return Image.blend(*layers, 0.3)


def dataset(folder: Path) -> DetectionDataset:
    images = []
    for place, path in enumerate(sorted(folder.iterdir()), start=1):
        with Image.open(path) as image:
            images.append({"id": place, "file_name": path.name, "width": image.width, "height": image.height})
    objects = [{"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [1, 1, 9, 9]} for i in images]
    document = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    return check_dataset(DetectionDataset.from_coco(folder, document)).dataset


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three training photos, and two other ones for validation."""
    train, val = tmp_path / "train", tmp_path / "val"
    for folder, seeds in ((train, (3, 4, 7)), (val, (20, 21))):
        folder.mkdir()
        for seed in seeds:
            photo(seed).save(folder / f"{seed}.png", compress_level=1)
    return train, val


def turned_phone_photo(image: Image.Image, path: Path) -> None:
    """Stored lying on its side, and shown upright by its EXIF entry."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.rotate(90, expand=True).save(path, exif=exif)


SAVED_AGAIN: dict[str, Callable[[Image.Image, Path], None]] = {
    "jpeg": lambda image, path: image.save(path, quality=30),
    "half": lambda image, path: image.resize((WIDTH // 2, HEIGHT // 2)).save(path, quality=80),
    "small": lambda image, path: image.resize((WIDTH // 4, HEIGHT // 4)).save(path, quality=80),
    "large": lambda image, path: image.resize((2 * WIDTH, 2 * HEIGHT)).save(path, quality=80),
    "stretched": lambda image, path: image.resize((256, 256)).save(path, quality=80),
    "grey": lambda image, path: image.convert("L").save(path, quality=80),
    "turned": lambda image, path: image.rotate(90, expand=True).save(path),
    "upside down": lambda image, path: image.rotate(180).save(path),
    "mirrored": lambda image, path: ImageOps.mirror(image).save(path),
    "phone": turned_phone_photo,
}


@pytest.mark.parametrize("how", SAVED_AGAIN)
def test_a_photo_that_was_saved_again_is_found(how: str, folders: tuple[Path, Path]) -> None:
    train, val = folders
    SAVED_AGAIN[how](photo(7), val / "other name.jpg")
    [line] = describe_shared_images(
        dataset(train), dataset(val), names=("training", "validation"), decode=False
    )
    assert line.startswith("1 of the 3 validation images look like training images")
    assert f"{val / 'other name.jpg'} ({train / '7.png'})" in line


def test_the_same_file_under_another_name_is_found(folders: tuple[Path, Path]) -> None:
    train, val = folders
    (val / "renamed.png").write_bytes((train / "3.png").read_bytes())
    SAVED_AGAIN["half"](photo(4), val / "half.jpg")
    found = shared_images.shared_images(dataset(train), dataset(val))
    assert found == [
        (val / "half.jpg", train / "4.png", False),
        (val / "renamed.png", train / "3.png", True),
    ]
    lines = describe_shared_images(dataset(train), dataset(val), names=("train", "val"), decode=False)
    assert [line[:35] for line in lines] == [
        "1 of the 4 val images are also trai",
        "1 of the 4 val images look like tra",
    ]


def test_different_photos_are_not_taken_for_one_another(folders: tuple[Path, Path]) -> None:
    train, val = folders
    # The same large shapes, such as a form that is filled in twice, with other details.
    noise = np.random.default_rng(0)
    for name in (train / "form.png", val / "form.png"):
        details = Image.fromarray(noise.integers(0, 255, (HEIGHT, WIDTH), dtype=np.uint8)).convert("RGB")
        details = details.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        Image.blend(photo(3).filter(ImageFilter.GaussianBlur(20)), details, 0.2).save(name)
    # Images without contrast.
    for name, level in ((train / "black.png", 1), (val / "black.png", 2)):
        Image.new("RGB", (WIDTH, HEIGHT), (level, level, level)).save(name)
    assert shared_images.shared_images(dataset(train), dataset(val)) == []


def test_large_splits_are_only_compared_on_request(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = folders
    SAVED_AGAIN["jpeg"](photo(7), val / "again.jpg")
    monkeypatch.setattr(shared_images, "FEW_IMAGES", 3)
    assert shared_images.shared_images(dataset(train), dataset(val)) == []
    assert len(shared_images.shared_images(dataset(train), dataset(val), decode=True)) == 1


def test_an_image_that_breaks_later_is_left_out(folders: tuple[Path, Path]) -> None:
    train, val = folders
    SAVED_AGAIN["jpeg"](photo(7), val / "again.jpg")
    splits = dataset(train), dataset(val)
    (val / "20.png").write_bytes(b"no image")
    assert len(shared_images.shared_images(*splits)) == 1


@needs_data
def test_of_the_blood_cells_only_one_field_was_taken_twice() -> None:
    splits = [
        DetectionDataset.from_coco(
            DATA / "bccd" / split, DATA / "bccd" / "annotations" / f"instances_{split}.json"
        )
        for split in ("train", "val")
    ]
    [found] = shared_images.shared_images(*splits)
    assert (found.path.name, found.other.name) == ("BloodImage_00037.jpg", "BloodImage_00038.jpg")
