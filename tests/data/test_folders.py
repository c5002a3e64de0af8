import re

import numpy as np
import PIL.Image
import pytest
import yaml

from detrkit.data import read_voc, read_yolo
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.data.layouts import open_any
from detrkit.errors import AnnotationError
from tests.conftest import make_picture
from tests.golden import DATA, needs_data

YOLO_LABELS = {"a": "1 0.5 0.5 0.5 0.25\n0 0.1 0.2 0.2 0.4\n", "b": "1 0.25 0.25 0.5 0.5\n"}

VOC = """<annotation><size><width>60</width><height>40</height></size>
<object><name>{name}</name><bndbox>
<xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object></annotation>"""


def make_yolo(
    folder, layout="images/{split}", labels="labels/{split}", split="train", value=None, **settings
):
    pictures, texts = folder / layout.format(split=split), folder / labels.format(split=split)
    pictures.mkdir(parents=True)
    texts.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate("abc"):  # the last one has no label file
        make_picture(60, 40, seed=seed).save(pictures / f"{name}.jpg")
    for name, text in YOLO_LABELS.items():
        (texts / f"{name}.txt").write_text(text)
    settings = {"names": ["cat", "dog", "cow"], split: value or layout.format(split=split), **settings}
    (folder / "data.yaml").write_text(yaml.safe_dump(settings))
    return folder


def make_voc(folder):
    (folder / "JPEGImages").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for seed, name in enumerate(["zebra", "cat"]):
        make_picture(60, 40, seed=seed).save(folder / "JPEGImages" / f"{seed}.jpg")
        (folder / "Annotations" / f"{seed}.xml").write_text(VOC.format(name=name))
    return folder / "JPEGImages", folder / "Annotations"


def check_yolo(dataset):
    report = check_dataset(dataset, strict=True)
    assert (report.images, report.objects, report.empty_images) == (3, 3, 1)
    assert dataset.id2label == {0: "cat", 1: "dog", 2: "cow"}
    image, target = report.dataset[0]
    assert image.size == (60, 40)
    assert target["class_labels"].tolist() == [1, 0]
    assert target["boxes"].numpy() == pytest.approx(np.array([[15, 15, 45, 25], [0, 0, 12, 16]]), abs=1e-4)


@pytest.mark.parametrize(
    ("layout", "labels", "value"),
    [
        ("images/train", "labels/train", None),
        ("train/images", "train/labels", None),
        ("train/images", "train/labels", "../train/images"),
        ("train/images", "train/labels", "train"),
        ("pictures", "pictures", None),
        ("pictures", "labels", "./pictures"),
    ],
)
def test_the_usual_yolo_folders_are_found(tmp_path, layout, labels, value):
    check_yolo(read_yolo(make_yolo(tmp_path, layout, labels, value=value)))


def test_a_yolo_split_may_go_by_its_other_name_and_by_a_root(tmp_path):
    folder = make_yolo(tmp_path / "set", "valid/images", "valid/labels", split="valid")
    check_yolo(read_yolo(folder / "data.yaml", "val"))
    other = make_yolo(tmp_path / "deep" / "er", "images", "labels", split="val", value="er/images", path="..")
    check_yolo(read_yolo(other, "val"))


def test_yolo_polygons_become_masks_where_they_are_wanted(tmp_path):
    folder = make_yolo(tmp_path)
    (folder / "labels" / "train" / "a.txt").write_text("2 0 0 0.5 0 0.5 0.5 0 0.5\n")
    (folder / "labels" / "train" / "b.txt").write_text("1 0 0 0.5 0 0.5 0.5\n")
    dataset = check_dataset(read_yolo(folder, return_masks=True), strict=True).dataset
    _, target = dataset[0]
    assert target["boxes"].tolist() == [[0, 0, 30, 20]]
    assert target["masks"].shape == (1, 40, 60)
    assert target["masks"][0, 2:18, 2:28].all()
    assert not target["masks"][0, 23:].any()
    assert "masks" not in read_yolo(folder)[0][1]


def test_yolo_labels_refer_to_upright_images(tmp_path):
    folder = make_yolo(tmp_path)
    path = folder / "images" / "train" / "a.jpg"
    with PIL.Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)
    image, target = check_dataset(read_yolo(folder), strict=True).dataset[0]
    assert image.size == (40, 60)
    assert target["boxes"][0].tolist() == pytest.approx([10, 22.5, 30, 37.5])


