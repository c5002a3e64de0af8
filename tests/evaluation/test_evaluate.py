from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from detrkit import DetectionConfig, Detections
from detrkit.data import coco as data_coco
from detrkit.data import documents
from detrkit.errors import AnnotationError, SettingError
from detrkit.evaluation import coco, evaluate_detector, evaluate_predictions
from detrkit.evaluation.evaluate import Evaluation
from detrkit.results.panoptic import PanopticSegmentation

NAMES = {0: "N/A", 1: "sky", 2: "cat", 3: "dog"}
SIZES = {"a.png": (40, 30), "sub/b.png": (50, 60), "c.png": (40, 30)}
CATEGORIES = [{"id": 17, "name": "Cat", "isthing": 1}, {"id": 40, "name": "Sky", "isthing": 0}]
OBJECT = (5, 10, 25, 20)
"""Corners in pixels of the cat in every image; all around it is sky, but the first row is void."""


class PerfectDetector:
    """Finds what is there, and with less confidence a dog, which the data set does not know."""

    names = NAMES
    detection_config = DetectionConfig()

    def with_config(self, config: DetectionConfig, tiles: object = None) -> PerfectDetector:
        return self

    def __init__(self, *, has_masks: bool = False, dilation: bool = False) -> None:
        self.has_masks = has_masks
        self.config = SimpleNamespace(dilation=dilation)
        self.calls: list[dict] = []

    def stream(self, images, threshold, batch_size, *, masks, exif_orientation) -> Iterator[Detections]:
        self.calls.append({"threshold": threshold, "batch_size": batch_size, "masks": masks})
        for path in images:
            width, height = size_of(path)
            x0, y0, x1, y1 = OBJECT
            mask = np.zeros((2, height, width), dtype=bool)
            mask[0, y0:y1, x0:x1] = True
            yield Detections(
                boxes=np.array([OBJECT, (0, 0, 9, 9)], dtype=np.float32),
                scores=np.array([0.75, 0.5], dtype=np.float32),
                labels=np.array([2, 3]),
                names=["cat", "dog"],
                image_size=(height, width),
                masks=mask if masks else None,
            )

    def stream_segments(
        self, images, threshold, batch_size, *, exif_orientation
    ) -> Iterator[PanopticSegmentation]:
        self.calls.append({"threshold": threshold, "batch_size": batch_size})
        for path in images:
            width, height = size_of(path)
            ids = true_segments(width, height)
            ids[0] = 9  # a dog, where the truth is void
            segments = [
                {"id": i, "category_id": c, "isthing": c != 1, "area": int((ids == i).sum()), "score": 0.9}
                for i, c in ((1, 1), (300, 2), (9, 3))
            ]
            names = [NAMES[s["category_id"]] for s in segments]
            yield PanopticSegmentation(ids, segments, names, image_size=(height, width))


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def true_segments(width: int, height: int) -> np.ndarray:
    ids = np.full((height, width), 1, dtype=np.int32)
    ids[0] = 0
    ids[OBJECT[1] : OBJECT[3], OBJECT[0] : OBJECT[2]] = 300
    return ids


@pytest.fixture
def data_set(tmp_path: Path) -> SimpleNamespace:
    """Three images with instance and panoptic annotations."""
    x0, y0, x1, y1 = OBJECT
    images, instances, panoptic = [], [], []
    for image_id, (name, (width, height)) in enumerate(SIZES.items(), start=7):
        for folder in ("images", "panoptic"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), "grey").save(tmp_path / "images" / name)
        ids = true_segments(width, height)
        Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], axis=-1).astype(np.uint8)).save(
            tmp_path / "panoptic" / name
        )
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        instances.append(
            {
                "id": image_id,
                "image_id": image_id,
                "category_id": 17,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
            }
        )
        segments = [{"id": 1, "category_id": 40}, {"id": 300, "category_id": 17}]
        panoptic.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    paths = SimpleNamespace(
        images=tmp_path / "images",
        panoptic_dir=tmp_path / "panoptic",
        instances=tmp_path / "instances.json",
        panoptic=tmp_path / "panoptic.json",
    )
    for path, entries in ((paths.instances, instances), (paths.panoptic, panoptic)):
        path.write_text(json.dumps({"images": images, "annotations": entries, "categories": CATEGORIES}))
    return paths


def evaluate(data_set: SimpleNamespace, detector=None, **options) -> Evaluation:
    return evaluate_detector(detector or PerfectDetector(), data_set.images, data_set.instances, **options)


def evaluate_panoptic(data_set: SimpleNamespace, detector=None, **options) -> Evaluation:
    return evaluate_detector(
        detector or PerfectDetector(has_masks=True),
        data_set.images,
        data_set.panoptic,
        panoptic_dir=data_set.panoptic_dir,
        **options,
    )


