import numpy as np
import PIL.Image
import pytest
import torch

from detrkit.processing.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelScaling, write_pixels
from tests.golden import MEAN, STD

BYTES = np.arange(256, dtype=np.uint8)


def scaled(image, size, **options):
    out = np.empty((3, *size), dtype=np.float32)
    write_pixels(image, size, out, **options)
    return out


def test_every_byte_is_normalised_as_in_the_original():
    image = PIL.Image.fromarray(np.stack([BYTES.reshape(16, 16)] * 3, axis=-1))
    ours = scaled(image, (16, 16), scaling=PixelScaling.of(1 / 255, IMAGENET_MEAN, IMAGENET_STD))
    original = (torch.arange(256).float().div(255) - MEAN[:, None]) / STD[:, None]
    np.testing.assert_allclose(ours.reshape(3, -1), original, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(40, 30), (20, 50), (8, 8), (20, 30)])
@pytest.mark.parametrize("resample", [0, 2, 3])
def test_resized_pixels_are_pillows(size, resample):
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    expected = np.asarray(image.resize(size[::-1], resample)).transpose(2, 0, 1) / 255
    ours = scaled(image, size, resample=resample, scaling=PixelScaling.of(1 / 255, None, None))
    np.testing.assert_allclose(ours, expected, atol=1e-6, rtol=0)


def test_bytes_stay_bytes_where_nothing_is_to_be_done():
    assert PixelScaling.of(None, None, None) is None
    image = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    out = np.empty((3, 5, 6), dtype=np.uint8)
    write_pixels(image, (5, 6), out)
    np.testing.assert_array_equal(out, np.asarray(image).transpose(2, 0, 1))


def test_means_and_deviations_can_be_one_number():
    scaling = PixelScaling.of(1 / 255, 0.5, 0.25)
    assert scaling == PixelScaling.of(1 / 255, [0.5] * 3, (0.25, 0.25, 0.25))
    assert 255 * scaling.scale[0] + scaling.bias[0] == pytest.approx((1 - 0.5) / 0.25)


@pytest.mark.parametrize(("mean", "std"), [((0.5, 0.5), 1), (0, 0), (0, (1, 1, 0))])
def test_wrong_means_and_deviations_are_refused(mean, std):
    with pytest.raises(ValueError, match="image_"):
        PixelScaling.of(1 / 255, mean, std)
