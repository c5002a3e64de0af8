import json

import pytest

from detrkit.conversion.labels import COCO_CLASSES, COCO_PANOPTIC_CLASSES, label_names
from tests.golden import IMAGES, PANOPTIC


def test_detection_names_are_indexed_by_raw_category_id():
    assert len(COCO_CLASSES) == 91
    assert (COCO_CLASSES[0], COCO_CLASSES[1], COCO_CLASSES[17], COCO_CLASSES[90]) == (
        "N/A",
        "person",
        "cat",
        "toothbrush",
    )
    assert [i for i, name in enumerate(COCO_CLASSES) if name == "N/A"] == [
        0,
        12,
        26,
        29,
        30,
        45,
        66,
        68,
        69,
        71,
        83,
    ]
    assert len(set(COCO_CLASSES)) == 81


def test_panoptic_names_cover_things_and_stuff():
    assert len(COCO_PANOPTIC_CLASSES) == 250
    assert (COCO_PANOPTIC_CLASSES[17], COCO_PANOPTIC_CLASSES[200]) == ("cat", "rug-merged")
    assert (COCO_PANOPTIC_CLASSES[0], COCO_PANOPTIC_CLASSES[249]) == ("LABEL_0", "LABEL_249")
    assert sum(not name.startswith("LABEL_") for name in COCO_PANOPTIC_CLASSES) == 133
    assert len(set(COCO_PANOPTIC_CLASSES)) == 250


def test_detection_names_are_those_of_the_annotation_files():
    document = json.loads(IMAGES[0].document.read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    assert {i: name for i, name in enumerate(COCO_CLASSES) if name != "N/A"} == names


def test_panoptic_names_are_those_of_the_annotation_files():
    document = json.loads((PANOPTIC / "panoptic_val2017.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    assert {i: name for i, name in enumerate(COCO_PANOPTIC_CLASSES) if name != f"LABEL_{i}"} == names


@pytest.mark.parametrize(
    ("num_labels", "task", "expected"),
    [
        (91, "detection", COCO_CLASSES),
        (250, "panoptic", COCO_PANOPTIC_CLASSES),
        (2, "detection", ("LABEL_0", "LABEL_1")),
    ],
)
def test_a_head_of_cocos_size_gets_cocos_names(num_labels, task, expected):
    assert label_names(num_labels, task) == expected


def test_coco_names_are_not_given_for_the_size_of_the_other_task():
    assert label_names(91, "panoptic")[1] == "LABEL_1"
    assert label_names(250, "detection")[1] == "LABEL_1"
