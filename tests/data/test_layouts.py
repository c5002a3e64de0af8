"""The same images and objects in the layouts of many tools are the same data set."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from detrkit.data.checks import check_dataset
from detrkit.data.layouts import WHOLE, open_any, open_split, split_in
from detrkit.data.splitting import fingerprint
from detrkit.errors import AnnotationError
from tests.data.synthetic import SIZES, make_document, make_images, make_panoptic


def plain_document():
    """Without the crowd, which other formats do not have."""
    document = make_document()
    document["annotations"].pop()
    return document


def names():
    """Class names in the order of their ids."""
    return [c["name"] for c in sorted(plain_document()["categories"], key=lambda entry: entry["id"])]


def coco(path: Path, prefix="", root_category=None):
    def write(root):
        document = plain_document()
        for image in document["images"]:
            image["file_name"] = prefix + image["file_name"]
        if root_category is not None:
            for category in document["categories"]:
                category["supercategory"] = root_category
            root_entry = {"id": 0, "name": root_category, "supercategory": "none"}
            document["categories"].insert(0, root_entry)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(json.dumps(document))

    return write


def objects_by_image():
    document = plain_document()
    name_of = {category["id"]: category["name"] for category in document["categories"]}
    for image in document["images"]:
        entries = [entry for entry in document["annotations"] if entry["image_id"] == image["id"]]
        yield image, [(name_of[entry["category_id"]], *entry["bbox"]) for entry in entries]


def yolo_labels(folder):
    def write(root):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for image, objects in objects_by_image():
            width, height = image["width"], image["height"]
            rows = [
                f"{names().index(n)} {(x + w / 2) / width} {(y + h / 2) / height} {w / width} {h / height}\n"
                for n, x, y, w, h in objects
            ]
            (root / folder / image["file_name"]).with_suffix(".txt").write_text("".join(rows))

    return write


def voc_files(folder, offset=1):
    def write(root):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for image, objects in objects_by_image():
            rows = "".join(
                f"<object><name>{n}</name><bndbox><xmin>{x + offset}</xmin><ymin>{y + offset}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for n, x, y, w, h in objects
            )
            path = (root / folder / image["file_name"]).with_suffix(".xml")
            path.write_text(f"<annotation>{rows}</annotation>")

    return write


def hugging_face(root):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = []
    for image, objects in objects_by_image():
        content = {"bytes": (root / "pixels" / image["file_name"]).read_bytes(), "path": None}
        lists = {
            "id": list(range(len(objects))),
            "area": [w * h for *_, w, h in objects],
            "bbox": [[float(v) for v in box] for _, *box in objects],
            "category": [names().index(name) for name, *_ in objects],
        }
        rows.append({"image_id": image["id"], "image": content, "objects": lists,
                     "width": image["width"], "height": image["height"]})  # fmt: skip
    label = {"feature": {"names": names(), "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"image": {"_type": "Image"}, "objects": {"category": label}}
    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (root / "data").mkdir()
    parquet.write_table(table, root / "data" / "train-00000-of-00001.parquet")
    shutil.rmtree(root / "pixels")


def image_folder(root):
    rows = [
        {"file_name": image["file_name"], "objects": {"bbox": [o[1:] for o in objects],
                                                      "categories": [o[0] for o in objects]}}
        for image, objects in objects_by_image()
    ]  # fmt: skip
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def settings(root):
    content = {"path": "../datasets/x", "train": "images/train", "names": dict(enumerate(names()))}
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def class_names(path):
    return lambda root: (root / path).write_text("\n".join(names()))


def listed(path):
    def write(root):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        stems = [Path(image["file_name"]).stem for image in plain_document()["images"]]
        (root / path).write_text("\n".join(stems))

    return write


# Folder of the images, what else is written, the split that it is.
LAYOUTS = {
    "COCO": ("train2017", coco("annotations/instances_train2017.json"), "train"),
    "Roboflow": ("train", coco("train/_annotations.coco.json", root_category="pets"), "train"),
    "CVAT": ("images/train", coco("annotations/instances_train.json"), "train"),
    "CVAT, one task": ("images/default", coco("annotations/instances_default.json", "default/"), WHOLE),
    "CVAT, one task, plain names": ("images/default", coco("annotations/instances_default.json"), WHOLE),
    "Label Studio": ("images", coco("result.json", "images\\"), WHOLE),
    "LabelMe": ("JPEGImages", coco("annotations.json", "JPEGImages/"), WHOLE),
    "VIA": (".", coco("via_export_coco.json"), WHOLE),
    "Datumaro": ("images/train", coco("annotations/instances_train.json"), "train"),
    "FiftyOne": ("data", coco("labels.json"), WHOLE),
    "a file for each split": ("train", coco("train.json"), "train"),
    "YOLO": ("images/train", [yolo_labels("labels/train"), settings], "train"),
    "YOLO of Label Studio": (
        "images", [yolo_labels("labels"), class_names("classes.txt")], WHOLE,
    ),
    "YOLO of CVAT": (
        "obj_train_data", [yolo_labels("obj_train_data"), class_names("obj.names")], "train",
    ),
    "Pascal VOC": (
        "JPEGImages", [voc_files("Annotations"), listed("ImageSets/Main/train.txt")], "train",
    ),
    "Pascal VOC of Roboflow": ("train", voc_files("train"), "train"),
    "Pascal VOC in two folders": ("images", voc_files("annotations"), WHOLE),
    "Hugging Face": ("pixels", hugging_face, "train"),
    "image folder": ("train", image_folder, "train"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_of_tools_are_the_same_data_set(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, writers, split = LAYOUTS[name]
    root = tmp_path / "set"
    make_images(root / folder)
    for write in writers if isinstance(writers, list) else [writers]:
        write(root)
    coco("instances.json")(tmp_path)
    make_images(tmp_path / "images")
    expected = check_dataset(open_any(tmp_path / "instances.json", WHOLE)).dataset
    report = check_dataset(open_any(root, split), strict=True)
    assert (report.images, report.objects) == (3, 3)
    assert rounded(report.dataset) == rounded(expected)
    assert sorted(report.dataset.category_names.values()) == sorted(names())
    assert [s for s in ("train", "val", "test", WHOLE) if open_split(root, s) is not None] == [split]


def rounded(dataset):
    name_of = dataset.category_names
    files = {image["id"]: place for place, image in enumerate(dataset.document["images"])}
    return sorted(
        (files[entry["image_id"]], name_of[entry["category_id"]], *(round(v, 3) for v in entry["bbox"]))
        for entry in dataset.document["annotations"]
    )


def test_classes_that_rows_name_are_in_the_order_of_their_names(tmp_path):
    make_images(tmp_path)
    rows = [
        {"file_name": name, "objects": {"bbox": [[1, 2, 30, 20]], "categories": [category]}}
        for name, category in (("a.jpg", "zebra"), ("b.jpg", "cat"))
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = open_any(tmp_path, "train", "all")
    assert dataset.id2label == {0: "cat", 1: "zebra"}
    assert [entry["category_id"] for entry in dataset.document["annotations"]] == [1, 0]


def test_panoptic_files_are_found_with_their_png_files(tmp_path):
    document = make_panoptic(tmp_path)
    make_images(tmp_path / "images")
    (tmp_path / "png").rename(tmp_path / "panoptic_val")
    (tmp_path / "panoptic_val.json").write_text(json.dumps(document))
    dataset = check_dataset(open_any(tmp_path, "val"), strict=True).dataset
    assert dataset.panoptic_dir == tmp_path / "panoptic_val"
    assert len(dataset) == 2


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(AnnotationError, match="nowhere: data set not found"):
        open_any(tmp_path / "nowhere", "val")
    with pytest.raises(AnnotationError, match="no annotations found for val or test; a data set is a YOLO"):
        open_any(tmp_path, "val", "test")
    make_images(tmp_path / "train")
    coco("train.json")(tmp_path)
    with pytest.raises(AnnotationError, match=r"no annotations found for val \(it has train\)"):
        open_any(tmp_path, "val")
    (tmp_path / "train.json").write_text('{"a": {"filename": "a.jpg", "regions": []}}')
    with pytest.raises(AnnotationError, match="VIA"):
        open_any(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("instances_val2017.json", "val"),
        ("Valid", "val"),
        ("train", "train"),
        ("validated", None),
        ("x", None),
    ],
)
def test_a_split_is_a_word_of_a_name(name, split):
    assert split_in(name) == split


def test_a_fingerprint_is_that_of_the_content(tmp_path):
    def read(root, change=lambda document: None):
        document = plain_document()
        change(document)
        make_images(root / "images")
        (root / "instances.json").write_text(json.dumps(document))
        return fingerprint(check_dataset(open_any(root / "instances.json", WHOLE)).dataset)

    first = read(tmp_path / "a")
    assert read(tmp_path / "b", lambda d: d["annotations"].reverse()) == first
    assert read(tmp_path / "c", lambda d: d["annotations"][0].update(bbox=[5, 5, 20, 21])) != first
    assert read(tmp_path / "d", lambda d: d["categories"][0].update(name="wolf")) != first
    assert read(tmp_path / "e", lambda d: d["images"].pop()) != first
    assert len(SIZES) == 3
