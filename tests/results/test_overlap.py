from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import batched_nms, nms

from detrkit.results.overlap import box_iou, without_overlaps


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
