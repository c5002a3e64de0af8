"""What is written in any format is read as the same data set."""

import pytest
from PIL import Image

from detrkit.data.checks import check_dataset
from detrkit.data.layouts import open_any
from detrkit.data.writing import FORMATS, write_dataset
from detrkit.errors import SettingError
from tests.data.synthetic import make_document
from tests.data.synthetic import write_dataset as write_source
from tests.data.test_checks import give_orientation
from tests.data.test_layouts import rounded


def checked(folder, document=None, **options):
    return check_dataset(write_source(folder, document, **options)).dataset


def without_crowd():
    document = make_document()
    document["annotations"].pop()
    return document


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("fraction", [0, 0.37])
def test_every_format_keeps_images_and_objects(tmp_path, to, fraction):
    document = without_crowd()
    for entry in document["annotations"]:
        entry["bbox"][0] += fraction
    dataset = checked(tmp_path, document)
    left_out = write_dataset({"train": dataset, "val": dataset}, tmp_path / "out", to)
    assert left_out == {"train": 0, "val": 0}
    for split in ("train", "val"):
        report = check_dataset(open_any(tmp_path / "out", split), strict=True)
        assert (report.images, report.objects) == (3, 3)
        assert rounded(report.dataset) == rounded(dataset)


@pytest.mark.parametrize("to", FORMATS)
def test_crowds_are_kept_in_coco_and_counted_elsewhere(tmp_path, to):
    left_out = write_dataset({"train": checked(tmp_path)}, tmp_path / "out", to)
    assert left_out == {"train": 0 if to == "coco" else 1}
    assert check_dataset(open_any(tmp_path / "out", "train")).objects == (4 if to == "coco" else 3)


def test_masks_are_kept_by_coco_and_yolo(tmp_path):
    dataset = checked(tmp_path, without_crowd(), return_masks=True)
    for to in ("coco", "yolo"):
        write_dataset({"train": dataset}, tmp_path / to, to)
        again = check_dataset(open_any(tmp_path / to, "train", return_masks=True), strict=True).dataset
        assert (again[0][1]["masks"] == dataset[0][1]["masks"]).all()


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("to", FORMATS)
def test_images_are_written_in_the_frame_of_their_boxes(tmp_path, to, upright):
    dataset = write_source(tmp_path, without_crowd(), exif_orientation=upright)
    give_orientation(tmp_path / "images" / "a.jpg")
    if upright:
        dataset.document["images"][0].update(width=40, height=60)
    dataset = check_dataset(dataset).dataset
    write_dataset({"train": dataset}, tmp_path / "out", to)
    again = check_dataset(open_any(tmp_path / "out", "train"), strict=True).dataset
    assert rounded(again) == rounded(dataset)
    with Image.open(again.path(0)) as image:
        assert image.size == dataset[0][0].size
        assert image.getexif().get(0x0112, 1) == 1


def test_what_cannot_be_written_is_refused(tmp_path):
    dataset = checked(tmp_path)
    with pytest.raises(SettingError, match="unknown format 'csv'; use one of: coco, yolo, voc"):
        write_dataset({"train": dataset}, tmp_path / "out", "csv")
    with pytest.raises(SettingError, match="not an empty folder"):
        write_dataset({"train": dataset}, tmp_path, "coco")
