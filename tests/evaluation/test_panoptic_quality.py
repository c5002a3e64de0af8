from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrkit.errors import AnnotationError
from detrkit.evaluation.panoptic_files import panoptic_quality_of_files
from detrkit.evaluation.panoptic_quality import PanopticQuality, PanopticResult
from tests.golden import DATA, PANOPTIC, needs_data

CATEGORIES = [
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 100, "name": "sky", "isthing": 0},
    {"id": 200, "name": "road", "isthing": 0},
]


def segments(ids: np.ndarray, categories: dict[int, int], crowds: tuple[int, ...] = ()) -> list[dict]:
    """A ``segments_info`` for a map, whose areas are counted."""
    return [
        {"id": i, "category_id": c, "iscrowd": int(i in crowds), "area": int((ids == i).sum())}
        for i, c in categories.items()
    ]


def quality_of(
    predicted: np.ndarray,
    predicted_categories: dict[int, int],
    true: np.ndarray,
    true_categories: dict[int, int],
    crowds: tuple[int, ...] = (),
) -> PanopticResult:
    quality = PanopticQuality(CATEGORIES)
    predicted, true = np.array(predicted), np.array(true)
    quality.update(
        predicted,
        segments(predicted, predicted_categories),
        true,
        segments(true, true_categories, crowds),
        image_id=3,
    )
    return quality.result()


def counts_of(result: PanopticResult) -> dict[int, tuple[int, int, int]]:
    """True positives, false positives and false negatives of the categories that have any."""
    return {
        c.id: (c.true_positives, c.false_positives, c.false_negatives)
        for c in result.categories
        if c.true_positives or c.false_positives or c.false_negatives
    }


# The rules, on a row of ten pixels


def test_a_pair_matches_above_half_an_iou() -> None:
    result = quality_of(
        [[0, 0, 0, 5, 5, 5, 5, 5, 5, 5]], {5: 1}, [[9, 9, 2, 2, 2, 2, 2, 2, 2, 2]], {9: 100, 2: 1}
    )
    assert counts_of(result) == {1: (1, 0, 0), 100: (0, 0, 1)}
    assert result.categories[0].sq == pytest.approx(7 / 8, abs=1e-12)
    assert result.things.pq == pytest.approx(7 / 8, abs=1e-12)
    assert (result.stuff.pq, result.stuff.n, result.all.n) == (0, 1, 2)
    assert result.all.pq == pytest.approx(7 / 16, abs=1e-12)


def test_a_pair_of_exactly_half_does_not_match() -> None:
    result = quality_of(
        [[5, 5, 8, 8, 8, 8, 8, 8, 8, 8]], {5: 1, 8: 7}, [[2, 2, 2, 2, 6, 6, 6, 6, 6, 6]], {2: 1, 6: 7}
    )
    assert counts_of(result) == {1: (0, 1, 1), 7: (1, 0, 0)}


def test_only_segments_of_one_category_match() -> None:
    result = quality_of([[5] * 10], {5: 1}, [[2] * 10], {2: 7})
    assert counts_of(result) == {1: (0, 1, 0), 7: (0, 0, 1)}


def test_void_pixels_are_left_out_of_the_predicted_segment() -> None:
    result = quality_of([[5] * 10], {5: 1}, [[0, 0, 0, 0, 0, 0, 2, 2, 2, 2]], {2: 1})
    assert counts_of(result) == {1: (1, 0, 0)}
    assert result.categories[0].sq == 1


def test_a_prediction_mostly_over_void_is_no_mistake() -> None:
    true = [[0, 0, 0, 0, 0, 0, 2, 2, 2, 2]]
    assert counts_of(quality_of([[5] * 10], {5: 7}, true, {2: 1})) == {1: (0, 0, 1)}
    half = [[0, 5, 5, 5, 5, 5, 5, 5, 5, 5]]  # five of nine pixels are void
    assert counts_of(quality_of(half, {5: 7}, true, {2: 1})) == {1: (0, 0, 1)}
    less = [[0, 0, 5, 5, 5, 5, 5, 5, 5, 5]]  # four of eight: exactly half does not excuse
    assert counts_of(quality_of(less, {5: 7}, true, {2: 1})) == {1: (0, 0, 1), 7: (0, 1, 0)}


