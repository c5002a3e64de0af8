import json
import math
import re
import sys

import PIL.Image
import pytest

from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.errors import AnnotationError, DetrkitError, MissingExtraError
from tests.data.synthetic import make_document, make_panoptic, write_dataset
from tests.golden import DATA, needs_data


def objects(document):
    return document["annotations"]


def remove(name):
    return lambda document, images: (images / name).unlink()


def change(table, index, **values):
    def break_it(document, images):
        document[table][index].update(values)

    return break_it


def without(table, index, key):
    return lambda document, images: document[table][index].pop(key)


def without_shape(index):
    def break_it(document, images):
        del document["annotations"][index]["bbox"], document["annotations"][index]["segmentation"]

    return break_it


def add(table, entry):
    return lambda document, images: document[table].append(entry)


def overwrite(name, content):
    return lambda document, images: (images / name).write_bytes(content)


def replaced_picture(document, images):
    PIL.Image.new("RGB", (41, 60)).save(images / "b.jpg")


def turned_picture(document, images):
    document["images"][1].update(width=60, height=40)


def give_orientation(path):
    with PIL.Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, exif=exif)


def box(index, bbox):
    return change("annotations", index, bbox=bbox)


LIKE_FIRST = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 20, 20], "iscrowd": 0, "area": 400}

