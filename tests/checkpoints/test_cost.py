from __future__ import annotations

from pathlib import Path

from detrkit import DeformableDetrConfig, DeformableDetrForObjectDetection
from detrkit.checkpoints.cost import count_cost


def test_a_sample_is_four_multiply_adds_and_one_for_its_weight(tiny_deformable_detr: Path) -> None:
    config = DeformableDetrConfig.from_pretrained(tiny_deformable_detr)
    cost = count_cost(DeformableDetrForObjectDetection, config, (64, 96))
    cells = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2  # of the levels at strides 8, 16, 32 and 64
    layers_times_queries = 2 * cells + 2 * 12
    levels_times_points, width = 4 * 4, 32
    assert cost.sampling_macs == 5 * layers_times_queries * levels_times_points * width
