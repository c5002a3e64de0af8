import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from transformers.image_utils import AnnotationFormat

from detrkit import DetrFeatureExtractor, DetrImageProcessor
from detrkit.errors import AnnotationError, ImageError, SettingError
from detrkit.models.detr.image_processing_detr import DetrImageProcessorFast, DetrImageProcessorPil
from tests.golden import DATA, IMAGES, MEAN, STD, needs_data

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 256, (48, 60, 3), dtype=np.uint8)
TALL = RNG.integers(0, 256, (50, 30, 3), dtype=np.uint8)
SMALL = {"shortest_edge": 64, "longest_edge": 107}
COCO = DATA / "transformers_fixtures" / "COCO"


@pytest.fixture
def processor():
    return DetrImageProcessor(size=SMALL)


def original(pixels, height, width):
    """What datasets/transforms.py of the original does to an image."""
    resized = PIL.Image.fromarray(pixels).resize((width, height), PIL.Image.Resampling.BILINEAR)
    image = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255)
    return (image - MEAN[:, None, None]) / STD[:, None, None]


def objects(*boxes, image_id=7, **values):
    entries = [{"bbox": b, "category_id": 3, "area": 5.0, "iscrowd": 0, **values} for b in boxes]
    return {"image_id": image_id, "annotations": entries}


# Pixels and padding


def test_a_batch_is_the_originals_pixels_padded_with_zeros(processor):
    encoded = processor([WIDE, TALL], return_tensors="pt")
    pixels, mask = encoded["pixel_values"], encoded["pixel_mask"]
    assert pixels.shape == (2, 3, 106, 80)
    torch.testing.assert_close(pixels[0, :, :64, :80], original(WIDE, 64, 80), atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels[1, :, :, :64], original(TALL, 106, 64), atol=1e-6, rtol=0)
    assert (pixels[0, :, 64:] == 0).all()
    assert (pixels[1, :, :, 64:] == 0).all()
    assert mask.dtype == torch.int64
    expected = torch.zeros(2, 106, 80, dtype=torch.int64)
    expected[0, :64] = expected[1, :, :64] = 1
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_larger_batch_is_its_images_one_by_one(processor, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = processor([WIDE, TALL, WIDE[:30], WIDE[:, :20], TALL], return_tensors="pt")["pixel_values"]
    finally:
        torch.set_num_threads(before)
    for image, pixels in zip([WIDE, TALL, WIDE[:30], WIDE[:, :20], TALL], batch):
        alone = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels[:, : alone.shape[1], : alone.shape[2]], alone)


@pytest.mark.parametrize(
    "image",
    [
        PIL.Image.fromarray(WIDE),
        WIDE.transpose(2, 0, 1),
        torch.from_numpy(WIDE),
        torch.from_numpy(WIDE).permute(2, 0, 1),
        [WIDE],
        WIDE[None],
        WIDE.tolist(),
    ],
    ids=["pil", "first", "torch", "torch-first", "list", "batch", "numbers"],
)
def test_an_image_in_any_form_gives_the_same(processor, image):
    expected = processor(WIDE, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)


def test_paths_are_read(processor, tmp_path):
    PIL.Image.fromarray(WIDE).save(tmp_path / "image.png")
    expected = processor(WIDE, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(tmp_path / "image.png", return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ImageError, match="no such file"):
        processor([tmp_path / "none.png"])


def test_input_data_format_settles_where_the_channels_are(processor):
    cube = RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    last = processor(cube, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    assert torch.equal(last, processor(PIL.Image.fromarray(cube), return_tensors="pt")["pixel_values"])
    assert not torch.equal(last, processor(cube, return_tensors="pt")["pixel_values"])


def test_real_numbers_are_resized_without_rounding(processor):
    fractions = processor(torch.from_numpy(WIDE) / 255.0, do_rescale=False, return_tensors="pt")
    from_bytes = processor(WIDE, return_tensors="pt")
    difference = fractions["pixel_values"] - from_bytes["pixel_values"]
    assert 0 < difference.abs().max() < 1.01 / 255 / 0.224


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"size": 20}, (20, 25)),
        ({"size": {"shortest_edge": 20}}, (20, 25)),
        ({"size": {"height": 10, "width": 20}}, (10, 20)),
        ({"size": {"max_height": 30, "max_width": 30}}, (24, 30)),
        ({"size": (10, 20)}, (10, 20)),
        ({"max_size": 70}, (56, 70)),
        ({"do_resize": False}, (48, 60)),
        ({"pad_size": {"height": 100, "width": 120}}, (100, 120)),
        ({"pad_size": 99}, (99, 99)),
    ],
)
def test_sizes_can_be_given_to_the_call_or_to_the_processor(processor, options, shape):
    assert processor(WIDE, return_tensors="pt", **options)["pixel_values"].shape == (1, 3, *shape)
    if "max_size" not in options:
        made = DetrImageProcessor(**{"size": SMALL, **options})
        assert made(WIDE, return_tensors="pt")["pixel_values"].shape == (1, 3, *shape)
    assert processor.size == SMALL


