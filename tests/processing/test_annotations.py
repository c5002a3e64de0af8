import json
import sys
import types

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from detrkit.errors import AnnotationError, MissingExtraError
from detrkit.processing.annotations import (
    boxes_of_masks,
    check_annotations,
    normalize_boxes,
    pad_masks,
    prepare_detection,
    prepare_panoptic,
    resize_target,
)
from detrkit.processing.coco_masks import decode_run_lengths, decode_segmentations
from tests.golden import DATA, IMAGES, needs_data


def entry(bbox, category=1, **values):
    return {"bbox": bbox, "category_id": category, "area": 7.0, "iscrowd": 0, **values}


def detection(*entries, image_id=5):
    return {"image_id": image_id, "annotations": list(entries)}


def test_boxes_become_corners_clipped_to_the_image():
    target = prepare_detection(detection(entry([-3, 2, 10, 50], 8)), 20, 30)
    assert target["boxes"].tolist() == [[0, 2, 7, 20]]
    assert target["class_labels"].tolist() == [8]
    assert target["image_id"].tolist() == [5]
    assert target["orig_size"].tolist() == target["size"].tolist() == [20, 30]


def test_crowds_and_boxes_without_area_are_left_out():
    entries = [
        entry([1, 1, 2, 2], 1),
        entry([1, 1, 2, 2], 2, iscrowd=1),
        entry([1, 1, 0, 2], 3),
        entry([40, 1, 5, 5], 4),
        entry([1, 1, 3, 3], 5),
    ]
    target = prepare_detection(detection(*entries), 20, 30)
    assert target["class_labels"].tolist() == [1, 5]
    assert target["iscrowd"].tolist() == [0, 0]
    assert len(target["area"]) == len(target["boxes"]) == 2


def test_an_image_can_have_no_objects():
    target = resize_target(prepare_detection(detection(), 20, 30, return_masks=True), 40, 60)
    assert normalize_boxes(target)["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 40, 60)
    assert target["class_labels"].dtype == torch.int64


def test_a_missing_area_is_that_of_the_box():
    annotation = {"bbox": [1, 1, 4, 5], "category_id": 1}
    assert prepare_detection(detection(annotation), 20, 30)["area"].tolist() == [20]


def test_keypoints_of_kept_objects_are_kept():
    entries = [entry([1, 1, 2, 2], keypoints=[1, 2, 2, 3, 4, 1]), entry([1, 1, 0, 0], keypoints=[0] * 6)]
    assert prepare_detection(detection(*entries), 9, 9)["keypoints"].tolist() == [[1, 2, 2], [3, 4, 1]]


@given(
    st.tuples(st.integers(2, 600), st.integers(2, 600)),
    st.tuples(st.integers(1, 1333), st.integers(1, 1333)),
    st.tuples(*[st.floats(0, 0.45)] * 2, *[st.floats(0.05, 0.5)] * 2),
)
def test_normalised_boxes_do_not_depend_on_the_resized_size(old, new, box):
    x, y, width, height = (v * side for v, side in zip(box, (old[1], old[0]) * 2))
    target = prepare_detection(detection(entry([x, y, width, height])), *old)
    (normalised,) = normalize_boxes(resize_target(target, *new))["boxes"].tolist()
    expected = box[0] + box[2] / 2, box[1] + box[3] / 2, box[2], box[3]
    assert normalised == pytest.approx(expected, abs=2e-6)


def test_areas_and_masks_are_resized():
    target = prepare_detection(
        detection(entry([0, 0, 2, 2], segmentation={"size": [2, 4], "counts": [0, 2, 6]})),
        2,
        4,
        return_masks=True,
    )
    resized = resize_target(target, 4, 12)
    assert resized["area"].tolist() == [7 * 2 * 3]
    expected = torch.zeros(4, 12, dtype=torch.bool)
    expected[:, :3] = True
    assert torch.equal(resized["masks"][0], expected)
    padded = pad_masks(resized, 5, 14)
    assert padded["masks"].shape == (1, 5, 14)
    assert padded["masks"].sum() == expected.sum()


def test_masks_are_resized_as_in_the_original():
    masks = torch.rand(3, 37, 53) > 0.5
    target = {**prepare_detection(detection(), 37, 53), "masks": masks}
    expected = (
        torch.nn.functional.interpolate(masks[:, None].float(), size=(61, 88), mode="nearest")[:, 0] > 0.5
    )
    assert torch.equal(resize_target(target, 61, 88)["masks"], expected)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"category_id": 1}, "bbox"),
        ({"bbox": [1, 2, 3, 4]}, "category_id"),
        (entry([1, 2, 3]), "bbox"),
        (entry([1, 2, 3, float("nan")]), "finite"),
        (entry([1, 2, float("inf"), 3]), "finite"),
        (entry(None), "bbox"),
        (entry([1, 2, 3, 4], "cat"), "category_id"),
        (entry([1, 2, 3, 4], area="large"), "area"),
    ],
)
def test_broken_annotations_name_the_image_and_the_key(broken, reason):
    with pytest.raises(AnnotationError, match=rf"image 77.*{reason}"):
        prepare_detection(detection(broken, image_id=77), 9, 9)