def test_boxes(data_set: SimpleNamespace) -> None:
    detector = PerfectDetector()
    evaluation = evaluate(data_set, detector, batch_size=2)
    assert detector.calls == [{"threshold": 0, "batch_size": 2, "masks": False}]  # as COCO asks, all scores
    assert (evaluation.images, evaluation.masks, evaluation.panoptic) == (3, None, None)
    assert evaluation.stats["AP"] == 1
    assert evaluation.stats is evaluation.boxes.stats
    assert 0 < evaluation.seconds_per_image < 1
    assert {entry["category_id"] for entry in evaluation.results["bbox"]} == {17}
    assert [entry["image_id"] for entry in evaluation.results["bbox"]] == [7, 8, 9]


def test_masks_are_evaluated_where_there_are_any(data_set: SimpleNamespace) -> None:
    evaluation = evaluate(data_set, PerfectDetector(has_masks=True))
    assert evaluation.masks.stats["AP"] == evaluation.boxes.stats["AP"] == 1
    assert evaluate(data_set, PerfectDetector(has_masks=True), masks=False).masks is None
    document = json.loads(data_set.instances.read_text())
    for annotation in document["annotations"]:
        del annotation["segmentation"]
    data_set.instances.write_text(json.dumps(document))
    assert evaluate(data_set, PerfectDetector(has_masks=True)).masks is None


def test_panoptic_quality(data_set: SimpleNamespace) -> None:
    detector = PerfectDetector(has_masks=True)
    evaluation = evaluate_panoptic(data_set, detector, threshold=0.6)
    assert detector.calls == [{"threshold": 0.6, "batch_size": 1}]
    assert evaluation.stats == {"PQ": 1, "SQ": 1, "RQ": 1, "PQthings": 1, "PQstuff": 1}
    assert [c.true_positives for c in evaluation.panoptic.categories] == [3, 3]
    assert evaluation.boxes is None


def test_limit_takes_the_first_images(data_set: SimpleNamespace) -> None:
    evaluation = evaluate(data_set, limit=2)
    assert evaluation.images == 2
    assert evaluation.boxes.categories[0].objects == 2
    assert evaluate_panoptic(data_set, limit=1).panoptic.images == 1
    with pytest.raises(SettingError, match="limit must be at least 1"):
        evaluate(data_set, limit=0)


def test_everything_goes_into_json(data_set: SimpleNamespace) -> None:
    both = json.loads(json.dumps(evaluate(data_set, PerfectDetector(has_masks=True)).to_dict()))
    assert both.keys() == {"settings", "images", "seconds_per_image", "boxes", "masks"}
    assert both["boxes"]["AP"] == 1
    assert both["masks"]["per_class"][0]["name"] == "Cat"
    assert json.loads(json.dumps(evaluate_panoptic(data_set).to_dict()))["panoptic"]["All"]["pq"] == 1


def test_results_are_saved(data_set: SimpleNamespace, tmp_path: Path) -> None:
    from detrkit.evaluation import evaluate_results

    evaluation = evaluate(data_set, PerfectDetector(has_masks=True))
    files = evaluation.save(tmp_path / "out")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    assert len(files) == 12
    for iou_type, name in (("bbox", "boxes"), ("segm", "masks")):
        again = evaluate_results(data_set.instances, tmp_path / "out" / f"{name}_results.json", iou_type)
        assert again.stats == getattr(evaluation, name).stats
    (table,) = evaluate_panoptic(data_set).save(tmp_path / "out")
    assert table.read_text().splitlines()[1] == "17,Cat,1,1.0,1.0,1.0,3,0,0"


