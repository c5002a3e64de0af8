import json

import pytest
import torch

from detrkit import DetrImageProcessor
from detrkit.conversion.labels import COCO_CLASSES
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.errors import AnnotationError
from tests.data.synthetic import make_document, make_images, make_panoptic, write_dataset
from tests.golden import DATA, needs_data


def test_labels_count_the_categories_in_the_order_of_their_ids(tmp_path):
    dataset = write_dataset(tmp_path)
    assert dataset.id2label == {0: "cat", 1: "dog", 2: "brush"}
    assert dataset.label2id == {"cat": 0, "dog": 1, "brush": 2}
    assert dataset.category_to_label == {2: 0, 7: 1, 90: 2}
    assert dataset.num_labels == 3
    assert dataset[0][1]["class_labels"].tolist() == [1, 2]


def test_a_model_keeps_its_class_ids(tmp_path):
    dataset = write_dataset(tmp_path)
    labels = dataset.labels_in({0: "N/A", 3: "Cat", 4: "N/A", 5: "brush", 6: "dog"})
    assert labels == {"cat": 3, "dog": 6, "brush": 5}
    relabelled = dataset.with_labels(labels)
    assert relabelled[0][1]["class_labels"].tolist() == [6, 5]
    assert relabelled.num_labels == 7
    assert relabelled.id2label[3] == "cat"
    assert relabelled.id2label[4] == "N/A"
    assert len(relabelled.id2label) == 7
    assert dataset.with_labels(None)[0][1]["class_labels"].tolist() == [1, 2]


def test_class_ids_may_be_given_by_category_id(tmp_path):
    dataset = write_dataset(tmp_path, labels={2: 2, 7: 7, 90: 90})
    assert dataset[0][1]["class_labels"].tolist() == [7, 90]


def test_a_model_that_lacks_a_category_needs_new_classes(tmp_path):
    dataset = write_dataset(tmp_path)
    assert dataset.labels_in({0: "cat", 1: "dog"}) is None
    with pytest.raises(AnnotationError, match=r"brush among its 3 categories .*did you mean 'brushes'"):
        _ = dataset.with_labels({"cat": 0, "dog": 1, "brushes": 2}).id2label


def test_two_categories_never_share_a_class_of_a_model(tmp_path):
    document = make_document()
    for category, name in zip(document["categories"], ("cat", "Cat", "dog")):
        category["name"] = name
    dataset = write_dataset(tmp_path, document)
    assert dataset.labels_in({0: "cat", 1: "dog"}) is None
    assert dataset.labels_in({0: "Cat", 1: "cat", 2: "dog"}) == {"Cat": 0, "cat": 1, "dog": 2}


def test_a_validation_file_with_fewer_categories_takes_the_labels_of_training(tmp_path):
    document = make_document()
    document["categories"] = document["categories"][::2]  # dog and brush
    document["annotations"] = document["annotations"][:2]
    validation = write_dataset(tmp_path, document).with_labels({"cat": 0, "dog": 1, "brush": 2})
    assert validation[0][1]["class_labels"].tolist() == [1, 2]
    assert validation.num_labels == 3


def test_targets_are_those_of_the_image_processor(tmp_path):
    dataset = write_dataset(tmp_path, labels={2: 2, 7: 7, 90: 90}, return_masks=True)
    document, processor = make_document(), DetrImageProcessor(do_resize=False, do_convert_annotations=False)
    for index in range(3):
        image, target = dataset[index]
        entries = [a for a in document["annotations"] if a["image_id"] == index + 1]
        expected = processor(
            image,
            {"image_id": index + 1, "annotations": entries},
            return_segmentation_masks=True,
            return_tensors="pt",
        )["labels"][0]
        assert target.keys() == expected.keys()
        for key, value in target.items():
            assert torch.equal(value, expected[key]), key


def test_crowds_are_no_targets_but_stay_for_evaluation(tmp_path):
    dataset = write_dataset(tmp_path)
    assert dataset[1][1]["class_labels"].tolist() == [0]
    assert [a["id"] for a in dataset.document["annotations"] if a["iscrowd"]] == [4]


def test_segmentations_are_only_kept_where_masks_are_wanted(tmp_path):
    dataset = check_dataset(write_dataset(tmp_path)).dataset
    assert "masks" not in dataset[0][1]
    assert not any("segmentation" in a for a in dataset.document["annotations"])
    masks = write_dataset(tmp_path, return_masks=True)[0][1]["masks"]
    assert masks.shape == (2, 40, 60)
    assert masks.sum((1, 2)).tolist() == [400, 100]


def test_an_image_without_annotations_has_an_empty_target(tmp_path):
    _, target = write_dataset(tmp_path, return_masks=True)[2]
    assert target["boxes"].shape == (0, 4)
    assert target["masks"].shape == (0, 40, 60)


