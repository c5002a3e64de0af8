"""A trace of a model holds for images of other sizes than the one that it was made with."""

import pytest
import torch
from torch import nn

from tests.closeness import OUTPUT_TOLERANCES
from tests.tiny import FAMILIES, padded_batch

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


class Outputs(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask):
        found = self.model(pixel_values, pixel_mask, return_dict=True)
        return found.logits, found.pred_boxes


def test_a_trace_gives_the_models_numbers_at_another_size(family):
    model = Outputs(family.detector()).eval()
    pixels = torch.randn(2, 3, 97, 200, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 97, 200, dtype=torch.long)
    mask[1, 60:] = 0
    with torch.no_grad():
        traced = torch.jit.trace(model, padded_batch(), check_trace=False)
        for found, expected, field in zip(traced(pixels, mask), model(pixels, mask), OUTPUT_TOLERANCES):
            torch.testing.assert_close(found, expected, atol=OUTPUT_TOLERANCES[field], rtol=0)


def test_a_trace_with_fewer_pixels_than_proposals_is_refused():
    model = Outputs(FAMILIES["deformable_detr_two_stage"].detector(two_stage_num_proposals=500)).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="larger image"):
        torch.jit.trace(model, padded_batch(), check_trace=False)