@pytest.mark.parametrize("nested", [True, False])
def test_splits_of_one_voc_data_set_count_pixels_alike(tmp_path, nested):
    box = "<annotation><object><name>cat</name><bndbox><xmin>{0}</xmin><ymin>5</ymin><xmax>30</xmax>"
    box += "<ymax>20</ymax></bndbox></object></annotation>"
    for split, left in (("train", 0), ("valid", 5)):  # only one of them has a corner that shows it
        images, notes = ("JPEGImages", "Annotations") if nested else (split, split)
        for folder in (images, notes):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        make_picture(60, 40, seed=left).save(tmp_path / images / f"{split}.jpg")
        (tmp_path / notes / f"{split}.xml").write_text(box.format(left))
        if nested:
            (tmp_path / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            (tmp_path / "ImageSets" / "Main" / f"{split.replace('id', '')}.txt").write_text(split)
    for split, left in (("train", 0), ("val", 5)):
        [entry] = open_any(tmp_path, split).document["annotations"]
        assert entry["bbox"] == [left, 5, 30 - left, 15], split


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda f: (f / "data.yaml").unlink(), r"data\.yaml"),
        (lambda f: (f / "data.yaml").write_text("a: [1"), "is not a YAML file"),
        (lambda f: (f / "data.yaml").write_text("train: images/train"), "has no names"),
        (lambda f: (f / "data.yaml").write_text("names: [a]\nval: b"), r"split 'train' \(it has val\)"),
        (lambda f: (f / "data.yaml").write_text("names: [a]\ntrain: b"), r"folder .*b of the split 'train'"),
        (lambda f: (f / "labels").rename(f / "texts"), "folder of YOLO labels not found"),
        (lambda f: [p.unlink() for p in (f / "images" / "train").iterdir()], "no images in images/train"),
    ],
)
def test_broken_yolo_folders_give_one_clear_line(tmp_path, break_it, reason):
    break_it(make_yolo(tmp_path))
    with pytest.raises(AnnotationError, match=reason) as caught:
        read_yolo(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "kind", "example"),
    [
        ("1 2 3", "broken_entry", r"a\.txt line 2 has 3 numbers"),
        ("x 0 0 1 1", "broken_entry", r"a\.txt line 2: 'x 0 0 1 1' is not a row of numbers"),
        ("1.5 0 0 1 1", "broken_entry", r"a\.txt line 2"),
        ("9 0.5 0.5 1 1", "unknown_category", r"a\.txt line 2, class 9"),
        ("1 30 20 12 8", "broken_entry", r"a\.txt line 2 has 30, but YOLO's numbers are fractions"),
        ("1 0.5 0.5 0 0.1", "degenerate_box", r"a\.txt line 2"),
        ("1 0.5 0.5 nan 0.1", "broken_entry", r"a\.txt line 2"),
    ],
)
def test_lines_that_cannot_be_read_are_named_and_left_out(tmp_path, line, kind, example):
    make_yolo(tmp_path)
    first, second = YOLO_LABELS["a"].splitlines()
    (tmp_path / "labels" / "train" / "a.txt").write_text(f"{first}\n{line}\n\n{second}\n")
    report = check_dataset(read_yolo(tmp_path))
    assert (report.images, report.objects) == (3, 3)
    assert [problem.kind for problem in report.problems] == [kind]
    assert re.search(example, report.problems[0].example)


def test_images_that_cannot_be_read_are_left_out(tmp_path):
    make_yolo(tmp_path)
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"x")
    report = check_dataset(read_yolo(tmp_path))
    assert (report.images, [problem.kind for problem in report.problems]) == (2, ["unreadable_image"])


def test_yolo_splits_may_be_lists_of_files_and_have_folders_inside(tmp_path):
    make_yolo(tmp_path)
    for name in ("images", "labels"):
        (tmp_path / name / "train" / "deep").mkdir()
    (tmp_path / "images" / "train" / "b.jpg").rename(tmp_path / "images" / "train" / "deep" / "b.jpg")
    (tmp_path / "labels" / "train" / "b.txt").rename(tmp_path / "labels" / "train" / "deep" / "b.txt")
    check_yolo(read_yolo(tmp_path))
    (tmp_path / "train.txt").write_text("./images/train/a.jpg\n/elsewhere/images/train/deep/b.jpg\n")
    settings = {"names": {0: "cat", 1: "dog", "2": "cow"}, "train": ["train.txt", "images/train/c.jpg"]}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
    check_yolo(read_yolo(tmp_path))
    (tmp_path / "train.txt").write_text("images/train/none.jpg\n")
    with pytest.raises(AnnotationError, match=r"train\.txt line 1: image images/train/none\.jpg not found"):
        read_yolo(tmp_path)