def test_steps_can_be_left_out(processor):
    plain = processor(WIDE, do_resize=False, do_rescale=False, do_normalize=False, return_tensors="np")
    assert plain["pixel_values"].dtype == np.uint8
    np.testing.assert_array_equal(plain["pixel_values"][0], WIDE.transpose(2, 0, 1))
    rescaled = processor(WIDE, do_resize=False, do_normalize=False, rescale_factor=0.5, return_tensors="np")
    np.testing.assert_array_equal(rescaled["pixel_values"][0], WIDE.transpose(2, 0, 1) * np.float32(0.5))
    normalised = processor(WIDE, do_resize=False, image_mean=0.5, image_std=[0.5] * 3, return_tensors="np")
    np.testing.assert_allclose(normalised["pixel_values"][0], WIDE.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_none_in_a_call_means_the_processors_option(processor):
    expected = processor(WIDE, return_tensors="pt")["pixel_values"]
    assert torch.equal(
        processor(WIDE, size=None, do_resize=None, return_tensors="pt")["pixel_values"], expected
    )


@pytest.mark.parametrize(("kind", "container"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_return_tensors(processor, kind, container):
    encoded = processor([WIDE, TALL], [objects([1, 2, 3, 4]), objects()], return_tensors=kind)
    assert isinstance(encoded["pixel_values"], container)
    assert isinstance(encoded["pixel_mask"], container)
    assert len(encoded["pixel_values"]) == 2
    assert encoded["pixel_values"][0].shape == (3, 106, 80)
    assert isinstance(encoded["labels"][0]["boxes"], torch.Tensor if kind == "pt" else np.ndarray)
    with pytest.raises(ValueError, match="'tf'"):
        processor(WIDE, return_tensors="tf")


def test_channels_can_come_out_last(processor):
    first = processor([WIDE, TALL], return_tensors="pt")["pixel_values"]
    last = processor([WIDE, TALL], return_tensors="pt", data_format="channels_last")["pixel_values"]
    assert torch.equal(last, first.permute(0, 2, 3, 1))


def test_without_padding_sizes_must_agree_to_be_one_tensor(processor):
    assert "pixel_mask" not in processor([WIDE, WIDE], do_pad=False, return_tensors="pt")
    loose = processor([WIDE, TALL], pad_and_return_pixel_mask=False)["pixel_values"]
    assert [image.shape for image in loose] == [(3, 64, 80), (3, 106, 64)]
    with pytest.raises(ValueError, match="do_pad=True"):
        processor([WIDE, TALL], do_pad=False, return_tensors="pt")


def test_padding_smaller_than_an_image_is_refused(processor):
    with pytest.raises(ValueError, match=r"height 30, width 99.*height 64, width 80"):
        processor(WIDE, pad_size={"height": 30, "width": 99})


def test_exif_orientation_is_an_option(processor, tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(WIDE).save(tmp_path / "turned.png", exif=exif)
    with PIL.Image.open(tmp_path / "turned.png") as image:
        stored = processor(image, return_tensors="pt")["pixel_values"]
        turned = processor(image, exif_orientation=True, return_tensors="pt")["pixel_values"]
    assert torch.equal(stored, processor(WIDE, return_tensors="pt")["pixel_values"])
    upright = np.ascontiguousarray(np.rot90(WIDE, -1))
    assert torch.equal(turned, processor(upright, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 1, 3), (64, 64)), ((1, 10000, 3), (1, 107)), ((10000, 1, 3), (107, 1)), ((7, 9), (64, 82))],
)
def test_images_of_a_pixel_or_a_line(processor, shape, expected):
    encoded = processor(np.zeros(shape, dtype=np.uint8), return_tensors="pt")
    assert encoded["pixel_values"].shape == (1, 3, *expected)


def test_an_unknown_option_is_refused_with_a_suggestion_and_all_of_transformers_are_taken(processor):
    with pytest.raises(TypeError, match=r"'do_resise'.*'do_resize'"):
        processor(WIDE, do_resise=False)
    with pytest.raises(SettingError, match=r"'segmentation_maps'.*options are: .*do_pad"):
        processor(WIDE, segmentation_maps=[WIDE])
    with pytest.raises(SettingError, match=r"'constant_value'.*'constant_values'"):
        processor.pad([torch.zeros(3, 4, 4)], constant_value=1)
    for name in transformers.DetrImageProcessor.valid_kwargs.__annotations__:
        processor(WIDE, **{name: None})
    processor(WIDE, max_size=100, pad_and_return_pixel_mask=True)


# Targets


def test_boxes_are_relative_to_the_unpadded_image(processor):
    annotation = objects([6, 12, 30, 24])
    alone = processor(WIDE, annotation, return_tensors="pt")
    padded = processor([WIDE, TALL], [annotation, objects()], return_tensors="pt")
    assert padded["pixel_values"].shape[-2:] != alone["pixel_values"].shape[-2:]
    torch.testing.assert_close(alone["labels"][0]["boxes"], torch.tensor([[0.35, 0.5, 0.5, 0.5]]))
    assert torch.equal(padded["labels"][0]["boxes"], alone["labels"][0]["boxes"])
    assert padded["labels"][0]["size"].tolist() == [64, 80]
    assert padded["labels"][0]["orig_size"].tolist() == [48, 60]
    assert padded["labels"][1]["boxes"].shape == (0, 4)


def test_boxes_can_stay_corners_in_pixels(processor):
    target = processor(WIDE, objects([6, 12, 30, 24]), do_convert_annotations=False, return_tensors="pt")
    torch.testing.assert_close(target["labels"][0]["boxes"], torch.tensor([[8.0, 16.0, 48.0, 48.0]]))


def test_crowds_do_not_disturb_masks(processor):
    annotation = objects(
        [0, 0, 60, 48], [1, 1, 5, 5], segmentation={"size": [48, 60], "counts": [0, 48, 2832]}
    )
    annotation["annotations"][1]["iscrowd"] = 1
    encoded = processor(
        [WIDE, TALL], [annotation, objects()], return_segmentation_masks=True, return_tensors="pt"
    )
    assert encoded["labels"][0]["masks"].shape == (1, *encoded["pixel_values"].shape[-2:])
    assert encoded["labels"][0]["masks"].sum() == 64 * 2  # one column of 48, now 64 high, 4/3 wide
    assert encoded["labels"][1]["masks"].shape == (0, *encoded["pixel_values"].shape[-2:])


def test_annotations_must_match_the_images(processor):
    with pytest.raises(AnnotationError, match=r"number of images \(2\) and annotations \(1\)"):
        processor([WIDE, TALL], objects())
    with pytest.raises(ValueError, match=r"^Invalid COCO detection annotations.*image_id"):
        processor(WIDE, {"annotations": []})
    with pytest.raises(ValueError, match=r"^_INVALID_FORMAT_ is not a valid AnnotationFormat"):
        DetrImageProcessor(format="_INVALID_FORMAT_")(WIDE, objects())


# Options and files


def test_defaults_are_the_originals():
    processor = DetrImageProcessor()
    assert processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    assert (processor.image_mean, processor.image_std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert all((processor.do_resize, processor.do_rescale, processor.do_normalize, processor.do_pad))
    assert processor.rescale_factor == 1 / 255
    assert processor.resample == 2
    assert processor.format == "coco_detection"
    assert processor.do_convert_annotations
    assert processor.pad_size is None
    assert processor.model_input_names == ["pixel_values", "pixel_mask"]


OLD_FILE = {
    "feature_extractor_type": "DetrFeatureExtractor",
    "format": "coco_detection",
    "do_resize": True,
    "do_normalize": True,
    "size": 600,
    "max_size": 900,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}
NEW_FILE = {
    "image_processor_type": "DetrImageProcessorFast",
    "size": {"shortest_edge": 600, "longest_edge": 900},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_pad": True,
    "pad_and_return_pixel_mask": True,
    "resample": 2,
    "do_convert_annotations": True,
    "crop_size": None,
    "data_format": "channels_first",
    "return_tensors": None,
    "pad_size": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


@pytest.mark.parametrize("contents", [OLD_FILE, NEW_FILE], ids=["old", "new"])
@pytest.mark.parametrize(
    "cls", [DetrImageProcessor, DetrFeatureExtractor, DetrImageProcessorFast, DetrImageProcessorPil]
)
def test_files_of_every_age_load_without_a_warning(tmp_path, cls, contents):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(contents))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = cls.from_pretrained(tmp_path)
    assert processor.size == {"shortest_edge": 600, "longest_edge": 900}
    assert processor.image_mean == [0.5] * 3
    assert processor.do_pad
    assert processor.do_convert_annotations


@pytest.mark.parametrize("cls", [DetrImageProcessor, DetrFeatureExtractor, DetrImageProcessorPil])
def test_a_saved_file_loads_here_and_in_transformers(tmp_path, cls):
    saved = cls(size=600, max_size=900, do_pad=False, image_mean=(0.5, 0.5, 0.5), format="coco_panoptic")
    (path,) = saved.save_pretrained(tmp_path)
    contents = json.loads(Path(path).read_text())
    assert contents["image_processor_type"] == "DetrImageProcessor"
    assert contents["size"] == {"shortest_edge": 600, "longest_edge": 900}
    assert DetrImageProcessor.from_pretrained(tmp_path).to_dict() == saved.to_dict()
    theirs = transformers.DetrImageProcessor.from_pretrained(tmp_path)
    assert dict(theirs.size) == saved.size
    assert theirs.do_pad is False
    assert list(theirs.image_mean) == [0.5, 0.5, 0.5]


def test_options_given_while_loading_take_precedence():
    processor, unused = DetrImageProcessor.from_dict(
        {"size": 18, "max_size": 33, "do_pad": True},
        size=42,
        max_size=84,
        pad_and_return_pixel_mask=False,
        foo=1,
        return_unused_kwargs=True,
    )
    assert processor.size == {"shortest_edge": 42, "longest_edge": 84}
    assert processor.do_pad is False
    assert unused == {"foo": 1}
    assert DetrImageProcessor.from_dict({"size": 18, "max_size": 33}, size=42).size["longest_edge"] == 1333


def test_max_size_alone_limits_the_longer_edge():
    assert DetrImageProcessor(max_size=1000).size == {"shortest_edge": 800, "longest_edge": 1000}


def test_what_else_a_file_holds_is_kept():
    processor = DetrImageProcessor(custom_option="kept", crop_size=None, pad=True)
    assert processor.custom_option == "kept"
    assert processor.to_dict()["custom_option"] == "kept"
    assert callable(processor.pad)


def test_sizes_of_transformers_own_kind_are_understood(processor):
    size = transformers.DetrImageProcessor(size=20).size
    assert DetrImageProcessor(size=size).size == {"shortest_edge": 20, "longest_edge": 1333}


# pad, and reading outputs


@pytest.mark.parametrize("convert", [torch.from_numpy, np.asarray], ids=["torch", "numpy"])
def test_pad_makes_a_batch_of_prepared_images(processor, convert):
    images = [convert(np.full((3, h, w), 7, dtype=np.float32)) for h, w in ((4, 5), (6, 2))]
    batch = processor.pad(images, return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 6, 5)
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.equal(batch["pixel_values"][:, 0] == 7, batch["pixel_mask"] == 1)
    assert batch["pixel_mask"].sum(dim=(1, 2)).tolist() == [20, 12]
    assert batch["pixel_mask"].dtype == torch.int64
    again = processor.pad_and_create_pixel_mask(images, return_tensors="pt")
    assert torch.equal(again["pixel_values"], batch["pixel_values"])
    assert "pixel_mask" not in processor.pad(images, return_pixel_mask=False)


def test_pad_pads_masks_and_leaves_boxes(processor):
    boxes, masks = torch.rand(1, 4), torch.ones(1, 4, 5, dtype=torch.bool)
    images = [torch.zeros(3, 4, 5), torch.zeros(3, 6, 2)]
    batch = processor.pad(images, annotations=[{"boxes": boxes, "masks": masks}, {}], return_tensors="pt")
    assert torch.equal(batch["labels"][0]["boxes"], boxes)
    assert batch["labels"][0]["masks"].shape == (1, 6, 5)
    assert batch["labels"][0]["masks"].sum() == 20
    with pytest.raises(ImageError, match=r"\(4, 5\)"):
        processor.pad([torch.zeros(4, 5)])


def test_outputs_become_detections(processor):
    logits = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 0.0, 5.0], [0.0, 3.0, 0.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5]]]).expand(1, 3, 4)
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)
    (found,) = processor.post_process_object_detection(outputs, threshold=0.5, target_sizes=[(100, 200)])
    assert found["labels"].tolist() == [0, 1]
    assert found["boxes"][0].tolist() == [50, 25, 150, 75]
    (normalised,) = processor.post_process_object_detection({"logits": logits, "pred_boxes": boxes})
    assert normalised["boxes"][0].tolist() == [0.25, 0.25, 0.75, 0.75]
    (everything,) = processor.post_process(outputs, torch.tensor([[100, 200]]))
    assert len(everything["scores"]) == 3
    with pytest.raises(ValueError, match="target_sizes"):
        processor.post_process_object_detection(outputs, target_sizes=[(1, 2), (3, 4)])


