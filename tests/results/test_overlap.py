from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import batched_nms, nms

from detrkit.results import overlap
from detrkit.results.overlap import Views, box_iou, without_overlaps, without_repeats


def boxes_of(seed: int, number: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 20, (number, 2))
    return np.concatenate([corners, corners + rng.uniform(1, 15, (number, 2))], axis=1).astype(np.float32)


scenes = st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([0.1, 0.37, 0.7, 1.0]))


@given(scenes)
def test_the_filter_keeps_what_torchvision_keeps(scene: tuple[int, int, float]) -> None:
    seed, number, iou = scene
    boxes = boxes_of(seed, number)
    falling = torch.arange(number, 0, -1, dtype=torch.float32)
    wanted = nms(torch.from_numpy(boxes), falling, iou)
    assert without_overlaps(boxes, iou).tolist() == wanted.tolist()
    labels = np.random.default_rng(seed).integers(0, 3, number)
    wanted = batched_nms(torch.from_numpy(boxes), falling, torch.from_numpy(labels), iou)
    assert without_overlaps(boxes, iou, labels).tolist() == wanted.tolist()


def test_iou_of_empty_boxes_is_zero_and_a_box_equals_itself() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 1, 1], [5, 5, 4, 4]], np.float32)
    np.testing.assert_array_equal(box_iou(boxes, boxes), np.diag([1, 0, 0]).astype(np.float32))


def test_a_box_is_dropped_above_the_iou_and_not_at_it() -> None:
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)  # IoU 0.5
    assert without_overlaps(boxes, 0.5).tolist() == [0, 1]
    assert without_overlaps(boxes, 0.499).tolist() == [0]


IMAGE = (100, 180)  # height, width: two tiles of 100 by 100 that share 20 columns
LEFT, RIGHT = [0, 0, 100, 100], [80, 0, 180, 100]


def kept(*found: tuple[list[float], float, list[int]], labels: list[int] | None = None) -> list[int]:
    boxes, scores, tiles = (np.array(part, np.float32) for part in zip(*found))
    return without_repeats(
        boxes, scores, Views(tiles, IMAGE), None if labels is None else np.array(labels)
    ).tolist()


def test_a_cut_object_gives_way_to_the_whole_one_of_the_neighbour() -> None:
    whole, part = [85, 10, 120, 40], [85, 11, 100, 40]
    assert kept((part, 0.9, LEFT), (whole, 0.6, RIGHT)) == [1]
    assert kept((whole, 0.6, RIGHT), (part, 0.9, LEFT)) == [0]
    assert kept((part, 0.9, LEFT), (whole, 0.6, RIGHT), labels=[1, 2]) == [0, 1]


def test_a_cut_object_stays_where_no_tile_has_it_whole_or_hardly() -> None:
    assert kept(([85, 10, 100, 40], 0.9, LEFT)) == [0]
    assert kept(([85, 10, 100, 40], 0.9, LEFT), ([85, 60, 120, 90], 0.9, RIGHT)) == [0, 1]
    assert kept(([85, 10, 100, 40], 0.9, LEFT), ([85, 10, 120, 40], 0.1, RIGHT)) == [0, 1]
    # Both tiles cut it: neither has it whole.
    assert kept(([20, 10, 100, 40], 0.9, LEFT), ([80, 10, 170, 40], 0.8, RIGHT)) == [0, 1]


def test_an_object_that_two_tiles_have_whole_is_kept_once_with_the_better_score() -> None:
    assert kept(([83, 10, 98, 40], 0.7, LEFT), ([83, 10, 97, 41], 0.8, RIGHT)) == [1]


def test_boxes_of_one_tile_and_at_the_border_of_the_image_are_left_alone() -> None:
    assert kept(([10, 10, 40, 40], 0.7, LEFT), ([10, 10, 40, 41], 0.8, LEFT)) == [0, 1]
    # At the outer border nothing is cut: the better of the two stays.
    assert kept(([84, 70, 97, 100], 0.9, LEFT), ([84, 70, 97, 99], 0.8, RIGHT)) == [0]


def test_many_boxes_are_compared_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = boxes_of(1, 300)
    whole = without_overlaps(boxes, 0.3).tolist()
    monkeypatch.setattr(overlap, "_PAIRS_AT_ONCE", 50)
    assert without_overlaps(boxes, 0.3).tolist() == whole
    assert without_overlaps(boxes[:0], 0.3).tolist() == []
