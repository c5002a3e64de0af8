from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import Detections
from detrkit.errors import AnnotationError, MissingExtraError, SettingError
from detrkit.evaluation.charts import save_coco_result
from detrkit.evaluation.coco import (
    STATISTICS,
    CocoEvaluator,
    encode_mask,
    evaluate_results,
    read_ground_truth,
    statistics_table,
)
from tests.golden import COCO_RESULTS


def ground_truth() -> dict:
    """Two images; two large cats and a small one, a medium dog, and a crowd of dogs; ids from 0."""
    boxes = [
        (1, 3, [0, 0, 100, 100], 0),
        (1, 3, [200, 0, 120, 100], 0),
        (2, 3, [10, 10, 20, 20], 0),
        (2, 8, [100, 100, 50, 50], 0),
        (2, 8, [200, 200, 90, 90], 1),
    ]
    annotations = [
        {
            "id": i,
            "image_id": image,
            "category_id": category,
            "bbox": [x, y, w, h],
            "area": w * h,
            "iscrowd": crowd,
            "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        }
        for i, (image, category, (x, y, w, h), crowd) in enumerate(boxes)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 300} for i in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}, {"id": 9, "name": "emu"}],
    }


def result(image: int, category: int, box: list[float], score: float) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def perfect_results() -> list[dict]:
    return [
        result(a["image_id"], a["category_id"], a["bbox"], 0.9)
        for a in ground_truth()["annotations"]
        if not a["iscrowd"]
    ]


def detections(boxes: list[list[float]], labels: list[int], scores: list[float], masks=None) -> Detections:
    return Detections(
        boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        scores=np.array(scores, dtype=np.float32),
        labels=np.array(labels, dtype=np.int64),
        names=[str(label) for label in labels],
        image_size=(300, 400),
        masks=masks,
    )


# The numbers


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_the_twelve_numbers_are_pycocotools(iou_type: str, tmp_path: Path) -> None:
    expected = json.loads((COCO_RESULTS / "expected_stats.json").read_text())
    files = []
    for name in ("instances_val2014_100.json", f"instances_val2014_fake{iou_type}100_results.json"):
        files.append(tmp_path / name)
        files[-1].write_bytes(gzip.decompress((COCO_RESULTS / f"{name}.gz").read_bytes()))
    found = evaluate_results(*files, iou_type)
    assert tuple(expected["order"]) == STATISTICS == tuple(found.stats)
    np.testing.assert_allclose(list(found.stats.values()), expected[iou_type], rtol=0, atol=1e-14)


def test_perfect_detections() -> None:
    found = evaluate_results(ground_truth(), perfect_results())
    assert {name: found.stats[name] for name in STATISTICS[:6]} == dict.fromkeys(STATISTICS[:6], 1.0)
    assert found.stats["AR1"] == pytest.approx((2 / 3 + 1) / 2)  # one of the two cats of the first image
    assert found.stats["AR10"] == found.stats["AR100"] == 1
    assert [(c.id, c.name, c.objects) for c in found.categories] == [
        (3, "cat", 3),
        (8, "dog", 1),
        (9, "emu", 0),
    ]


