"""Objects that keep their numbers from frame to frame."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from detrkit.errors import MissingExtraError
from detrkit.inference.tracking import Tracker
from detrkit.results.detections import Detections


def found(*boxes: tuple[float, float, float, float]) -> Detections:
    return Detections(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.linspace(0.4, 0.3, len(boxes)).astype(np.float32),
        labels=np.zeros(len(boxes), dtype=np.int64),
        names=["cell"] * len(boxes),
        image_size=(200, 400),
    )


def test_an_object_that_moves_keeps_its_number_whatever_its_place_among_the_others() -> None:
    pytest.importorskip("trackers")
    tracker, ids = Tracker(), []
    for step in range(8):
        one, other = (10 + 5 * step, 10, 50 + 5 * step, 50), (200 - 5 * step, 100, 240 - 5 * step, 140)
        boxes = (one, other) if step % 2 else (other, one)
        tracks = tracker.update(found(*boxes)).track_ids
        assert tracks is not None
        ids.append(tuple(tracks if step % 2 else tracks[::-1]))
    assert set(ids) == {(2, 1)}


def test_a_new_object_gets_its_number_when_it_is_seen_again_and_a_lost_one_keeps_it() -> None:
    pytest.importorskip("trackers")
    tracker = Tracker(patience=5)
    still, late = (0, 0, 40, 40), (100, 100, 150, 150)
    frames = [[], [still], [still, late], [still, late], [late], [late], [still, late]]
    ids = [tracker.update(found(*boxes)).track_ids.tolist() for boxes in frames]
    assert ids == [[], [1], [1, -1], [1, 2], [2], [2], [1, 2]]


def test_numbers_are_in_every_form_of_the_results() -> None:
    detections = found((0, 0, 40, 40), (100, 100, 150, 150))
    detections.track_ids = np.array([7, -1])
    assert [one.track_id for one in detections] == [7, None]
    assert [entry.get("track_id") for entry in detections.to_coco()] == [7, None]
    assert [row["track_id"] for row in detections.to_rows()] == [7, None]
    assert detections[1:].track_ids.tolist() == [-1]
    supervision = pytest.importorskip("supervision")
    assert isinstance(detections.to_supervision(), supervision.Detections)
    assert detections.to_supervision().tracker_id.tolist() == [7, -1]


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(MissingExtraError, match=r"\.\[track\]"):
        Tracker()
