"""Pillow's bytes, from arithmetic that is not Pillow's."""

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detrkit.processing.enlarge import MAX_HEIGHT, can_enlarge, row_weights, write_enlarged

DIFFERENCES = np.arange(-255, 256)


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def enlarged(image, height, width):
    out = np.empty((3, height, width), dtype=np.float32)
    write_enlarged(image, out, (1, 1, 1), (0, 0, 0))
    return out.transpose(1, 2, 0)


@st.composite
def heights(draw):
    new = draw(st.integers(3, MAX_HEIGHT))
    return draw(st.integers(2, new - 1)), new


@settings(max_examples=60, deadline=None)
@given(heights())
def test_every_pair_of_bytes_rounds_as_in_pillow(old_and_new):
    """All 511 differences of two bytes, between each two rows, against Pillow's integer formula."""
    old, new = old_and_new
    rows, weights = row_weights(old, new)
    share = ((2 * np.arange(new) + 1) * old - new - 2 * new * rows) / (2 * new)
    share = share.clip(0, 1)
    upper = np.floor(0.5 + share * 2**22).astype(np.int64)[:, None]
    expected = (DIFFERENCES * upper + 2**21) >> 22
    floats = DIFFERENCES.astype(np.float32) * weights + np.float32(0.5)
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(np.floor(floats), expected)


@pytest.mark.parametrize("old", [(480, 640), (427, 640), (640, 480), (375, 500), (2, 3), (333, 50)])
def test_pixels_equal_pillows(old):
    height, width = (min(800, old[0] * 2 + 1), 601)
    expected = noise(*old).resize((width, height), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(enlarged(noise(*old), height, width), np.asarray(expected))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(1, 60), st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_small_images_equal_pillows(height, width, taller, new_width, seed):
    size = (height + taller, new_width)
    image = noise(height, width, seed)
    expected = image.resize(size[::-1], PIL.Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(enlarged(image, *size), np.asarray(expected))


def test_writes_into_a_view_and_nowhere_else():
    out = np.full((3, 12, 11), -1, dtype=np.float32)
    write_enlarged(noise(5, 4), out[:, :9, :8], (2, 2, 2), (1, 1, 1))
    expected = np.asarray(noise(5, 4).resize((8, 9), PIL.Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(out[:, :9, :8], expected * 2.0 + 1)
    assert (out[:, 9:] == -1).all()
    assert (out[:, :, 8:] == -1).all()


@pytest.mark.parametrize(
    ("old", "new"),
    [((10, 10), (10, 20)), ((10, 10), (5, 5)), ((1, 9), (2, 9)), ((9, 9), (MAX_HEIGHT + 1, 9))],
)
def test_is_only_for_more_rows_within_the_proof(old, new):
    assert not can_enlarge(old, new)
    assert can_enlarge((10, 10), (11, 5))
