from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.data import DetectionDataset, check_dataset
from detrkit.evaluation import error_gallery as gallery
from detrkit.evaluation.error_analysis import WORST, analyse_errors
from detrkit.results.drawing import class_color

GREY = (128, 128, 128)
OBJECTS = ((1, [20, 20, 40, 40]), (2, [100, 30, 30, 60]), (1, [160, 90, 20, 20]))


@pytest.fixture
def dataset(tmp_path: Path) -> DetectionDataset:
    """A grey image with three objects."""
    Image.new("RGB", (200, 120), GREY).save(tmp_path / "image.png")
    document = {
        "images": [{"id": 5, "file_name": "image.png", "width": 200, "height": 120}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 5, "category_id": category, "bbox": box}
            for i, (category, box) in enumerate(OBJECTS, start=1)
        ],
    }
    return check_dataset(DetectionDataset.from_coco(tmp_path, document)).dataset


def found(score: float, category: int, box: list[float]) -> dict:
    return {"image_id": 5, "category_id": category, "bbox": box, "score": score}


RESULTS = [
    found(0.5, 1, [0, 90, 20, 20]),  # background
    found(0.9, 2, OBJECTS[0][1]),  # classification
    found(0.8, 2, OBJECTS[1][1]),  # right
    found(0.7, 2, [100, 30, 30, 58]),  # duplicate
]


def test_the_worst_mistakes_come_first_with_what_is_true(dataset: DetectionDataset) -> None:
    errors = analyse_errors(dataset.document, RESULTS)
    assert [m.kind for m in errors.false] == ["classification", "duplicate", "background"]
    assert [m.found["score"] for m in errors.false] == [0.9, 0.7, 0.5]
    assert [m.true and m.true["id"] for m in errors.false] == [1, 2, None]
    assert [round(m.iou, 2) for m in errors.false] == [1, 0.97, 0]
    assert [(m.kind, m.true["id"], m.found) for m in errors.missed] == [("missed", 3, None)]
    nothing = analyse_errors(dataset.document, [])
    assert [m.true["id"] for m in nothing.missed] == [2, 1, 3]  # the largest first


def test_only_so_many_examples_are_kept(dataset: DetectionDataset) -> None:
    results = [found(0.01 * i, 1, [0, 90, 20 + i / 10, 20]) for i in range(1, 2 * WORST)]
    errors = analyse_errors(dataset.document, results)
    assert len(errors.false) == WORST
    assert errors.false[0].found == results[-1]


def test_captions_say_what_was_found_and_what_is_true(dataset: DetectionDataset) -> None:
    errors = analyse_errors(dataset.document, RESULTS)
    captions = [gallery._caption(m, dataset, dataset.path(0)) for m in (*errors.false, *errors.missed)]
    assert captions == [
        ("classification", "found 0.90 dog", "true: IoU 1.00 with cat", "image.png"),
        ("duplicate", "found 0.70 dog", "true: IoU 0.97 with dog", "image.png"),
        ("background", "found 0.50 cat", "no object near", "image.png"),
        ("missed", "found nothing", "true: cat", "image.png"),
    ]


def test_boxes_are_drawn_in_the_colours_of_their_classes_and_captions_cover_nothing(
    dataset: DetectionDataset,
) -> None:
    errors = analyse_errors(dataset.document, RESULTS)
    for mistake in (*errors.false, *errors.missed):
        tile = np.asarray(gallery._tile(mistake, dataset, 0))
        picture, caption = tile[: gallery._HEIGHT], tile[gallery._HEIGHT :]
        drawn = {class_color(e["category_id"]) for e in (mistake.found, mistake.true) if e is not None}
        colors = {tuple(color) for color in picture.reshape(-1, 3).tolist()}
        assert colors <= drawn | {GREY, (0, 0, 0), (255, 255, 255)}
        assert drawn <= colors or mistake.iou == 1  # the detection is drawn over the annotation
        assert np.ptp(caption, axis=2).max() == 0  # only black and grey letters
        assert caption.min() < 50


def test_long_names_are_shortened_to_the_width_of_a_tile() -> None:
    text = gallery._fitting("found 0.90 " + "a very long name of a class " * 5)
    assert text.endswith("...")
    assert gallery.font_for(text, gallery._LETTERS).getlength(text) <= gallery._WIDTH
    assert gallery._fitting("found 0.90 dog") == "found 0.90 dog"


def test_a_sheet_shows_all_and_says_where_there_is_nothing(dataset: DetectionDataset) -> None:
    none = gallery.error_gallery(analyse_errors(dataset.document, _perfect()), dataset)
    some = gallery.error_gallery(analyse_errors(dataset.document, RESULTS), dataset)
    assert none.width == some.width
    assert np.asarray(none).min() < 50  # two headings
    tile = gallery._HEIGHT + gallery._LINES * gallery._LINE + gallery._GAP
    assert some.height == none.height + 2 * tile


def test_boxes_that_reach_beyond_the_image_are_drawn(dataset: DetectionDataset) -> None:
    errors = analyse_errors(
        dataset.document, [found(0.9, 1, [-30, -20, 50, 300]), found(0.8, 1, [0, 0, 1, 1])]
    )
    assert len(errors.false) == 2
    gallery.error_gallery(errors, dataset)


def _perfect() -> list[dict]:
    return [found(0.9, category, box) for category, box in OBJECTS]