def test_a_crowd_is_neither_missed_nor_matched_and_excuses_its_own_category() -> None:
    true, categories = [[2] * 6 + [3] * 4], {2: 1, 3: 100}
    predicted = [[5] * 6 + [0] * 4]
    assert counts_of(quality_of(predicted, {5: 1}, true, categories, crowds=(2,))) == {100: (0, 0, 1)}
    assert counts_of(quality_of(predicted, {5: 7}, true, categories, crowds=(2,))) == {
        7: (0, 1, 0),
        100: (0, 0, 1),
    }


def test_void_and_crowd_excuse_together() -> None:
    true = [[0, 0, 0, 2, 2, 2, 3, 3, 3, 3]]
    assert counts_of(quality_of([[5] * 10], {5: 1}, true, {2: 1, 3: 100}, crowds=(2,))) == {100: (0, 0, 1)}


def test_a_predicted_segment_may_have_the_id_0_when_it_is_listed() -> None:
    result = quality_of([[0] * 6 + [1] * 4], {0: 1, 1: 7}, [[2] * 6 + [3] * 4], {2: 1, 3: 7})
    assert counts_of(result) == {1: (1, 0, 0), 7: (1, 0, 0)}


def test_no_segments_at_all() -> None:
    result = quality_of([[0] * 10], {}, [[0] * 10], {})
    assert counts_of(result) == {}
    assert result.all.n == 0
    assert result.to_dict()["All"] == {"pq": None, "sq": None, "rq": None, "n": 0}
    assert result.table().row_count == 3


# Against a plain count, segment by segment


def plain_counts(predicted, predicted_info, true, true_info) -> dict[int, list[float]]:
    """IoU sum, true positives, false positives, false negatives by category, from one mask a segment."""
    counts = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}
    found, explained = set(), set()
    for p in predicted_info:
        mask = (predicted == p["id"]) & (true != 0)
        for t in true_info:
            if t["category_id"] == p["category_id"] and not t["iscrowd"]:
                other = true == t["id"]
                iou = (mask & other).sum() / (mask | other).sum()
                if iou > 0.5:
                    counts[p["category_id"]][0] += iou
                    counts[p["category_id"]][1] += 1
                    found.add(t["id"])
                    explained.add(p["id"])
    for p in predicted_info:
        mask = predicted == p["id"]
        crowd = [t["id"] for t in true_info if t["iscrowd"] and t["category_id"] == p["category_id"]]
        if p["id"] not in explained and np.isin(true[mask], [0, *crowd]).mean() <= 0.5:
            counts[p["category_id"]][2] += 1
    for t in true_info:
        if t["id"] not in found and not t["iscrowd"]:
            counts[t["category_id"]][3] += 1
    return counts


@given(seed=st.integers(0, 2**32 - 1), shift=st.integers(0, 3))
@settings(max_examples=60)
def test_the_counts_are_those_of_one_mask_a_segment(seed: int, shift: int) -> None:
    generator = np.random.default_rng(seed)
    quality = PanopticQuality(CATEGORIES)
    total = {c["id"]: np.zeros(4) for c in CATEGORIES}
    for _ in range(2):
        true = np.kron(generator.integers(0, 6, (3, 3)), np.ones((4, 4), int))
        predicted = np.roll(true, shift, axis=1) * 3  # alike, but displaced
        predicted[:3] = generator.integers(0, 6, (1, 12)) * 3
        categories = {i: int(generator.choice([1, 7, 100])) for i in range(1, 6)}
        crowd_of = {}  # at most one crowd a category, as COCO has it
        for i in range(1, 6):
            if generator.random() < 0.3:
                crowd_of[categories[i]] = i
        true_info = segments(
            true, {i: c for i, c in categories.items() if (true == i).any()}, tuple(crowd_of.values())
        )
        predicted_info = segments(
            predicted,
            {
                3 * i: categories[i] if generator.random() < 0.8 else 200
                for i in range(1, 6)
                if (predicted == 3 * i).any()
            },
        )
        quality.update(predicted.astype(np.int32), predicted_info, true.astype(np.uint16), true_info)
        for category, counts in plain_counts(predicted, predicted_info, true, true_info).items():
            total[category] += counts
    for category in quality.result().categories:
        iou, tp, fp, fn = total[category.id]
        assert (category.true_positives, category.false_positives, category.false_negatives) == (tp, fp, fn)
        assert category.pq == pytest.approx(iou / (tp + fp / 2 + fn / 2) if tp + fp + fn else 0, abs=1e-12)
        assert category.sq == pytest.approx(iou / tp if tp else 0, abs=1e-12)
        assert category.rq == pytest.approx(tp / (tp + fp / 2 + fn / 2) if tp + fp + fn else 0, abs=1e-12)


