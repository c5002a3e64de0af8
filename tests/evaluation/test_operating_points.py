from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detrkit.evaluation.operating_points import (
    ImageTruth,
    Judged,
    best_at_precision,
    best_at_recall,
    best_f1,
    judge_image,
    operating_points,
    point_at,
)


def judged_of(scores: list[float], correct: list[bool], objects: int) -> Judged:
    count = len(scores)
    return Judged(
        np.array(scores, float),
        np.zeros(count, np.int64),
        np.array(correct, bool),
        np.zeros(count, np.int64),
        np.array([[objects]]),
    )


SCENE = judged_of([0.9, 0.8, 0.7, 0.6, 0.5], [True, True, False, True, False], 4)


def test_wishes_choose_among_the_points() -> None:
    points = operating_points(SCENE)
    assert [(point.detections, point.correct) for point in points] == [
        *((0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (5, 3)),
    ]
    best = best_f1(points)
    assert (best.detections, best.f1) == (4, 0.75)
    assert 0.5 <= best.threshold < 0.6
    precise = best_at_precision(points, 0.9)
    assert precise is not None
    assert precise.detections == 2
    assert best_at_precision(operating_points(judged_of([0.4], [False], 2)), 0.5) is None
    finding = best_at_recall(points, 0.5)
    assert finding is not None
    assert finding.detections == 2
    assert best_at_recall(points, 0.9) is None


def test_equal_scores_are_never_parted() -> None:
    points = operating_points(judged_of([0.7, 0.7, 0.2], [True, False, True], 2))
    assert [point.detections for point in points] == [0, 2, 3]


@given(st.lists(st.tuples(st.integers(0, 1000), st.booleans()), max_size=30))
def test_each_threshold_gives_what_its_point_says(found: list[tuple[int, bool]]) -> None:
    judged = judged_of([score / 1000 for score, _ in found], [right for _, right in found], 31)
    for point in operating_points(judged):
        if point.threshold > 0 or not (judged.scores == 0).any():
            again = point_at(judged, point.threshold)
            assert (again.detections, again.correct) == (point.detections, point.correct)


def test_detections_are_judged_as_coco_does() -> None:
    truth = ImageTruth(
        boxes=np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 90, 50]], np.float32),
        classes=np.array([0, 1, 0]),
        crowds=np.array([False, False, True]),
    )
    boxes = np.array(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10], [41, 1, 45, 5]], np.float32
    )
    correct, counts = judge_image(boxes, np.array([0, 0, 0, 1, 0]), truth)
    assert correct.tolist() == [True, False, False, True, False]  # a duplicate, a wrong class
    assert counts.tolist() == [True, True, True, True, False]  # the last one is in a crowd


def test_parts_keep_their_objects() -> None:
    judged = Judged(
        np.array([0.9, 0.8, 0.4]),
        np.array([0, 1, 1]),
        np.array([True, False, True]),
        np.array([0, 0, 1]),
        np.array([[2, 1], [0, 3]]),
    )
    assert judged.of_class(1).objects.sum() == 4
    assert judged.of_images(np.array([False, True])).objects.tolist() == [[0, 0], [0, 3]]
    assert judged.above(np.array([0.5, 0.85])).scores.tolist() == [0.9]
    with pytest.raises(IndexError):
        judged.above(np.array([0.5]))
