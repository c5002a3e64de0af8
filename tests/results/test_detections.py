"""Detections as rows, tables and drawings."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from PIL import Image

from detrkit import Detections
from detrkit.errors import ImageError, MissingExtraError


def some_detections(**changes: object) -> Detections:
    fields = {
        "boxes": np.array([[10, 20, 30, 60], [0, 0, 5, 5], [1.5, 2.25, 3, 4]], dtype=np.float32),
        "scores": np.array([0.9, 0.5, 0.1], dtype=np.float32),
        "labels": np.array([1, 2, 1]),
        "names": ["cat", "remote", "cat"],
        "image_size": (100, 200),
        "source": "room.jpg",
    }
    return Detections(**(fields | changes))


@pytest.mark.parametrize(
    ("index", "scores"),
    [
        (slice(0, 2), [0.9, 0.5]),
        (slice(None, None, -1), [0.1, 0.5, 0.9]),
        (np.array([True, False, True]), [0.9, 0.1]),
        ([False, False, False], []),
        ([2, 0], [0.1, 0.9]),
        ([], []),
        (np.array([], dtype=np.int64), []),
    ],
)
def test_indexing_keeps_all_fields_together(index: object, scores: list[float]) -> None:
    masks = np.arange(3)[:, None, None] == np.zeros((1, 100, 200))
    everything = some_detections(masks=masks)
    chosen = everything[index]
    np.testing.assert_allclose(chosen.scores, scores)
    rows = [everything.scores.tolist().index(score) for score in chosen.scores.tolist()]
    np.testing.assert_array_equal(chosen.boxes, everything.boxes[rows])
    np.testing.assert_array_equal(chosen.masks, masks[rows])
    assert chosen.names == [everything.names[row] for row in rows]
    assert (chosen.image_size, chosen.source) == ((100, 200), "room.jpg")


def test_a_mask_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(IndexError):
        some_detections()[np.array([True, False])]


def test_rows_give_one_object_each() -> None:
    found = some_detections()
    rows = list(found)
    assert [(row.name, row.label, round(row.score, 2)) for row in rows] == [
        ("cat", 1, 0.9),
        ("remote", 2, 0.5),
        ("cat", 1, 0.1),
    ]
    np.testing.assert_array_equal(found[0].box, [10, 20, 30, 60])
    assert found[-1].score == rows[-1].score
    with pytest.raises(IndexError):
        found[3]


def test_repr_says_what_was_found_where() -> None:
    assert repr(some_detections()) == "Detections(3 in room.jpg, 200x100: 2 cat, 1 remote)"
    assert repr(some_detections(source=None)[[]]) == "Detections(0, 200x100)"


def test_coco_boxes_are_corner_width_height() -> None:
    entries = some_detections().to_coco(image_id=7, first_id=11)
    assert entries[0] == {
        "id": 11,
        "image_id": 7,
        "category_id": 1,
        "bbox": [10.0, 20.0, 20.0, 40.0],
        "area": 800.0,
        "score": 0.9,
    }
    assert [entry["id"] for entry in entries] == [11, 12, 13]
    assert json.loads(json.dumps(entries)) == entries


def test_supervision_gets_boxes_scores_labels_and_names() -> None:
    pytest.importorskip("supervision")
    given = some_detections()
    taken = given.to_supervision()
    np.testing.assert_array_equal(taken.xyxy, given.boxes)
    np.testing.assert_array_equal(taken.confidence, given.scores)
    np.testing.assert_array_equal(taken.class_id, given.labels)
    assert taken.data["class_name"].tolist() == given.names
    assert len(some_detections()[[]].to_supervision()) == 0


def test_a_missing_supervision_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "supervision":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"'\.\[supervision\]'"):
        some_detections().to_supervision()


def test_draw_marks_a_copy_of_the_picture() -> None:
    picture = Image.new("RGB", (200, 100))
    drawn = some_detections().draw(picture)
    assert drawn.size == (200, 100)
    assert picture.getbbox() is None
    assert drawn.getbbox() is not None


def test_draw_refuses_a_picture_of_another_size() -> None:
    with pytest.raises(ImageError, match="200x100"):
        some_detections().draw(Image.new("RGB", (100, 200)))
    with pytest.raises(ImageError, match=r"draw\(\)"):
        some_detections(source=None).draw()