def test_keypoints_of_yolo_labels_are_passed_over(tmp_path):
    make_yolo(tmp_path, kpt_shape=[2, 3])
    (tmp_path / "labels" / "train" / "b.txt").write_text("1 0.25 0.25 0.5 0.5 0.1 0.1 2 0.2 0.2 1\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text(YOLO_LABELS["a"].replace("\n", " 0 0 0 0 0 0\n"))
    check_yolo(read_yolo(tmp_path))


def test_voc_folders_are_read(tmp_path):
    dataset = check_dataset(read_voc(*make_voc(tmp_path)), strict=True).dataset
    assert dataset.id2label == {0: "cat", 1: "zebra"}  # by name, not by the file that comes first
    image, target = dataset[0]
    assert image.size == (60, 40)
    assert target["boxes"].tolist() == [[10, 5, 30, 25]]  # VOC counts pixels from 1
    assert target["class_labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda f: (f / "Annotations").rename(f / "Labels"), "folder of Pascal VOC annotations not found"),
        (lambda f: [p.unlink() for p in (f / "Annotations").iterdir()], "no XML files"),
        (lambda f: (f / "JPEGImages").rename(f / "Pictures"), "folder of images not found"),
    ],
)
def test_broken_voc_folders_give_one_clear_line(tmp_path, break_it, reason):
    folders = make_voc(tmp_path)
    break_it(tmp_path)
    with pytest.raises(AnnotationError, match=reason) as caught:
        read_voc(*folders)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind", "example", "images"),
    [
        ("", "broken_file", r"0\.xml is empty", 1),
        ("<annotation>", "broken_file", r"0\.xml is not XML", 1),
        ("<a><object/></a>", "broken_entry", r"0\.xml, object 1 has no name", 2),
        ("<a><object><name>x</name></object></a>", "broken_entry", r"object 1 has no corners", 2),
    ],
)
def test_what_is_broken_in_voc_files_is_named_and_left_out(tmp_path, content, kind, example, images):
    folders = make_voc(tmp_path)
    (tmp_path / "Annotations" / "0.xml").write_text(content)
    report = check_dataset(read_voc(*folders))
    assert (report.images, report.objects) == (images, 1)
    assert [problem.kind for problem in report.problems] == [kind]
    assert re.search(example, report.problems[0].example)


def test_voc_corners_may_be_counted_from_0(tmp_path):
    folders = make_voc(tmp_path)
    path = tmp_path / "Annotations" / "1.xml"
    path.write_text(path.read_text().replace("<xmin>11</xmin>", "<xmin>0</xmin>"))
    dataset = check_dataset(read_voc(*folders), strict=True).dataset
    assert dataset.format == "Pascal VOC, pixels counted from 0"
    assert [target["boxes"].tolist() for _, target in dataset] == [[[11, 6, 30, 25]], [[0, 6, 30, 25]]]


def test_an_xml_file_without_image_is_named(tmp_path):
    folders = make_voc(tmp_path)
    (tmp_path / "JPEGImages" / "0.jpg").unlink()
    (problem,) = check_dataset(read_voc(*folders)).problems
    assert (problem.kind, "0.xml" in problem.example) == ("missing_image", True)


@needs_data
def test_real_annotations_survive_the_way_through_yolo_and_voc(tmp_path):
    # Before 0.30 it writes VOC's boxes a pixel too wide and too high.
    supervision = pytest.importorskip("supervision", "0.30")
    folder = DATA / "bccd"
    annotations = folder / "annotations" / "instances_val.json"
    library = supervision.DetectionDataset.from_coco(str(folder / "val"), str(annotations))
    library.as_yolo(
        annotations_directory_path=str(tmp_path / "labels"), data_yaml_path=str(tmp_path / "data.yaml")
    )
    library.as_pascal_voc(annotations_directory_path=str(tmp_path / "xml"))
    (tmp_path / "images").symlink_to(folder / "val")
    with (tmp_path / "data.yaml").open("a") as file:
        file.write("\nval: images\n")
    expected = check_dataset(DetectionDataset.from_coco(folder / "val", annotations)).dataset
    by_name = {image["file_name"]: i for i, image in enumerate(expected.document["images"])}
    for dataset in (read_yolo(tmp_path, "val"), read_voc(tmp_path / "images", tmp_path / "xml")):
        assert len(dataset) == len(expected)
        assert dataset.id2label == expected.id2label
        for index in range(0, len(dataset), 10):
            _, target = dataset[index]
            _, original = expected[by_name[dataset.document["images"][index]["file_name"]]]
            assert target["class_labels"].tolist() == original["class_labels"].tolist()
            assert target["boxes"].numpy() == pytest.approx(original["boxes"].numpy(), abs=0.01)
