import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from detrkit import id_to_rgb, rgb_to_id
from detrkit.processing.panoptic_png import encode_panoptic_png

id_maps = arrays(np.int32, (3, 5), elements=st.integers(0, (1 << 24) - 1))


@given(id_maps)
def test_ids_and_colours_are_inverse(ids):
    colors = id_to_rgb(ids)
    assert colors.dtype == np.uint8
    assert colors.shape == (3, 5, 3)
    back = rgb_to_id(colors)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, ids)


@given(id_maps)
def test_ids_come_back_from_the_png(ids):
    picture = PIL.Image.open(io.BytesIO(encode_panoptic_png(ids)))
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(rgb_to_id(np.array(picture, dtype=np.uint8)), ids)


def test_red_is_the_lowest_byte():
    assert rgb_to_id([1, 2, 3]) == 1 + 256 * 2 + 65536 * 3
    assert isinstance(rgb_to_id(np.array([255, 255, 255], dtype=np.uint8)), int)
    assert id_to_rgb(197121) == [1, 2, 3]


def test_tensors_stay_tensors():
    ids = rgb_to_id(torch.tensor([[[255, 1, 0]]], dtype=torch.uint8))
    assert isinstance(ids, torch.Tensor)
    assert ids.tolist() == [[511]]


@pytest.mark.parametrize("ids", [np.array([[-1]]), np.array([[1 << 24]])])
def test_ids_without_a_colour_are_refused(ids):
    with pytest.raises(ValueError, match="segment ids must be 0 to 16777215"):
        id_to_rgb(ids)


def test_colours_of_other_than_three_channels_are_refused():
    with pytest.raises(ValueError, match="three channels"):
        rgb_to_id(np.zeros((2, 2, 4), dtype=np.uint8))


def test_colours_need_no_pytorch():
    code = (
        "import sys, numpy, detrkit; detrkit.rgb_to_id(detrkit.id_to_rgb(numpy.zeros((2, 2), int))); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