# The original's numbers on real images


@pytest.mark.parametrize("case", [pytest.param(case, id=case.image.stem) for case in IMAGES])
def test_real_images_and_targets_equal_the_originals(case):
    golden = case.expected()
    with PIL.Image.open(case.image) as image:
        encoded = DetrImageProcessor()(
            image, case.target(), return_segmentation_masks=True, return_tensors="pt"
        )
    pixels, target = encoded["pixel_values"][0], encoded["labels"][0]
    assert pixels.shape == tuple(golden["shape"])
    np.testing.assert_allclose(pixels[:, ::97, ::89], golden["grid"], atol=1e-6, rtol=0)
    assert pixels.double().mean().item() == pytest.approx(float(golden["mean"]), abs=1e-6)
    assert pixels.double().std().item() == pytest.approx(float(golden["std"]), abs=1e-6)
    for field in ("class_labels", "iscrowd", "orig_size", "size"):
        np.testing.assert_array_equal(target[field], golden[field.removeprefix("class_")])
    for field in ("boxes", "area"):
        np.testing.assert_allclose(target[field], golden[field], atol=1e-4, rtol=1e-7)
    np.testing.assert_array_equal(target["masks"].sum((1, 2)), golden["mask_areas"])


@needs_data
def test_detection_targets_of_transformers_own_example():
    target = {"image_id": 39769, "annotations": json.loads((COCO / "coco_annotations.txt").read_text())}
    with PIL.Image.open(COCO / "000000039769.png") as image:
        encoded = DetrImageProcessor()(images=image, annotations=target, return_tensors="pt")
    assert encoded["pixel_values"].shape == (1, 3, 800, 1066)
    torch.testing.assert_close(
        encoded["pixel_values"][0, 0, 0, :3], torch.tensor([0.2796, 0.3138, 0.3481]), atol=1e-4, rtol=0
    )
    labels = encoded["labels"][0]
    areas = [5887.96, 11250.2061, 489353.8438, 837122.75, 147967.5156, 165732.3438]
    torch.testing.assert_close(labels["area"], torch.tensor(areas))
    torch.testing.assert_close(
        labels["boxes"][0], torch.tensor([0.5503, 0.2765, 0.0604, 0.2215]), atol=1e-4, rtol=0
    )
    assert labels["class_labels"].tolist() == [75, 75, 63, 65, 17, 17]