# A way to break the data set, the kind of problem, what its example says, images and objects that are left.
BROKEN = {
    "missing file": (remove("a.jpg"), "missing_image", r"a\.jpg", 2, 2),
    "empty file": (overwrite("b.jpg", b""), "unreadable_image", r"b\.jpg", 2, 2),
    "no image": (overwrite("b.jpg", b"hello"), "unreadable_image", r"b\.jpg", 2, 2),
    "other size": (replaced_picture, "size_mismatch", "b.jpg is 41x60, not 40x60", 2, 2),
    "turned": (turned_picture, "size_mismatch", "b.jpg is 40x60, not 60x40", 2, 2),
    "negative width": (box(0, [5, 5, -2, 20]), "degenerate_box", "annotation 1 with bbox", 3, 3),
    "no height": (box(0, [5, 5, 2, 0]), "degenerate_box", "annotation 1 with bbox", 3, 3),
    "not a number": (box(1, [math.nan, 5, 2, 3]), "degenerate_box", "annotation 2 with bbox", 3, 3),
    "infinite": (box(1, [1, 5, math.inf, 3]), "degenerate_box", "annotation 2 with bbox", 3, 3),
    "outside": (box(2, [40, 5, 10, 10]), "outside_box", "annotation 3 .* in an image of 40x60", 3, 3),
    "partly outside": (box(2, [35, 5, 10, 10]), "clipped_box", "annotation 3 by 5 pixels", 3, 4),
    "three numbers": (box(1, [1, 2, 3]), "broken_entry", "annotation 2 has bbox", 3, 3),
    "text in a box": (box(1, [1, 2, 3, "four"]), "broken_entry", "annotation 2 has bbox", 3, 3),
    "no box": (without_shape(1), "broken_entry", "annotation 2 has no bbox", 3, 3),
    "no category": (without("annotations", 1, "category_id"), "broken_entry", "has no category_id", 3, 3),
    "no image id": (without("annotations", 1, "image_id"), "broken_entry", "2 has no image_id", 3, 3),
    "no file name": (without("images", 1, "file_name"), "broken_entry", "image 2 in the list has no", 2, 2),
    "text as id": (change("images", 1, id="b"), "broken_entry", "which must be an integer", 2, None),
    "no dictionary": (add("annotations", 5), "broken_entry", "is int, not a dictionary", 3, 4),
    "unknown category": (
        change("annotations", 0, category_id=8), "unknown_category", "annotation 1, category 8", 3, 3,
    ),
    "unknown image": (
        change("annotations", 0, image_id=8), "unknown_image", "annotation 1, image 8", 3, 3,
    ),
    "image id twice": (
        change("images", 2, id=2), "duplicate_image_id", r"2 \(b\.jpg\)", 1, 2,
    ),
    "image twice": (
        add("images", {"id": 1, "file_name": "a.jpg", "width": 60, "height": 40}),
        "duplicate_image_id", r"1 \(a\.jpg\)", 3, 4,
    ),
    "file twice": (
        add("images", {"id": 9, "file_name": "a.jpg", "width": 60, "height": 40}),
        "duplicate_file_name", r"a\.jpg", 3, 4,
    ),
    "same object twice": (add("annotations", {"id": 9, **LIKE_FIRST}), "identical_annotation", "9", 3, 4),
    "same id twice": (change("annotations", 1, id=1), "duplicate_annotation_id", "1", 3, 4),
    "category id twice": (
        add("categories", {"id": 7, "name": "wolf"}), "duplicate_category", r"7 \(wolf\)", 3, 4,
    ),
    "category name twice": (
        add("categories", {"id": 91, "name": "dog"}), "duplicate_category", r"91 \(dog\)", 3, 4,
    ),
    "category without id": (
        add("categories", {"name": "wolf"}), "broken_entry", "category 4 in the list has no id", 3, 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named_and_left_out(name, tmp_path, caplog):
    break_it, kind, example, images, left = BROKEN[name]
    document = make_document()
    write_dataset(tmp_path)
    break_it(document, tmp_path / "images")
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(document))
    dataset = DetectionDataset.from_coco(tmp_path / "images", path)

    report = check_dataset(dataset)
    kinds = [problem.kind for problem in report.problems]
    if name == "text as id":  # the annotations of that image refer to none that is listed then
        assert kinds == ["broken_entry", "unknown_image"]
    else:
        assert kinds == [kind]
        assert report.objects == left
    problem = next(p for p in report.problems if p.kind == kind)
    assert report.images == len(report.dataset) == images
    assert re.search(example, problem.example)
    (line, *_) = [r.getMessage() for r in caplog.records if str(problem) in r.getMessage()]
    assert "\n" not in line
    assert "instances.json" in line

    for index in range(len(report.dataset)):
        _, target = report.dataset[index]
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        height, width = target["size"].tolist()
        assert (target["boxes"] <= target["boxes"].new_tensor([width, height, width, height])).all()

    with pytest.raises(AnnotationError) as caught:
        check_dataset(dataset, strict=True)
    message = str(caught.value)
    assert "\n" not in message
    assert str(problem) in message
    assert message.startswith(f"{path} has problems.")


def test_a_clean_data_set_has_no_problems(tmp_path, caplog):
    dataset = write_dataset(tmp_path, return_masks=True)
    report = check_dataset(dataset, strict=True, decode=True)
    assert report.problems == ()
    assert (report.images, report.objects, report.empty_images) == (3, 4, 1)
    assert str(report).endswith("3 images, 4 objects, 1 images without objects")
    assert not caplog.records
    assert report.dataset.document == make_document()


def test_problems_of_one_kind_are_counted_in_one_line(tmp_path):
    document = make_document()
    document["annotations"].append({**LIKE_FIRST, "id": 9, "bbox": [6, 6, 9, 9]})
    for annotation in document["annotations"][:3]:
        annotation["bbox"] = [1, 1, 0, 0]
    document["annotations"][0]["category_id"] = 8
    report = check_dataset(write_dataset(tmp_path, document))
    assert list(map(str, report.problems)) == [
        "annotation refers to a category that is not listed: 1 dropped (first: annotation 1, category 8)",
        "box without area or with infinite values: 2 dropped (first: annotation 2 with bbox [1, 1, 0, 0])",
    ]
    with pytest.raises(
        AnnotationError, match=r"not listed: 1 .*; box without area or with infinite values: 2 "
    ):
        check_dataset(write_dataset(tmp_path, document), strict=True)


def test_annotations_of_dropped_images_are_no_problem_of_their_own(tmp_path):
    dataset = write_dataset(tmp_path)
    (tmp_path / "images" / "a.jpg").unlink()
    report = check_dataset(dataset)
    assert [p.kind for p in report.problems] == ["missing_image"]
    assert {a["image_id"] for a in report.dataset.document["annotations"]} == {2}


def test_missing_sizes_areas_and_ids_are_filled_in(tmp_path):
    document = make_document()
    for image in document["images"]:
        del image["height"], image["width"]
    for annotation in document["annotations"]:
        del annotation["area"], annotation["id"], annotation["iscrowd"]
    report = check_dataset(write_dataset(tmp_path, document), strict=True)
    assert report.dataset.sizes == [(40, 60), (60, 40), (40, 60)]
    assert [a["area"] for a in report.dataset.document["annotations"]] == [400, 100, 144, 600]
    assert [a["id"] for a in report.dataset.document["annotations"]] == [1, 2, 3, 4]
    assert all(a["iscrowd"] == 0 for a in report.dataset.document["annotations"])


def test_annotations_get_new_ids_where_theirs_is_taken(tmp_path):
    document = make_document()
    document["annotations"][2]["id"] = 2
    report = check_dataset(write_dataset(tmp_path, document))
    assert [a["id"] for a in report.dataset.document["annotations"]] == [1, 2, 5, 4]


def test_categories_of_one_name_become_one(tmp_path):
    document = make_document()
    document["categories"].insert(0, {"id": 0, "name": "dog"})
    report = check_dataset(write_dataset(tmp_path, document))
    assert report.dataset.label2id == {"dog": 0, "cat": 1, "brush": 2}
    assert report.dataset[0][1]["class_labels"].tolist() == [0, 2]


def test_boxes_may_exceed_their_image_by_a_rounding(tmp_path):
    document = make_document()
    document["annotations"][2]["bbox"] = [-0.9, 30, 41.5, 10]
    assert check_dataset(write_dataset(tmp_path, document), strict=True).objects == 4


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        "x",
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [[1, 2, 3, 4, 5, "6"]],
        {"size": [60, 40], "counts": []},
        {"size": [40, 60]},
    ],
)
def test_broken_segmentations_matter_only_where_masks_are_wanted(tmp_path, segmentation):
    document = make_document()
    document["annotations"][0]["segmentation"] = segmentation
    report = check_dataset(write_dataset(tmp_path, document, return_masks=True))
    assert [(p.kind, p.count) for p in report.problems] == [("broken_segmentation", 1)]
    assert len(report.dataset[0][1]["masks"]) == 1
    assert not check_dataset(write_dataset(tmp_path, document)).problems


