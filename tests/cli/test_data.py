from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.data.synthetic import make_document, write_dataset


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A COCO file beside its folder of images."""
    (tmp_path / "set").mkdir()
    write_dataset(tmp_path / "set")
    return tmp_path / "set" / "instances.json"


def test_counts_sizes_and_problems_are_printed(detrkit_here: Run, data: Path, tmp_path: Path) -> None:
    document = make_document()
    document["annotations"][0]["bbox"] = [1, 1, 0, 5]
    data.write_text(json.dumps(document))
    sheet = tmp_path / "sheet.jpg"
    done = detrkit_here("data", "check", data, "--sheet", sheet)
    assert done.returncode == 0, done.stderr
    assert "3 images, 3 objects, 1 images without objects" in done.stdout
    assert "box without area or with infinite values: 1 dropped (first: annotation 1" in done.stdout
    assert "format COCO; images from 40x40 to 60x60 pixels" in done.stdout
    assert ["brush", "1", "1", "1", "0", "0"] in [line.split() for line in done.stdout.splitlines()]
    with Image.open(sheet) as image:
        assert image.width > 800
    assert detrkit_here("data", "check", data, "--sheet", sheet).returncode == 0  # its own file
    refused = detrkit_here("data", "check", data, "--strict")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_data_set_is_split_and_converted(detrkit_here: Run, data: Path, tmp_path: Path) -> None:
    document = make_document()
    document["annotations"].append({**document["annotations"][0], "id": 5, "image_id": 3})
    data.write_text(json.dumps(document))
    done = detrkit_here("data", "split", data, tmp_path / "split", "--val-fraction", 0.4)
    assert done.returncode == 0, done.stderr
    assert "train 2 images, val 1 image" in done.stderr
    done = detrkit_here("data", "convert", tmp_path / "split", tmp_path / "yolo", "--to", "yolo")
    assert done.returncode == 0, done.stderr
    assert "1 crowd, which yolo cannot hold" in done.stderr
    done = detrkit_here("data", "check", tmp_path / "yolo")
    assert done.stdout.count("format YOLO") == 2


def test_images_of_two_splits_are_compared(detrkit_here: Run, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        (tmp_path / "set" / split).mkdir(parents=True)
        write_dataset(tmp_path / "set" / split)
    done = detrkit_here("data", "check", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "Warning: 3 of the 3 val images are also train images" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "nowhere"), "data set not found"),
        (("check", "{data}", "--sheet", "x.png"), "must be a JPEG file"),
        (("check", "{data}", "--sheet", "{data}.jpg"), "detrkit did not write"),
        (("convert", "{data}", "out", "--to", "csv"), "coco, yolo, voc"),
        (("split", "{data}", "{folder}"), "not an empty folder"),
    ],
)
def test_mistakes_give_one_line(
    detrkit_here: Run, data: Path, arguments: tuple[str, ...], message: str
) -> None:
    data.with_name("instances.json.jpg").write_bytes(b"somebody's")
    done = detrkit_here("data", *(a.format(data=data, folder=data.parent) for a in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
