"""The result of a panoptic segmentation: ids, segments, files, pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from detrkit import PanopticSegmentation, rgb_to_id
from detrkit.errors import ImageError


def segmentation(**options) -> PanopticSegmentation:
    ids = np.zeros((40, 60), dtype=np.int32)
    ids[:20] = 1
    ids[25:35, 10:30] = 2
    ids[30:33, 40:55] = 70_000
    segments = [
        {"id": 1, "category_id": 119, "isthing": False, "area": 1200, "score": np.float32(0.9)},
        {"id": 2, "category_id": 17, "isthing": True, "area": 200, "score": 0.96875},
        {"id": 70_000, "category_id": 17, "isthing": True, "area": 45, "score": 1.0},
    ]
    return PanopticSegmentation(ids, segments, ["sky", "cat", "cat"], (40, 60), **options)


def test_repr_says_what_was_found_where():
    assert repr(segmentation(source="a.jpg")) == "PanopticSegmentation(3 in a.jpg, 60x40: 2 cat, 1 sky)"
    empty = PanopticSegmentation(np.zeros((4, 6), np.int32), [], [], (4, 6))
    assert repr(empty) == "PanopticSegmentation(0, 6x4)"
    assert len(empty) == 0


def test_a_mask_is_where_the_ids_are_its_segments():
    found = segmentation()
    assert found.mask(2).sum() == 45
    assert found.mask(2)[31, 50]


def test_the_png_holds_the_ids_exactly():
    file = io.BytesIO()
    segmentation().to_png().save(file, "PNG")
    with Image.open(file) as png:
        assert png.mode == "RGB"
        np.testing.assert_array_equal(rgb_to_id(np.asarray(png)), segmentation().ids)


def test_the_coco_entry_describes_every_segment():
    entry = segmentation().to_coco(139, "000000000139.png")
    assert (entry["image_id"], entry["file_name"]) == (139, "000000000139.png")
    sky, cat, far = entry["segments_info"]
    assert sky == {
        "id": 1,
        "category_id": 119,
        "isthing": 0,
        "iscrowd": 0,
        "area": 1200,
        "bbox": [0, 0, 60, 20],
        "score": 0.9,
    }
    assert (cat["bbox"], cat["isthing"]) == ([10, 25, 20, 10], 1)
    assert (far["id"], far["bbox"]) == (70_000, [40, 30, 15, 3])
    assert segmentation().to_coco(7)["file_name"] == "7.png"


def test_drawing_colours_segments_and_leaves_the_rest_alone():
    picture = Image.new("RGB", (60, 40), (10, 20, 30))
    drawn = np.asarray(segmentation().draw(picture))
    assert drawn.shape == (40, 60, 3)
    assert (drawn[38, 2] == (10, 20, 30)).all()
    assert (drawn[2, 2] != (10, 20, 30)).any()
    assert (np.asarray(picture) == (10, 20, 30)).all()


def test_drawing_reads_the_source_again(tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    drawn = segmentation(source=str(tmp_path / "a.png")).draw()
    assert drawn.size == (60, 40)


def test_drawing_refuses_what_does_not_fit():
    with pytest.raises(ImageError, match="60x40 pixels, but the image to draw on has 61x40"):
        segmentation().draw(Image.new("RGB", (61, 40)))
    with pytest.raises(ImageError, match="did not come from a file"):
        segmentation().draw()