def test_panoptic_segments_are_targets(tmp_path):
    document = make_panoptic(tmp_path)
    dataset = write_dataset(tmp_path, document, panoptic_dir=tmp_path / "png", return_masks=True)
    image, target = dataset[1]
    assert image.size == (40, 60)
    assert target["class_labels"].tolist() == [2, 0]
    assert target["boxes"].tolist() == [[3, 2, 22, 11], [5, 20, 9, 29]]
    assert target["iscrowd"].tolist() == [0, 1]
    assert target["masks"].sum((1, 2)).tolist() == [200, 50]
    assert dataset.is_thing == {1: False, 0: True, 2: True}
    boxes_only = write_dataset(tmp_path, document, panoptic_dir=tmp_path / "png")[1][1]
    assert "masks" not in boxes_only
    assert torch.equal(boxes_only["boxes"], target["boxes"])


def test_panoptic_segments_without_a_pixel_are_left_out(tmp_path):
    document = make_panoptic(tmp_path)
    ghost = {"id": 5, "category_id": 7, "area": 3}
    document["annotations"][0]["segments_info"].insert(0, ghost)
    dataset = write_dataset(tmp_path, document, panoptic_dir=tmp_path / "png", return_masks=True)
    assert dataset[0][1]["class_labels"].tolist() == [2, 0]
    assert len(dataset[0][1]["masks"]) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"images": [', r"broken\.json is not a JSON file"),
        ("\x80", r"broken\.json is not a JSON file"),
        ("[1, 2]", "is not a COCO document: it contains a list"),
        ('{"images": [], "annotations": []}', "has no list of categories"),
        ('{"images": {}, "licenses": []}', "has no list of images and annotations and categories"),
    ],
)
def test_a_file_that_is_not_coco_is_refused_in_one_line(tmp_path, content, reason):
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(AnnotationError, match=reason) as caught:
        DetectionDataset.from_coco(tmp_path, path)
    assert "\n" not in str(caught.value)
    assert "broken.json" in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(AnnotationError, match=r"none\.json"):
        DetectionDataset.from_coco(tmp_path, tmp_path / "none.json")
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(make_document()))
    with pytest.raises(AnnotationError, match=r"nowhere: folder of images not found"):
        DetectionDataset.from_coco(tmp_path / "nowhere", path)


def test_panoptic_files_and_folders_belong_together(tmp_path):
    document = make_panoptic(tmp_path)
    with pytest.raises(AnnotationError, match="pass the folder of their PNG files"):
        write_dataset(tmp_path, document)
    with pytest.raises(AnnotationError, match="no panoptic annotations"):
        write_dataset(tmp_path, panoptic_dir=tmp_path / "png")


def test_names_and_ids_of_categories_must_differ(tmp_path):
    document = make_document()
    document["categories"][2]["name"] = "cat"
    with pytest.raises(AnnotationError, match=r"category 90 \(cat\) has the id or name of another category"):
        _ = write_dataset(tmp_path, document).id2label
    del document["categories"][2]["name"]
    with pytest.raises(AnnotationError, match=r"must have an id .* and a name"):
        _ = write_dataset(tmp_path, document).id2label


def test_images_can_be_turned_upright(tmp_path):
    folder = make_images(tmp_path / "images")
    from PIL import Image

    with Image.open(folder / "a.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / "a.jpg", exif=exif)
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(make_document()))
    upright = DetectionDataset.from_coco(folder, path, exif_orientation=True)
    assert upright[0][0].size == (40, 60)
    assert DetectionDataset.from_coco(folder, path)[0][0].size == (60, 40)


@needs_data
def test_coco_has_80_gapped_categories_that_its_checkpoints_know():
    folder = DATA / "coco_tiny"
    dataset = DetectionDataset.from_coco(
        folder / "val2017", folder / "annotations" / "instances_val2017.json", return_masks=True
    )
    assert dataset.num_labels == 80
    assert dataset.id2label[79] == "toothbrush"
    labels = dataset.labels_in(dict(enumerate(COCO_CLASSES)))
    assert dataset.with_labels(labels).category_to_label == {c: c for c in dataset.category_names}
    report = check_dataset(dataset)
    assert (report.images, report.objects, report.problems) == (80, 815, ())
    for index in range(0, 80, 9):
        image, target = dataset[index]
        assert target["masks"].shape[1:] == (image.height, image.width)
        inside = target["masks"].flatten(1).sum(1)
        # Polygons are drawn on whole pixels, so the areas agree but for the outline.
        outline = 2 * (target["boxes"][:, 2:] - target["boxes"][:, :2]).sum(1) + 8
        assert ((inside - target["area"]).abs() <= outline).all()


@needs_data
@pytest.mark.parametrize(("split", "images"), [("train2017", 34), ("val2017", 20)])
def test_panoptic_coco_is_read(split, images):
    folder = DATA / "coco_panoptic"
    report = check_dataset(
        DetectionDataset.from_coco(
            folder / split,
            folder / "annotations" / f"panoptic_{split}.json",
            panoptic_dir=folder / "annotations" / f"panoptic_{split}",
            return_masks=True,
        )
    )
    assert (report.images, report.problems) == (images, ())
    assert report.dataset.num_labels == 133
    assert sum(report.dataset.is_thing.values()) == 80
    for index in range(0, images, 5):
        _, target = report.dataset[index]
        assert target["masks"].flatten(1).sum(1).tolist() == target["area"].tolist()
