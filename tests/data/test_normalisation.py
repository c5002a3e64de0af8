import gzip
import json
import unicodedata

import pytest

from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.data.image_files import ImageFiles
from detrkit.errors import AnnotationError
from tests.data.synthetic import make_document, make_images, write_dataset


def all_of(table, **values):
    """Sets values of every entry of a list; a function gets the entry."""

    def change(document):
        for entry in document[table]:
            entry.update({key: value(entry) if callable(value) else value for key, value in values.items()})

    return change


def without_boxes(document):
    for entry in document["annotations"]:
        del entry["bbox"]


READ = {
    "ids as text": (all_of("images", id=lambda e: str(e["id"])), "written_number"),
    "references as text": (
        all_of("annotations", image_id=lambda e: f" {e['image_id']}.0 "), "written_number",
    ),
    "ids as floats": (all_of("categories", id=lambda e: float(e["id"])), "written_number"),
    "sizes as text": (all_of("images", width=lambda e: str(e["width"])), "written_number"),
    "boxes as text": (all_of("annotations", bbox=lambda e: list(map(str, e["bbox"]))), "written_number"),
    "crowds as text": (all_of("annotations", iscrowd=lambda e: str(e["iscrowd"])), "written_number"),
    "no sizes": (all_of("images", width=None, height=None), "unknown_size"),
    "sizes of 0": (all_of("images", width=0, height=0), "unknown_size"),
    "no boxes": (without_boxes, "boxless"),
    "empty boxes": (all_of("annotations", bbox=[]), "boxless"),
    "backslashes": (all_of("images", file_name=lambda e: f"images\\{e['file_name']}"), "renamed_image"),
    "folder in front": (all_of("images", file_name=lambda e: f"images/{e['file_name']}"), "renamed_image"),
    "of another computer": (
        all_of("images", file_name=lambda e: f"C:\\Users\\ann\\{e['file_name']}"), "renamed_image",
    ),
    "of a server": (
        all_of("images", file_name=lambda e: f"http://x.org/up/{e['file_name']}?d=1"), "renamed_image",
    ),
    "percent signs": (
        all_of("images", file_name=lambda e: e["file_name"].replace(".", "%2E")), "renamed_image",
    ),
    "another case": (all_of("images", file_name=lambda e: e["file_name"].upper()), "renamed_image"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_has_one_meaning_is_read_and_told(name, tmp_path, caplog):
    change, kind = READ[name]
    document = make_document()
    change(document)
    dataset = write_dataset(tmp_path, document, return_masks=True)
    report = check_dataset(dataset, strict=True)  # nothing is lost, so nothing is refused
    (problem,) = report.problems
    assert (problem.kind, problem.is_note) == (kind, True)
    assert caplog.text.count("\n") == 1
    expected = make_document()
    for found, right in zip(report.dataset.document["annotations"], expected["annotations"]):
        assert found["bbox"] == right["bbox"]
        assert {**found, "bbox": 0} == {**right, "bbox": 0}
    assert report.dataset.document["images"] == expected["images"]
    assert report.dataset.document["categories"] == expected["categories"]


def test_a_rotated_box_becomes_the_upright_one_around_it(tmp_path):
    document = make_document()
    first, second, *_ = document["annotations"]
    first.update(bbox=[20, 10, 8, 4], attributes={"rotation": 90.0}, segmentation=[])
    second.update(bbox=[10, 10, 8, 8], attributes={"rotation": "45"}, segmentation=[])
    half_turn = second | {"id": 99, "bbox": [5, 5, 6, 4], "attributes": {"rotation": 180}}
    document["annotations"] = [first, second, half_turn]
    checked = check_dataset(write_dataset(tmp_path, document))
    boxes = [entry["bbox"] for entry in checked.dataset.document["annotations"]]
    side = 8 * 2**0.5
    expected = [[22, 8, 4, 8], [14 - side / 2, 14 - side / 2, side, side], [5, 5, 6, 4]]
    assert [pytest.approx(box) for box in expected] == boxes
    assert [(problem.kind, problem.count) for problem in checked.problems] == [("rotated_box", 2)]


def test_ids_beyond_64_bits_are_dropped_by_the_check(tmp_path):
    document = make_document()
    document["images"][0]["id"] = 2**63
    checked = check_dataset(write_dataset(tmp_path, document))
    assert "64 bits" in checked.problems[0].example


def test_a_name_is_found_in_the_other_form_of_its_accents(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / unicodedata.normalize("NFD", "Bär.png")).write_bytes(b"")
    names = [unicodedata.normalize("NFC", "Bär.png")]
    assert list(ImageFiles(folder).find(names)) == names


def test_class_names_may_be_numbers(tmp_path):
    document = make_document()
    document["categories"] = [{"id": 7, "name": 0}, {"id": 2, "name": 1.0}, {"id": 90}]
    dataset = check_dataset(write_dataset(tmp_path, document), strict=True).dataset
    assert dataset.category_names == {2: "1", 7: "0", 90: "90"}


@pytest.mark.parametrize("value", ["12a", "0x1", "1_000", "", "nan", 1.5, 2.0**60, None, [], True])
def test_an_id_of_doubtful_meaning_is_not_read(tmp_path, value):
    document = make_document()
    document["annotations"][0]["image_id"] = value
    report = check_dataset(write_dataset(tmp_path, document))
    assert report.objects == 3


@pytest.mark.parametrize("encode", [gzip.compress, lambda b: b.decode().encode("utf-16"),
                                    lambda b: b"\xef\xbb\xbf" + b])  # fmt: skip
def test_files_may_be_compressed_or_of_another_encoding(tmp_path, encode):
    path = tmp_path / "instances.json"
    path.write_bytes(encode(json.dumps(make_document()).encode()))
    dataset = DetectionDataset.from_coco(make_images(tmp_path / "images"), path)
    assert check_dataset(dataset, strict=True).objects == 4


def test_a_file_is_taken_only_if_no_other_can_be_meant(tmp_path):
    images = make_images(tmp_path / "images")
    (images / "A.JPG").write_bytes((images / "b.jpg").read_bytes())
    document = make_document()
    document["images"][0]["file_name"] = "a.Jpg"  # a.jpg or A.JPG?
    document["images"][1]["file_name"] = "val/b.jpg"  # another image of that name, most likely
    document["images"].append({"id": 9, "file_name": "images/c.png"})  # c.png is listed already
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=r"image file missing: 3 .*a\.Jpg"):
        check_dataset(DetectionDataset.from_coco(images, path), strict=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a.jpg12": {"filename": "a.jpg", "regions": [], "size": 12}}, "VIA"),
        ({"_via_settings": {}, "_via_img_metadata": {"a": {"filename": "a", "regions": []}}}, "VIA"),
        ({"version": "5", "shapes": [], "imagePath": "a.jpg"}, "LabelMe"),
        ([{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}], "Label Studio"),
        ([{"image_id": 1, "category_id": 1, "score": 0.5}], "list of detections"),
    ],
)
def test_files_of_other_tools_are_recognised(tmp_path, content, message):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AnnotationError, match=message):
        DetectionDataset.from_coco(tmp_path, path)