@needs_data
@pytest.mark.parametrize("annotation_format", ["coco_panoptic", AnnotationFormat.COCO_PANOPTIC])
def test_panoptic_targets_of_transformers_own_example(annotation_format):
    segments = json.loads((COCO / "coco_panoptic_annotations.txt").read_text())
    target = {"file_name": "000000039769.png", "image_id": 39769, "segments_info": segments}
    processor = DetrImageProcessor(format=annotation_format)
    with PIL.Image.open(COCO / "000000039769.png") as image:
        encoded = processor(image, target, masks_path=COCO / "coco_panoptic", return_tensors="pt")
    labels = encoded["labels"][0]
    areas = [147979.6875, 165527.0469, 484638.5938, 11292.9375, 5879.6562, 7634.1147]
    torch.testing.assert_close(labels["area"], torch.tensor(areas))
    torch.testing.assert_close(
        labels["boxes"][0], torch.tensor([0.2625, 0.5437, 0.4688, 0.8625]), atol=1e-4, rtol=0
    )
    assert labels["class_labels"].tolist() == [17, 17, 63, 75, 75, 93]
    # Transformers resizes masks with Pillow, the original with torch.
    assert labels["masks"].sum().item() == pytest.approx(822873, rel=1e-3)
    assert json.loads(processor.to_json_string())["format"] == "coco_panoptic"
