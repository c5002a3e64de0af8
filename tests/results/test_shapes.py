from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt, find_objects

from detrkit.results.shapes import deepest_pixel, find_boxes


def blobs(height: int, width: int, seed: int) -> np.ndarray:
    """Labels 0 to 6 in patches."""
    coarse = np.random.default_rng(seed).integers(0, 7, (height // 5 + 1, width // 5 + 1))
    return np.kron(coarse, np.ones((5, 5), int))[:height, :width]


@pytest.mark.parametrize("size", [(1, 1), (40, 60), (61, 33), (1, 90), (90, 1)])
def test_boxes_are_those_around_the_pixels(size: tuple[int, int]) -> None:
    labels = blobs(*size, seed=3)
    assert find_boxes(labels, 9) == find_objects(labels, max_label=9)
    assert find_boxes(labels, 70_000)[:9] == find_objects(labels, max_label=9)


@pytest.mark.parametrize("seed", range(6))
def test_the_deepest_pixel_is_the_farthest_from_what_is_outside(seed: int) -> None:
    inside = blobs(57, 83, seed) > 1
    depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1]
    assert deepest_pixel(inside) == np.unravel_index(depth.argmax(), depth.shape)


@pytest.mark.parametrize(
    ("shape", "deepest"), [((1, 1), (0, 0)), ((5, 5), (2, 2)), ((3, 40), (1, 1)), ((40, 3), (1, 1))]
)
def test_what_is_beyond_the_edges_is_outside(shape: tuple[int, int], deepest: tuple[int, int]) -> None:
    assert deepest_pixel(np.ones(shape, bool)) == deepest
