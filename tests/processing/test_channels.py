"""Images of other numbers of channels than three, through processor and detector."""

import numpy as np
import pytest
import torch
from PIL import Image

from detrkit import Detector, DetrImageProcessor
from detrkit.errors import ImageError, SettingError
from tests.tiny import FAMILIES, tiny_resnet

SIZE = {"shortest_edge": 64, "longest_edge": 107}


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def detector_of(channels, **options):
    model = FAMILIES["detr"].detector(backbone_config=tiny_resnet(num_channels=channels))
    return Detector(model, DetrImageProcessor(size=SIZE, **options), device="cpu")


def test_a_processor_makes_as_many_channels_as_it_has_means():
    processor = DetrImageProcessor(size=SIZE, image_mean=[0.1, 0.2, 0.3, 0.4], image_std=[0.5] * 4)
    pixels = noise(80, 60, 4)
    expected = processor(pixels, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 4, 85, 64)
    for same in (np.moveaxis(pixels, -1, 0), Image.fromarray(pixels, "RGBA"), torch.from_numpy(pixels)):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)
    # Each channel is resized on its own, whatever the others hold.
    alone = DetrImageProcessor(size=SIZE, image_mean=[0.2], image_std=[0.5], num_channels=1)
    second = alone(pixels[..., 1], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(expected[:, 1:2], second)


@pytest.mark.parametrize("image", [Image.new("RGB", (60, 80)), noise(80, 60, 3), noise(80, 60)])
def test_channels_that_an_image_does_not_have_are_not_made_up(image):
    processor = DetrImageProcessor(size=SIZE, image_mean=[0.5] * 4, image_std=[0.5] * 4)
    with pytest.raises(ImageError, match="4 channels"):
        processor(image, return_tensors="pt")


def test_a_gray_processor_takes_images_of_every_kind(tmp_path):
    processor = DetrImageProcessor(size=SIZE, image_mean=[0.5], image_std=[0.25], num_channels=1)
    gray = noise(80, 60)
    expected = processor(gray, return_tensors="pt")["pixel_values"]
    assert expected.shape == (1, 1, 85, 64)
    Image.fromarray(gray).save(tmp_path / "gray.png")
    for same in (str(tmp_path / "gray.png"), Image.fromarray(gray).convert("RGB"), np.stack([gray] * 3, -1)):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)
    real = processor(gray.astype(np.float32), return_tensors="pt")["pixel_values"]
    assert (real - expected).abs().max() < 2 / 255 / 0.25
    processor.save_pretrained(tmp_path)
    assert DetrImageProcessor.from_pretrained(tmp_path).num_channels == 1


@pytest.mark.parametrize(
    ("channels", "image"),
    [
        (1, Image.new("RGB", (60, 80))),
        (4, Image.new("RGBA", (60, 80))),
        (4, noise(80, 60, 4)),
        (5, noise(5, 80, 60)),
    ],
)
def test_a_detector_takes_images_of_its_models_channels(channels, image):
    detections = detector_of(channels, image_mean=0.5, image_std=0.25)(image, threshold=0)
    assert len(detections) == 12
    assert detections.image_size == (80, 60)


def test_a_processor_of_other_channels_than_the_model_is_refused_at_once():
    with pytest.raises(SettingError, match=r"1 channels.*image_mean"):
        detector_of(1)
    processor = DetrImageProcessor(image_mean=0.5, image_std=0.5)
    assert processor.fitted_to(1) is not processor
    assert processor.fitted_to(3) is processor