def test_a_package_that_draws_polygons_is_missed_at_once(tmp_path, monkeypatch):
    for name in ("pycocotools", "faster_coco_eval", "faster_coco_eval.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"'\.\[coco\]'"):
        check_dataset(write_dataset(tmp_path, return_masks=True))
    assert check_dataset(write_dataset(tmp_path)).images == 3


def test_files_that_end_early_are_found_by_decoding(tmp_path):
    dataset = write_dataset(tmp_path)
    path = tmp_path / "images" / "c.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert not check_dataset(dataset).problems
    (problem,) = check_dataset(dataset, decode=True).problems
    assert problem.kind == "unreadable_image"


def test_a_data_set_of_which_nothing_is_left_is_refused(tmp_path):
    dataset = write_dataset(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    with pytest.raises(AnnotationError, match=r"no usable image is left. image file missing: 3 .*a\.jpg"):
        check_dataset(dataset)
    document = make_document()
    document["annotations"] = []
    with pytest.raises(AnnotationError, match=r"no usable object is left"):
        check_dataset(write_dataset(tmp_path, document))
    document["categories"] = []
    with pytest.raises(AnnotationError, match=r"no usable category is left"):
        check_dataset(write_dataset(tmp_path, document))


def break_png(document, folder):
    PIL.Image.new("RGB", (7, 7)).save(folder / "1.png")


PANOPTIC = {
    "no png": (lambda d, folder: (folder / "1.png").unlink(), "broken_panoptic", r"1\.png", 1),
    "png of another size": (break_png, "broken_panoptic", r"1\.png: 7x7", 1),
    "no annotation": (lambda d, f: objects(d).pop(), "missing_panoptic", "2", 1),
    "two annotations": (lambda d, f: objects(d).append(objects(d)[0]), "identical_annotation", "image 1", 2),
    "no segments": (lambda d, f: objects(d)[0].pop("file_name"), "broken_entry", "has no file_name", 1),
    "segment without id": (
        lambda d, f: objects(d)[0]["segments_info"][0].pop("id"), "broken_entry", "has no id", 2,
    ),
    "unknown category": (
        lambda d, f: objects(d)[0]["segments_info"][0].update(category_id=3),
        "unknown_category", "image 1, category 3", 2,
    ),
    "segment twice": (
        lambda d, f: objects(d)[0]["segments_info"].append(objects(d)[0]["segments_info"][0]),
        "identical_annotation", "segment 1 of image 1", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PANOPTIC)
def test_what_is_broken_in_a_panoptic_data_set_is_left_out(name, tmp_path):
    break_it, kind, example, images = PANOPTIC[name]
    document = make_panoptic(tmp_path)
    break_it(document, tmp_path / "png")
    dataset = write_dataset(tmp_path, document, panoptic_dir=tmp_path / "png", return_masks=True)
    report = check_dataset(dataset)
    kinds = {problem.kind: problem for problem in report.problems}
    assert kinds.keys() == {kind}
    assert example.replace("\\", "") in kinds[kind].example
    assert len(report.dataset) == images
    for index in range(images):
        assert len(report.dataset[index][1]["masks"])
    with pytest.raises(DetrkitError, match="has problems"):
        check_dataset(dataset, strict=True)


@needs_data
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_blood_cells_are_clean(split):
    folder = DATA / "bccd"
    dataset = DetectionDataset.from_coco(folder / split, folder / "annotations" / f"instances_{split}.json")
    report = check_dataset(dataset, strict=True)
    assert report.dataset.id2label == {0: "Platelets", 1: "RBC", 2: "WBC"}


def boxes_as(change):
    def edit(document):
        for entry in document["annotations"]:
            size = next((i["width"], i["height"]) for i in document["images"] if i["id"] == entry["image_id"])
            entry["bbox"] = change(*entry["bbox"], *size)

    return edit


def test_boxes_in_fractions_are_refused(tmp_path):
    document = make_document()
    boxes_as(lambda x, y, w, h, width, height: [x / width, y / height, w / width, h / height])(document)
    with pytest.raises(AnnotationError, match="all 4 boxes are smaller than a pixel"):
        check_dataset(write_dataset(tmp_path, document))


def test_boxes_as_two_corners_are_pointed_out(tmp_path):
    document = make_document()
    document["annotations"][0]["bbox"] = [30, 12, 20, 20]
    boxes_as(lambda x, y, w, h, *_: [x, y, x + w, y + h])(document)
    (problem,) = (p for p in check_dataset(write_dataset(tmp_path, document)).problems if "corner" in p.kind)
    assert "x_min, y_min, x_max, y_max" in str(problem)
    assert problem.count == 3


def test_only_crowds_are_refused(tmp_path):
    document = make_document()
    for entry in document["annotations"]:
        entry["iscrowd"] = 1
    with pytest.raises(AnnotationError, match="all 4 objects are crowds"):
        check_dataset(write_dataset(tmp_path, document))


def test_names_that_differ_in_case_or_blanks_are_pointed_out(tmp_path):
    document = make_document()
    document["categories"].append({"id": 91, "name": " Dog"})
    (problem,) = check_dataset(write_dataset(tmp_path, document)).problems
    assert problem.kind == "similar_names"
    assert "' Dog' and 'dog'" in problem.example


def test_a_root_category_is_left_out_unless_it_has_objects(tmp_path):
    document = make_document()
    for category in document["categories"]:
        category["supercategory"] = "pets"
    document["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
    report = check_dataset(write_dataset(tmp_path, document), strict=True)
    assert report.dataset.id2label == {0: "cat", 1: "dog", 2: "brush"}
    document["annotations"][0]["category_id"] = 0
    assert check_dataset(write_dataset(tmp_path, document)).dataset.num_labels == 4


def test_the_frame_is_that_of_the_stated_sizes(tmp_path):
    dataset = write_dataset(tmp_path)
    give_orientation(tmp_path / "images" / "a.jpg")
    stored = check_dataset(dataset, strict=True).dataset
    assert (stored.upright, stored[0][0].size) == (False, (60, 40))
    document = make_document()
    document["images"][0].update(width=40, height=60)
    (tmp_path / "instances.json").write_text(json.dumps(document))
    shown = check_dataset(DetectionDataset.from_coco(tmp_path / "images", tmp_path / "instances.json"))
    assert (shown.dataset.upright, shown.dataset[0][0].size) == (True, (40, 60))
    assert [problem.kind for problem in shown.problems] == ["upright_images"]


def test_objects_of_one_box_may_have_different_masks(tmp_path):
    document = make_document()
    other = {**document["annotations"][0], "id": 9, "segmentation": [[6, 6, 9, 6, 9, 9, 6, 9]]}
    document["annotations"].append(other)
    assert check_dataset(write_dataset(tmp_path, document)).objects == 5
    other["segmentation"] = document["annotations"][0]["segmentation"]
    assert check_dataset(write_dataset(tmp_path, document)).objects == 4


def test_annotations_of_an_image_that_is_listed_twice_are_put_together(tmp_path):
    document = make_document()
    document["images"].append({**document["images"][0], "id": 9})
    document["annotations"][1]["image_id"] = 9
    document["annotations"].append({**document["annotations"][0], "id": 5, "image_id": 9})
    report = check_dataset(write_dataset(tmp_path, document))
    assert [(p.kind, p.count) for p in report.problems] == [
        ("duplicate_file_name", 1),
        ("identical_annotation", 1),
    ]
    assert [a["image_id"] for a in report.dataset.document["annotations"]] == [1, 1, 2, 2]