def test_a_false_detection_between_two_right_ones() -> None:
    truth = ground_truth()
    found = evaluate_results(
        truth,
        [
            result(1, 3, [0, 0, 100, 100], 0.9),
            result(1, 3, [0, 200, 100, 100], 0.8),
            result(1, 3, [200, 0, 120, 100], 0.7),
        ],
        image_ids=[1],
    )
    # 51 of 101 recalls are reached by one right detection, the others by two of three.
    assert found.stats["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.stats["AP50"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert found.categories[0].stats == found.stats
    assert found.stats["APsmall"] == -1
    assert found.categories[1].stats == dict.fromkeys(STATISTICS, -1.0)
    np.testing.assert_allclose(found.scores[0, [0, 50, 51, 100], 0], [0.9, 0.9, 0.7, 0.7])
    np.testing.assert_allclose(found.mean_precision()[9], found.precision[9, :, 0])


def test_the_numbers_of_a_category_average_to_those_of_all() -> None:
    results = [*perfect_results()[1:], result(2, 8, [0, 0, 50, 50], 0.95), result(2, 3, [0, 0, 50, 50], 0.5)]
    found = evaluate_results(ground_truth(), results)
    assert 0 < found.stats["AP"] < 1
    for name in STATISTICS:
        known = [c.stats[name] for c in found.categories if c.stats[name] > -1]
        assert np.mean(known) == pytest.approx(found.stats[name], abs=1e-12)


def test_no_detections() -> None:
    found = evaluate_results(ground_truth(), [])
    assert found.stats["AP"] == 0
    assert found.confusion.counts.tolist() == [[0, 0, 0, 3], [0, 0, 0, 1], [0] * 4, [0] * 4]


def test_ground_truth_may_lack_what_can_be_derived() -> None:
    truth = ground_truth()
    for annotation in truth["annotations"]:
        del annotation["area"], annotation["segmentation"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    found = evaluate_results(truth, perfect_results())
    assert found.stats == evaluate_results(ground_truth(), perfect_results()).stats
    assert truth["annotations"][0].keys() == {"id", "image_id", "category_id", "bbox"}  # left as it was


def test_tables_show_percent_and_a_dash_for_nothing() -> None:
    found = evaluate_results(ground_truth(), perfect_results(), image_ids=[1])
    columns = [list(map(str, column.cells)) for column in statistics_table(found).columns]
    assert columns[0] == list(STATISTICS)
    assert columns[1][:6] == ["100.0", "100.0", "100.0", "-", "-", "100.0"]
    assert found.category_table().row_count == 1


# The confusion matrix


def test_the_confusion_matrix() -> None:
    found = evaluate_results(
        ground_truth(),
        [
            result(1, 8, [0, 0, 100, 90], 0.9),  # a cat taken for a dog
            result(1, 3, [0, 0, 100, 100], 0.8),  # the same cat again: it is taken, so nothing is there
            result(1, 3, [200, 0, 120, 100], 0.7),
            result(2, 8, [200, 200, 40, 40], 0.9),  # in the crowd
            result(2, 9, [300, 0, 40, 40], 0.6),  # nothing there
            result(2, 8, [100, 100, 50, 50], 0.4),  # below the threshold
        ],
    )
    assert found.confusion.names == ("cat", "dog", "emu", "(background)")
    assert found.confusion.counts.tolist() == [[1, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]


# Image by image


def test_detections_are_collected_image_by_image() -> None:
    evaluator = CocoEvaluator(ground_truth(), {0: "dog", 1: "cat", 2: "emu", 3: "unknown"})
    evaluator.add(
        1, detections([[0, 0, 100, 100], [200, 0, 320, 100], [0, 0, 9, 9]], [1, 1, 3], [0.9, 0.8, 0.7])
    )
    assert evaluator.results["bbox"] == [
        {"image_id": 1, "category_id": 3, "score": 0.9, "bbox": [0, 0, 100, 100]},
        {"image_id": 1, "category_id": 3, "score": 0.8, "bbox": [200, 0, 120, 100]},
    ]
    assert evaluator.result().stats["AP"] == 1  # only the images so far count
    evaluator.add(2, detections([], [], []))
    assert evaluator.result().categories[0].stats["AP"] == pytest.approx(67 / 101)  # recalls up to two thirds
    assert evaluator.result().categories[1].stats["AP"] == 0


def test_without_names_the_class_ids_are_category_ids() -> None:
    evaluator = CocoEvaluator(ground_truth())
    evaluator.add(2, detections([[100, 100, 150, 150]], [8], [0.9]))
    assert evaluator.result().categories[1].stats["AP"] == 1


def test_masks_become_run_lengths() -> None:
    masks = np.zeros((2, 300, 400), dtype=bool)
    masks[0, :100, :100] = True
    masks[1, :100, 200:320] = True
    evaluator = CocoEvaluator(ground_truth())
    evaluator.add(1, detections([[0, 0, 5, 5], [200, 0, 205, 5]], [3, 3], [0.9, 0.8], masks))
    assert json.loads(json.dumps(evaluator.results)) == evaluator.results
    assert evaluator.result("segm").stats["AP"] == 1
    assert evaluator.result("segm").stats["APlarge"] == 1
    assert evaluator.result("bbox").stats["AP"] == 0
    np.fill_diagonal(masks[0, 50:], True)
    from detrkit.processing.coco_masks import decode_run_lengths

    rle = encode_mask(masks[0])
    assert rle["size"] == [300, 400]
    np.testing.assert_array_equal(decode_run_lengths(rle["counts"], 300, 400), masks[0])


def test_an_image_of_another_size_is_refused() -> None:
    truth = ground_truth()
    truth["images"][0].update(width=300, height=400)
    with pytest.raises(
        AnnotationError, match=r"image 1 \(1\.jpg\) has 400x300 pixels, but 300x400 in the annot"
    ):
        CocoEvaluator(truth).add(1, detections([], [], []))
    with pytest.raises(AnnotationError, match="no image 77"):
        CocoEvaluator(truth).add(77, detections([], [], []))


# Charts


def test_curves_and_matrix_are_written(tmp_path: Path) -> None:
    found = evaluate_results(ground_truth(), perfect_results())
    files = save_coco_result(found, tmp_path / "new")
    assert sorted(path.name for path in files) == [
        "boxes_confusion_matrix.csv",
        "boxes_confusion_matrix.png",
        "boxes_per_class.csv",
        "boxes_precision_recall.csv",
        "boxes_precision_recall.png",
    ]
    tables = {
        path.stem: list(csv.reader(path.open(encoding="utf-8"))) for path in files if path.suffix == ".csv"
    }
    assert tables["boxes_confusion_matrix"][1] == ["cat", "3", "0", "0", "0"]
    assert tables["boxes_per_class"][0] == ["id", "category", "objects", *STATISTICS]
    assert tables["boxes_per_class"][2][:4] == ["8", "dog", "1", "1.0"]
    curves = tables["boxes_precision_recall"]
    assert curves[0] == ["category", "iou", "recall", "precision", "score"]
    assert len(curves) == 1 + 3 * 101 + 2 * 2 * 101
    assert curves[-1] == ["dog", "0.75", "1.0", "1.0", "0.9"]
    for path in files:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert min(picture.size) > 300
                assert len(picture.convert("RGB").getcolors(1_000_000)) > 10


def test_crowds_alone_are_nothing_to_evaluate() -> None:
    truth = ground_truth()
    truth["annotations"] = [a for a in truth["annotations"] if a["iscrowd"]]
    with pytest.raises(AnnotationError, match="all 1 objects are crowds"):
        evaluate_results(truth, [])


# Mistakes


def without(key: str, change) -> dict:
    document = ground_truth()
    change(document[key])
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (without("annotations", list.clear), "no usable object is left"),
        (without("images", list.clear), "no usable image is left"),
        (
            {"images": [{"id": 1}], "annotations": [{}]},
            "no usable object is left. entry .*annotation without id has no image_id",
        ),
        (
            without("annotations", lambda a: a[0].update(image_id=5)),
            "an image that is not listed: 1 .*annotation 0, image 5",
        ),
        (
            without("annotations", lambda a: a[0].update(category_id=5)),
            "a category that is not listed: 1 .*annotation 0, category 5",
        ),
        (without("images", lambda i: i[0].update(id="x")), "not listed: 2 dropped"),
        (
            without("images", lambda i: i.append({"id": 1, "file_name": "other.jpg"})),
            r"image id used more than once: 2 .*1 \(1.jpg\)",
        ),
    ],
)
def test_ground_truth_that_cannot_be_used(document: dict, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_ground_truth({"categories": [{"id": 3}, {"id": 8}], **document})


@pytest.mark.parametrize(
    ("results", "message"),
    [
        (
            [result(5, 3, [0, 0, 1, 1], 0.5)],
            "detection 0 of the document refers to image 5, which is not in the ground truth",
        ),
        (
            [{"image_id": 1, "category_id": 3, "bbox": [0, 0, 1, 1]}],
            "detection 0 of the document has no 'score'",
        ),
        ({"results": []}, "must contain a list of detections"),
        (["boxes"], "must contain a list of detections"),
    ],
)
def test_results_that_cannot_be_used(results, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        evaluate_results(ground_truth(), results)


def test_images_to_compare_must_be_in_the_ground_truth() -> None:
    with pytest.raises(AnnotationError, match="no image 7"):
        evaluate_results(ground_truth(), perfect_results(), image_ids=[1, 9, 7])


def test_masks_need_segmentations() -> None:
    truth = ground_truth()
    del truth["annotations"][1]["segmentation"]
    with pytest.raises(AnnotationError, match="has annotations without a segmentation"):
        evaluate_results(truth, [], "segm")
    truth = ground_truth()
    del truth["images"][1]["height"]
    with pytest.raises(AnnotationError, match=r"image 2 of the ground truth.* has no 'height'"):
        evaluate_results(truth, [], "segm")
    with pytest.raises(SettingError, match="unknown iou_type 'keypoints'"):
        evaluate_results(truth, [], "keypoints")


@pytest.mark.parametrize("package", ["faster_coco_eval", "matplotlib"])
def test_missing_packages_name_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = evaluate_results(ground_truth(), perfect_results())
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    needing = {
        "faster_coco_eval": lambda: evaluate_results(ground_truth(), perfect_results()),
        "matplotlib": lambda: save_coco_result(found, tmp_path),
    }
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[coco\]'"):
        needing[package]()