# What panopticapi gives


def assert_as_panopticapi(result: PanopticResult, expected: dict) -> None:
    found = result.to_dict()
    for group in ("All", "Things", "Stuff"):
        assert found[group].keys() == expected[group].keys()
        for name, value in expected[group].items():
            assert found[group][name] == pytest.approx(value, abs=1e-9), (group, name)
    assert found["per_class"].keys() == expected["per_class"].keys()
    for category, scores in expected["per_class"].items():
        for name, value in scores.items():
            assert found["per_class"][category][name] == pytest.approx(value, abs=1e-9), (category, name)


@pytest.mark.parametrize("processes", [1, 2])
def test_the_numbers_are_panopticapis(processes: int) -> None:
    result = panoptic_quality_of_files(
        PANOPTIC / "panoptic_val2017.json",
        PANOPTIC / "panoptic_predictions.json",
        processes=processes,
    )
    assert result.images == 20
    assert_as_panopticapi(result, json.loads((PANOPTIC / "panoptic_quality.json").read_text()))


SAMPLE = DATA / "panopticapi_sample"


@pytest.mark.parametrize(
    ("path", "folder", "categories"),
    [
        (PANOPTIC / "panoptic_val2017.json", None, 86),
        pytest.param(SAMPLE / "panoptic_examples.json", SAMPLE / "panoptic_examples", 8, marks=needs_data),
    ],
    ids=["COCO", "panopticapi"],
)
def test_the_ground_truth_is_perfect(path: Path, folder: Path | None, categories: int) -> None:
    result = panoptic_quality_of_files(path, path, folder, folder)
    for scores in (result.all, result.things, result.stuff):
        assert (scores.pq, scores.sq, scores.rq) == (1, 1, 1)
    assert result.all.n == categories


# Files


def write_panoptic(
    folder: Path, name: str, maps: dict[int, np.ndarray], infos: dict[int, list[dict]]
) -> Path:
    """A COCO panoptic JSON and its folder of PNG files."""
    (folder / name).mkdir(parents=True)
    annotations = []
    for image_id, ids in maps.items():
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(colours).save(folder / name / f"{image_id}.png")
        annotations.append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos[image_id]}
        )
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"annotations": annotations, "categories": CATEGORIES}))
    return path


@pytest.fixture
def data_set(tmp_path: Path) -> tuple[Path, Path]:
    """Ground truth and predictions of three images, with ids that need all three channels."""
    truth, predictions, true_infos, predicted_infos = {}, {}, {}, {}
    for image_id in (4, 5, 6):
        ids = np.kron(np.arange(1, 7).reshape(2, 3) * 70_001, np.ones((8, 8), int))
        categories = {70_001 * i: CATEGORIES[i % 4]["id"] for i in range(1, 7)}
        truth[image_id], predictions[image_id] = ids, np.roll(ids, image_id - 4, axis=1)
        true_infos[image_id] = segments(ids, categories)
        predicted_infos[image_id] = segments(predictions[image_id], categories)
    return (
        write_panoptic(tmp_path, "truth", truth, true_infos),
        write_panoptic(tmp_path, "predictions", predictions, predicted_infos),
    )


def test_files_give_what_arrays_give(data_set: tuple[Path, Path]) -> None:
    from_files = panoptic_quality_of_files(*data_set)
    quality = PanopticQuality(CATEGORIES)
    documents = [json.loads(path.read_text()) for path in data_set]
    for true, predicted in zip(*(document["annotations"] for document in documents)):
        maps = []
        for path, annotation in zip(data_set, (true, predicted)):
            colours = np.array(Image.open(path.with_suffix("") / annotation["file_name"])).astype(int)
            maps.append(colours @ [1, 256, 65536])
        quality.update(maps[1], predicted["segments_info"], maps[0], true["segments_info"])
    assert quality.result() == from_files
    assert 0 < from_files.all.pq < 1
    assert from_files.category_table().row_count == 4


