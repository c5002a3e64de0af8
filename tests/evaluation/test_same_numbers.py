"""Whatever is wrong with a data set: training and ``evaluate`` measure the same, or both refuse."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detrkit.data import DetectionDataset, check_dataset
from detrkit.errors import DetrkitError
from detrkit.evaluation import evaluate_dataset, evaluate_detector, evaluate_predictions
from tests.evaluation.test_evaluate import PerfectDetector, data_set  # noqa: F401

VALUES = st.sampled_from(
    [None, 0, 1, -1, 7, "7", 8.0, 17, 40, "Cat", "", [], [5, 10, 20, 10], [0, 0, 0, 9], True]
)
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["images", "annotations", "categories"]),
        st.integers(0, 2),
        st.sampled_from(["set", "drop", "again", "remove"]),
        st.sampled_from(["id", "image_id", "category_id", "bbox", "iscrowd", "file_name", "width", "name"]),
        VALUES,
    ),
    max_size=4,
)


def change(document: dict[str, Any], changes: list) -> None:
    for table, place, what, key, value in changes:
        entries = document[table]
        if not entries:
            continue
        entry = entries[place % len(entries)]
        if what == "set":
            entry[key] = value
        elif what == "drop":
            entry.pop(key, None)
        elif what == "again":
            entries.append({**copy.deepcopy(entry), "id": entry.get("id") if value is None else 99})
        else:
            entries.remove(entry)


def outcome(measure) -> object:
    try:
        return measure().stats
    except DetrkitError:
        return "refused"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_training_and_evaluate_agree(data_set: SimpleNamespace, changes: list) -> None:  # noqa: F811
    document = json.loads(data_set.instances.read_text())
    change(document, changes)
    path = data_set.instances.with_name("changed.json")
    path.write_text(json.dumps(document))
    detector = PerfectDetector()

    def in_training():
        return evaluate_dataset(
            detector, check_dataset(DetectionDataset.from_coco(data_set.images, path)).dataset
        )

    assert outcome(in_training) == outcome(lambda: evaluate_detector(detector, data_set.images, path))


def test_images_are_read_in_the_frame_of_the_data_set(data_set: SimpleNamespace) -> None:  # noqa: F811
    frames = []

    class Watching(PerfectDetector):
        def stream(self, *given, exif_orientation, **options):
            frames.append(exif_orientation)
            return super().stream(*given, exif_orientation=exif_orientation, **options)

    for upright in (False, True):
        dataset = DetectionDataset.from_coco(data_set.images, data_set.instances, exif_orientation=upright)
        evaluate_dataset(Watching(), dataset)
    assert frames == [False, True]


def test_an_image_that_breaks_late_is_left_out_and_named(data_set: SimpleNamespace, caplog) -> None:  # noqa: F811
    from detrkit.errors import ImageError

    class Reading(PerfectDetector):
        def stream(self, images, *given, **options):
            for path in images:
                if path.name == "b.png":
                    raise ImageError(f"{path}: cut short")
                yield from super().stream([path], *given, **options)

    path = data_set.images / "sub" / "b.png"
    path.write_bytes(path.read_bytes()[:-30])
    evaluation = evaluate_detector(Reading(), data_set.images, data_set.instances)
    assert (evaluation.images, evaluation.stats["AP"]) == (2, 1)
    assert "b.png" in caplog.text
    with pytest.raises(ImageError, match=r"b\.png"):
        evaluate_detector(Reading(), data_set.images, data_set.instances, strict=True)


def test_a_detect_document_is_matched_by_names(data_set: SimpleNamespace, tmp_path: Path) -> None:  # noqa: F811
    right = evaluate_detector(PerfectDetector(), data_set.images, data_set.instances)
    truth = json.loads(data_set.instances.read_text())
    numbers = {image["id"]: place for place, image in enumerate(truth["images"], start=1)}
    document = {
        "images": [{"id": numbers[i["id"]], "file_name": i["file_name"]} for i in truth["images"]],
        "categories": [{"id": 0, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {**entry, "image_id": numbers[entry["image_id"]], "category_id": 1}
            for entry in right.results["bbox"]
        ],
    }
    path = tmp_path / "found.json"
    path.write_text(json.dumps(document))
    assert evaluate_predictions(data_set.instances, path).stats == right.stats
    document["categories"][1]["name"] = "cats"
    path.write_text(json.dumps(document))
    with pytest.raises(DetrkitError, match=r"no class for category 17 \(Cat\).*did you mean 'cats'"):
        evaluate_predictions(data_set.instances, path)
    document["categories"][1]["name"] = "cat"
    document["images"][0]["file_name"] = "other.png"
    path.write_text(json.dumps(document))
    with pytest.raises(DetrkitError, match=r"such as other\.png"):
        evaluate_predictions(data_set.instances, path)
