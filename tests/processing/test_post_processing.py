import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from detrkit.common.boxes import cxcywh_to_xyxy
from detrkit.processing.post_processing import (
    Candidates,
    scale_boxes,
    select_detections,
    sigmoid_top_k_detections,
    softmax_detections,
)
from tests.golden import OUTPUTS

box_arrays = arrays(np.float64, (5, 4), elements=st.floats(0, 1))


@given(box_arrays, st.integers(1, 4000), st.integers(1, 4000))
def test_scaled_boxes_divide_back(boxes, height, width):
    boxes = torch.from_numpy(boxes)[None]
    pixels = scale_boxes(boxes, [(height, width)])
    back = pixels / torch.tensor([width, height, width, height])
    torch.testing.assert_close(back, boxes, atol=1e-12, rtol=0)


def test_no_object_is_not_a_label():
    logits = torch.tensor([[[0.0, 1.0, 9.0], [2.0, 0.0, 0.0]]])
    candidates = softmax_detections(logits, torch.full((1, 2, 4), 0.5))
    assert candidates.labels.tolist() == [[1, 0]]
    torch.testing.assert_close(candidates.scores[0, 0], logits[0, 0].softmax(-1)[1])
    torch.testing.assert_close(candidates.boxes[0, 0], torch.tensor([0.25, 0.25, 0.75, 0.75]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_read_in_full_precision(dtype):
    logits, boxes = torch.randn(1, 3, 5).to(dtype), torch.rand(1, 3, 4).to(dtype)
    candidates = softmax_detections(logits, boxes)
    assert candidates.scores.dtype == candidates.boxes.dtype == torch.float32
    torch.testing.assert_close(candidates.scores, logits.float().softmax(-1)[..., :-1].amax(-1))


def test_sigmoid_candidates_are_the_best_pairs_of_query_and_class():
    logits = torch.tensor([[[3.0, -1.0], [2.0, 4.0], [0.0, 1.0]]])
    boxes = torch.tensor([[[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.2, 0.2], [0.9, 0.9, 0.2, 0.2]]])
    best = sigmoid_top_k_detections(logits, boxes, 3)
    assert best.labels.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(best.scores[0], torch.tensor([4.0, 3.0, 2.0]).sigmoid())
    torch.testing.assert_close(best.boxes[0], cxcywh_to_xyxy(boxes[0, [1, 0, 1]]))
    assert sigmoid_top_k_detections(logits, boxes, 100).scores.shape == (1, 6)


def candidates_of_two_images():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.4]])
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    queries = torch.arange(3).expand(2, 3)
    return Candidates(scores, labels, torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(2, 3, 4), queries)


@pytest.mark.parametrize(
    "sizes", [[(100, 200), (10, 20)], torch.tensor([[100, 200], [10, 20]]), np.array([[100, 200], [10, 20]])]
)
def test_boxes_are_scaled_to_each_image(sizes):
    first, second = select_detections(candidates_of_two_images(), 0.35, sizes)
    assert first["labels"].tolist() == [1, 2]
    assert second["labels"].tolist() == [6]
    assert first["boxes"][0].tolist() == [0, 25, 100, 100]
    assert second["boxes"][0].tolist() == [0, 2.5, 10, 10]


def test_the_threshold_itself_is_no_detection_and_none_keeps_all():
    assert len(select_detections(candidates_of_two_images(), 0.5)[0]["scores"]) == 1
    assert len(select_detections(candidates_of_two_images(), None)[0]["scores"]) == 3


@pytest.mark.parametrize("sizes", [[(1, 2)], torch.ones(3, 2), [(1, 2, 3), (1, 2, 3)]])
def test_wrong_target_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="target_sizes"):
        select_detections(candidates_of_two_images(), 0.5, sizes)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OUTPUTS])
def test_detections_equal_the_originals(case):
    outputs, expected = case.outputs(), case.expected()
    size = torch.from_numpy(expected["orig_size"])[None]
    ours = select_detections(softmax_detections(outputs.logits, outputs.pred_boxes), None, size)[0]
    np.testing.assert_array_equal(ours["labels"], expected["det_labels"])
    np.testing.assert_allclose(ours["scores"], expected["det_scores"], atol=1e-6)
    np.testing.assert_allclose(ours["boxes"], expected["det_boxes"], atol=1e-3)