def test_predictions_with_categories_of_their_own_are_matched_by_name(data_set: tuple[Path, Path]) -> None:
    expected = panoptic_quality_of_files(*data_set)
    document = json.loads(data_set[1].read_text())
    for category in document["categories"]:
        category["id"] += 500
        category["name"] = category["name"].upper()
    for annotation in document["annotations"]:
        for segment in annotation["segments_info"]:
            segment["category_id"] += 500
    data_set[1].write_text(json.dumps(document))
    assert panoptic_quality_of_files(*data_set) == expected
    document["categories"][0]["name"] = "alien"  # no longer a person, so its segments are void
    data_set[1].write_text(json.dumps(document))
    result = panoptic_quality_of_files(*data_set)
    person, *others = result.categories
    assert (person.true_positives, person.false_positives, person.false_negatives) == (0, 0, 3)
    assert others == list(expected.categories[1:])
    del document["categories"]
    data_set[1].write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match="has category 507, which the data set does not have"):
        panoptic_quality_of_files(*data_set)


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def drop_image(document: dict) -> None:
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] == 4]


def drop_segment(document: dict) -> None:
    del document["annotations"][1]["segments_info"][2]


def invent_segment(document: dict) -> None:
    document["annotations"][1]["segments_info"].append({"id": 12, "category_id": 1})


def repeat_segment(document: dict) -> None:
    document["annotations"][1]["segments_info"].append({"id": 70_001, "category_id": 1})


def invent_category(document: dict) -> None:
    document["annotations"][1]["segments_info"][2]["category_id"] = 999


def forget_segments(document: dict) -> None:
    del document["annotations"][1]["segments_info"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_image, r"predictions\.json has no prediction for image 5 and 1 more"),
        (
            drop_segment,
            r"image 5: the predicted map contains segment 210003, which segments_info does not list",
        ),
        (invent_segment, r"image 5: segments_info lists segment 12, of which the predicted map has no pixel"),
        (repeat_segment, r"image 5: predicted segment 70001 is listed twice"),
        (
            invent_category,
            r"image 5: predicted segment 210003 has category 999, which the data set does not have",
        ),
        (forget_segments, r"a predicted panoptic annotation of image 5 has no 'segments_info'"),
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_predictions_that_do_not_fit(
    data_set: tuple[Path, Path], change, message: str, processes: int
) -> None:
    edit(data_set[1], change)
    with pytest.raises(AnnotationError, match=message):
        panoptic_quality_of_files(*data_set, processes=processes)


def test_a_missing_png(data_set: tuple[Path, Path]) -> None:
    (data_set[1].with_suffix("") / "6.png").unlink()
    with pytest.raises(AnnotationError, match=r"image 6: the predicted map.*6\.png"):
        panoptic_quality_of_files(*data_set)
    shutil.rmtree(data_set[1].with_suffix(""))
    with pytest.raises(AnnotationError, match=r"predictions: no such folder, but the PNG files"):
        panoptic_quality_of_files(*data_set)


def test_a_png_of_another_size(data_set: tuple[Path, Path]) -> None:
    Image.new("RGB", (5, 4)).save(data_set[1].with_suffix("") / "4.png")
    with pytest.raises(
        AnnotationError, match="image 4: the predicted map has 5x4 pixels, the true one 24x16"
    ):
        panoptic_quality_of_files(*data_set)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*truth.json: No such file"),
        ("{", "truth.json is not a JSON file"),
        ("[]", "truth.json is not a COCO document: it contains a list"),
        ('{"annotations": [{}]}', "no list of categories"),
        ('{"annotations": [], "categories": [{}]}', "has no annotations, so nothing can be evaluated"),
        ('{"annotations": [{"image_id": 1}], "categories": [{}]}', "of image 1 has no 'file_name'"),
    ],
)
def test_a_ground_truth_that_is_none(data_set: tuple[Path, Path], content: str | None, message: str) -> None:
    data_set[0].unlink()
    if content is not None:
        data_set[0].write_text(content)
    with pytest.raises(AnnotationError, match=message):
        panoptic_quality_of_files(*data_set)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((4, 4)), r"must be a \(height, width\) array of whole numbers, not float64"),
        (np.zeros((4, 4, 3), int), "must be a"),
        (np.full((4, 4), -1), "ids below 0"),
    ],
)
def test_a_map_that_is_none(ids: np.ndarray, message: str) -> None:
    with pytest.raises(AnnotationError, match=f"image 8: the predicted map.*{message}"):
        PanopticQuality(CATEGORIES).update(ids, [], np.zeros((4, 4), int), [], image_id=8)


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        ([], "at least one category"),
        ([{"id": 1}], "category 1 has no 'isthing'"),
        ([{"id": 1, "isthing": 1}, {"id": 1, "isthing": 0}], "same id"),
    ],
)
def test_categories_that_are_none(categories: list[dict], message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        PanopticQuality(categories)