@pytest.mark.parametrize(
    ("annotation_format", "annotation", "reason"),
    [
        ("coco_detection", {"annotations": []}, "image_id"),
        ("coco_detection", {"image_id": 1, "annotations": {}}, "list"),
        ("coco_detection", {"image_id": 1, "annotations": [3]}, "dictionaries"),
        ("coco_detection", [entry([1, 2, 3, 4])], "list"),
        ("coco_panoptic", {"image_id": 1, "segments_info": []}, "file_name"),
        ("coco_panopticon", {}, "is not a valid AnnotationFormat"),
    ],
)
def test_annotations_that_are_not_of_their_format_are_refused(annotation_format, annotation, reason):
    with pytest.raises(AnnotationError, match=reason):
        check_annotations([annotation], annotation_format)


def compress(runs):
    """COCO's string for run lengths, written from its description."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            group, value = value & 31, value >> 5
            more = value != (-1 if group & 16 else 0)
            text += chr(48 + group + 32 * more)
            if not more:
                break
    return text


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
def test_compressed_run_lengths_equal_plain_ones(runs):
    total = sum(runs)
    if total:
        np.testing.assert_array_equal(
            decode_run_lengths(compress(runs), total, 1), decode_run_lengths(runs, total, 1)
        )


def test_run_lengths_go_down_the_columns():
    assert decode_run_lengths([1, 2, 3], 2, 3).tolist() == [[False, True, False], [True, False, False]]


def test_a_compressed_mask_worked_out_by_hand():
    # 20 = 0b10100: the low group 20 has bit 4 set, so a second group 0 follows: chr(48 + 20 + 32), chr(48).
    assert decode_run_lengths("d05", 25, 1).ravel().tolist() == [False] * 20 + [True] * 5


@pytest.mark.parametrize("counts", [[3, 3], [-1, 10], "1"])
def test_run_lengths_that_do_not_fill_the_mask_are_refused(counts):
    with pytest.raises(AnnotationError, match=r"image 9.*run lengths"):
        decode_segmentations([{"size": [3, 3], "counts": counts}], 3, 3, 9)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(AnnotationError, match=r"image 9.*2x3"):
        decode_segmentations([{"size": [3, 2], "counts": [6]}], 3, 3, 9)


def test_polygons_need_the_coco_extra(monkeypatch):
    for name in ("pycocotools", "faster_coco_eval", "faster_coco_eval.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"'\.\[coco\]'"):
        decode_segmentations([[[0, 0, 2, 0, 2, 2]]], 3, 3, 9)


def test_polygons_are_drawn_by_the_coco_package_and_united(monkeypatch):
    drawn = np.zeros((3, 4, 2), dtype=np.uint8)
    drawn[0, 1, 0] = drawn[2, 3, 1] = 1
    calls = []
    mask = types.SimpleNamespace(frPyObjects=lambda *a: calls.append(a) or "rles", decode=lambda rles: drawn)
    monkeypatch.setitem(sys.modules, "pycocotools", types.SimpleNamespace(mask=mask))
    (decoded,) = decode_segmentations([[[0, 0, 2, 0, 2, 2], [1, 1, 3, 1, 3, 3]]], 3, 4, 9)
    assert calls == [([[0, 0, 2, 0, 2, 2], [1, 1, 3, 1, 3, 3]], 3, 4)]
    assert np.argwhere(decoded).tolist() == [[0, 1], [2, 3]]


def panoptic_case(folder):
    ids = np.zeros((4, 6), dtype=np.int64)
    ids[1:3, 2:5] = 70_000
    ids[3, 5] = 300
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    PIL.Image.fromarray(colours).save(folder / "segments.png")
    segments = [
        {"id": 70_000, "category_id": 9, "area": 6, "iscrowd": 0},
        {"id": 300, "category_id": 3, "area": 1, "iscrowd": 1},
    ]
    return {"image_id": 12, "file_name": "segments.png", "segments_info": segments}, ids


def test_panoptic_segments_become_objects(tmp_path):
    annotation, ids = panoptic_case(tmp_path)
    target = prepare_panoptic(annotation, 4, 6, masks_path=tmp_path)
    assert target["class_labels"].tolist() == [9, 3]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["area"].tolist() == [6, 1]
    assert target["boxes"].tolist() == [[2, 1, 4, 2], [5, 3, 5, 3]]
    assert torch.equal(target["masks"][0], torch.from_numpy(ids == 70_000))
    assert "masks" not in prepare_panoptic(annotation, 4, 6, masks_path=str(tmp_path), return_masks=False)


def test_panoptic_files_that_do_not_fit_are_named(tmp_path):
    annotation, _ = panoptic_case(tmp_path)
    with pytest.raises(AnnotationError, match=r"segments\.png has 6x4 pixels, its image 7x4"):
        prepare_panoptic(annotation, 4, 7, masks_path=tmp_path)
    with pytest.raises(AnnotationError, match=r"image 12.*masks_path"):
        prepare_panoptic(annotation, 4, 6, masks_path=None)
    with pytest.raises(AnnotationError, match=r"image 12.*none\.png.*no such file"):
        prepare_panoptic({**annotation, "file_name": "none.png"}, 4, 6, masks_path=tmp_path)


def test_boxes_around_empty_masks_are_zero():
    masks = torch.zeros(2, 5, 6, dtype=torch.bool)
    masks[1, 2, 3:5] = True
    assert boxes_of_masks(masks).tolist() == [[0, 0, 0, 0], [3, 2, 4, 2]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize("size", [(0, 6), (5, 0), (0, 0)])
def test_boxes_around_masks_without_area_are_zero(size):
    assert boxes_of_masks(torch.zeros(2, *size, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]] * 2


def test_run_lengths_of_real_crowds_fill_their_boxes():
    crowds = [a for case in IMAGES for a in case.target()["annotations"] if a["iscrowd"]]
    assert crowds
    for crowd in crowds:
        segmentation = crowd["segmentation"]
        decoded = torch.from_numpy(decode_run_lengths(segmentation["counts"], *segmentation["size"]))
        x0, y0, x1, y1 = boxes_of_masks(decoded[None])[0].tolist()
        assert [x0, y0, x1 + 1 - x0, y1 + 1 - y0] == pytest.approx(crowd["bbox"], abs=1.01)


@needs_data
def test_compressed_masks_of_real_objects_have_the_stated_area():
    folder = DATA / "panopticapi_sample"
    files = [f for f in folder.rglob("*.json") if "detection" in f.name.lower()]
    annotations = json.loads(files[0].read_text())["annotations"]
    compressed = [a for a in annotations if isinstance(a["segmentation"].get("counts"), str)]
    assert compressed
    for annotation in compressed:
        segmentation = annotation["segmentation"]
        decoded = decode_run_lengths(segmentation["counts"], *segmentation["size"])
        assert decoded.sum() == annotation["area"]