def test_dc5_models_want_one_image_at_a_time(data_set: SimpleNamespace) -> None:
    with pytest.warns(UserWarning, match="one image at a time; at batch size 4"):
        evaluate(data_set, PerfectDetector(dilation=True), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(data_set, PerfectDetector(dilation=True))
        evaluate(data_set, PerfectDetector(), batch_size=4)


def test_predictions_in_files_give_the_same_numbers(data_set: SimpleNamespace, tmp_path: Path) -> None:
    evaluation = evaluate(data_set, PerfectDetector(has_masks=True))
    evaluation.save(tmp_path / "out")
    boxes = evaluate_predictions(data_set.instances, tmp_path / "out" / "boxes_results.json")
    assert (boxes.boxes.stats, boxes.masks) == (evaluation.boxes.stats, None)
    assert boxes.seconds_per_image is None
    masks = evaluate_predictions(data_set.instances, tmp_path / "out" / "masks_results.json")
    assert (masks.masks.stats, masks.boxes) == (evaluation.masks.stats, None)
    panoptic = evaluate_predictions(
        data_set.panoptic, data_set.panoptic, panoptic_dir=data_set.panoptic_dir
    )  # itself, with the PNG files in the folder of its name
    assert panoptic.panoptic == evaluate_panoptic(data_set).panoptic
    document = {"images": [], "annotations": evaluation.results["bbox"], "categories": []}
    (tmp_path / "document.json").write_text(json.dumps(document))
    assert evaluate_predictions(data_set.instances, tmp_path / "document.json").stats == evaluation.stats
    (tmp_path / "nothing.json").write_text("[]")
    nothing = evaluate_predictions(data_set.instances, tmp_path / "nothing.json")
    assert nothing.stats["AP"] == 0
    assert len(nothing.save(tmp_path / "nothing")) == 6


# Mistakes


def test_the_ground_truth_is_read_once(
    data_set: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    read_lists = documents.read_lists
    for module in (coco, data_coco):
        monkeypatch.setattr(module, "read_lists", lambda *given: read.append(given[0]) or read_lists(*given))
    found = evaluate(data_set, PerfectDetector(has_masks=True))
    assert found.masks is not None
    assert read == [data_set.instances]
    entries = [{**box, **mask} for box, mask in zip(found.results["bbox"], found.results["segm"])]
    (tmp_path / "both.json").write_text(json.dumps(entries))
    again = evaluate_predictions(data_set.instances, tmp_path / "both.json")
    assert (again.boxes is None, again.masks is None) == (False, False)
    assert read == [data_set.instances] * 2


def test_an_error_names_the_file_of_the_predictions(data_set: SimpleNamespace, tmp_path: Path) -> None:
    predictions = tmp_path / "found.json"
    predictions.write_text(json.dumps([{"image_id": 1, "category_id": 17, "bbox": [0, 0, 1, 1]}]))
    with pytest.raises(AnnotationError, match=r"detection 0 of .*found\.json has no 'score'"):
        evaluate_predictions(data_set.instances, predictions)


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_missing_images(data_set: SimpleNamespace) -> None:
    (data_set.images / "c.png").unlink()
    with pytest.raises(
        AnnotationError, match=r"instances\.json has problems. image file missing: 1 .*c\.png"
    ):
        evaluate(data_set, strict=True)
    assert evaluate(data_set).images == 2
    (data_set.images / "empty").mkdir()
    data_set.images = data_set.images / "empty"
    with pytest.raises(AnnotationError, match=r"no usable image is left. image file missing: 3 .*a\.png"):
        evaluate(data_set)
    data_set.images = data_set.images / "nowhere"
    with pytest.raises(AnnotationError, match=r"nowhere: folder of images not found"):
        evaluate(data_set)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"].clear(), "no usable object is left"),
        (lambda d: d["categories"][0].update(name="Bird"), r"no class for category 17 \(Bird\)"),
        (lambda d: d["images"][1].update(width=51), "sub/b.png is 50x60, not 51x60"),
        (lambda d: d["images"][1].pop("file_name"), "image 2 in the list has no file_name"),
    ],
)
def test_annotations_that_do_not_fit(data_set: SimpleNamespace, change, message: str) -> None:
    edit(data_set.instances, change)
    with pytest.raises(AnnotationError, match=message):
        evaluate(data_set, strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"].clear(), "no usable image is left"),
        (lambda d: d["annotations"][1].pop("segments_info"), "annotation of image 8 has no segments_info"),
        (
            lambda d: d["annotations"][1]["segments_info"][0].pop("category_id"),
            "a segment of image 8 has no category_id",
        ),
        (lambda d: d["annotations"][1].update(image_id=3), "not listed: 1 .*image 3"),
        (lambda d: d["categories"][1].pop("isthing"), "category 40 has no 'isthing'"),
        (lambda d: d["annotations"][1].update(file_name="x.png"), "panoptic PNG missing.*1 .*x.png"),
    ],
)
def test_panoptic_annotations_that_do_not_fit(data_set: SimpleNamespace, change, message: str) -> None:
    edit(data_set.panoptic, change)
    with pytest.raises(AnnotationError, match=message):
        evaluate_panoptic(data_set, strict=True)


def test_a_model_without_masks_has_no_panoptic_quality(data_set: SimpleNamespace) -> None:
    with pytest.raises(SettingError, match="detects boxes only"):
        evaluate_panoptic(data_set, PerfectDetector())


def test_instance_annotations_are_not_panoptic_ones(data_set: SimpleNamespace) -> None:
    data_set.panoptic = data_set.instances
    with pytest.raises(AnnotationError, match=r"instances\.json has no panoptic annotations"):
        evaluate_panoptic(data_set)


def test_panoptic_annotations_are_not_instances(data_set: SimpleNamespace) -> None:
    data_set.instances = data_set.panoptic
    with pytest.raises(
        AnnotationError, match=r"panoptic\.json contains panoptic annotations; also pass .* PNG files"
    ):
        evaluate(data_set)
