from collections import Counter

import pytest

from detrkit import DetrImageProcessor
from detrkit.data.coco import DetectionDataset
from detrkit.data.loading import PreparedDataset
from detrkit.data.splitting import repeated_images, split_dataset
from detrkit.errors import AnnotationError
from tests.data.synthetic import write_dataset

PROCESSOR = DetrImageProcessor(size={"shortest_edge": 40, "longest_edge": 80})


def make(images, objects, name="{}.jpg"):
    """A data set without files; ``objects(image_id)`` gives the categories of an image."""
    document = {
        "images": [{"id": i, "file_name": name.format(i), "height": 9, "width": 9} for i in range(images)],
        "annotations": [
            {"id": 100 * i + k, "image_id": i, "category_id": c, "bbox": [0, 0, 1, 1], "iscrowd": 0}
            for i in range(images)
            for k, c in enumerate(objects(i))
        ],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(4)],
    }
    return DetectionDataset(document, None, "set", checked=True)


def counts(dataset):
    return Counter(entry["category_id"] for entry in dataset.document["annotations"])


def test_classes_keep_their_share(tmp_path):
    dataset = make(200, lambda i: [0] * 3 + [1] * (i % 10 == 0) + [2] * (i % 2))
    train, val = split_dataset(dataset, 0.2)
    assert (len(train), len(val)) == (160, 40)
    assert counts(val) == {0: 120, 1: 4, 2: 20}
    ids = [{image["id"] for image in part.document["images"]} for part in (train, val)]
    assert not ids[0] & ids[1]
    assert {entry["image_id"] for entry in val.document["annotations"]} == ids[1]


def test_a_split_depends_on_the_seed_only():
    dataset = make(50, lambda i: [i % 3])
    shuffled = make(50, lambda i: [i % 3])
    shuffled.document["images"].reverse()
    names = [
        {image["file_name"] for image in split_dataset(data, 0.3, seed=seed)[1].document["images"]}
        for data, seed in ((dataset, 1), (shuffled, 1), (dataset, 2))
    ]
    assert names[0] == names[1] != names[2]


def test_a_class_of_one_image_is_trained_on():
    train, val = split_dataset(make(20, lambda i: [1] if i == 7 else [0]), 0.2)
    assert (counts(train)[1], counts(val)[1]) == (1, 0)


def test_copies_of_one_image_stay_together():
    dataset = make(40, lambda i: [0])
    for image in dataset.document["images"]:
        image["file_name"] = f"{image['id'] // 4}_jpg.rf.{image['id']}.jpg"
    parts = split_dataset(dataset, 0.25)
    train, val = ({image["id"] // 4 for image in part.document["images"]} for part in parts)
    assert not train & val
    assert 2 <= len(val) <= 3


def test_too_few_images_are_refused():
    with pytest.raises(AnnotationError, match="1 images are too few"):
        split_dataset(make(1, lambda i: [0]), 0.2)


def test_images_of_rare_classes_are_repeated():
    dataset = make(400, lambda i: [0] + [1] * (i % 100 == 0) + [2] * (i % 4 == 0))
    assert repeated_images(dataset, 0) == []
    copies = Counter(repeated_images(dataset, 0.09))
    assert copies == {0: 2, 100: 2, 200: 2, 300: 2}  # sqrt(0.09 / 0.01) = 3 times in all
    rounded = Counter(repeated_images(dataset, 0.5625))  # sqrt(0.5625 / 0.25) = 1.5 times
    assert {rounded[index] for index in range(0, 400, 4) if index % 100} == {0, 1}
    assert 30 < sum(rounded[index] for index in range(0, 400, 4) if index % 100) < 66
    assert repeated_images(dataset, 0.5625) == repeated_images(dataset, 0.5625)


def test_a_copy_is_augmented_in_its_own_way(tmp_path):
    dataset = PreparedDataset(
        write_dataset(tmp_path),
        PROCESSOR,
        "strong",
        copies=[1],
    )
    assert len(dataset) == len(dataset.sizes) == 4
    assert dataset.sizes[3] == dataset.sizes[1]
    assert dataset[3]["labels"]["image_id"] == dataset[1]["labels"]["image_id"]
    first, again = (dataset[index]["pixel_values"] for index in (1, 3))
    assert first.shape != again.shape or not (first == again).all()
