from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detrkit import DetectionConfig, Detections
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.errors import AnnotationError, SettingError
from detrkit.evaluation.calibrate import calibrate_detector, quick_settings
from detrkit.evaluation.calibration_charts import (
    calibration_outputs,
    comparison_table,
    save_calibration,
    threshold_table,
)
from detrkit.evaluation.choosing import Wishes
from detrkit.results.detection_config import DetectionRule

SIDE, IMAGES = 200, 26
NAMES = {0: "cell", 1: "platelet", 2: "dust"}


class Doubling:
    """Finds every object twice, and ghosts; its scores are far too low, and those of platelets lower."""

    names = NAMES
    has_masks = False
    detection_config = DetectionConfig()

    def __init__(self, truths: list[np.ndarray], config: DetectionConfig | None = None) -> None:
        self.truths = truths
        self.detection_config = config or DetectionConfig()

    @property
    def config(self) -> Any:
        return None

    def with_config(self, config: DetectionConfig, tiles: object = None) -> Doubling:
        return Doubling(self.truths, config)

    def stream(
        self, images: Sequence[Path], threshold: float, *args: Any, **options: Any
    ) -> Iterator[Detections]:
        for path in images:
            place = int(path.stem)
            rng = np.random.default_rng(place)
            objects = self.truths[place]
            shift = rng.uniform(-1, 1, (len(objects), 4))
            boxes = np.concatenate([objects[:, :4], objects[:, :4] + shift, objects[:, :4] % 90 + 5])
            labels = np.tile(objects[:, 4].astype(np.int64), 3)
            top = np.where(labels == 0, 0.4, 0.2)
            part = np.repeat([1.0, 0.9, 0.5], len(objects))
            scores = top * part * rng.uniform(0.7, 1, len(labels))
            order = np.argsort(-scores)
            found = Detections(
                boxes=boxes[order].astype(np.float32),
                scores=scores[order].astype(np.float32),
                labels=labels[order],
                names=[NAMES[label] for label in labels[order].tolist()],
                image_size=(SIDE, SIDE),
            )
            config = replace(self.detection_config, threshold=threshold)
            chosen, values = DetectionRule(config, NAMES).select(found.scores, found.labels, found.boxes)
            yield replace(found[chosen], scores=values)


@pytest.fixture(scope="module")
def truths() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    places = []
    for _ in range(IMAGES):
        number = int(rng.integers(2, 7))
        cells = rng.permutation(25)[:number]
        corners = np.stack([cells % 5, cells // 5], 1) * 40 + rng.uniform(0, 8, (number, 2))
        sizes = rng.uniform(20, 28, (number, 2))
        labels = rng.integers(0, 2, (number, 1))
        places.append(np.concatenate([corners, corners + sizes, labels], axis=1))
    return places


@pytest.fixture(scope="module")
def dataset(truths: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> DetectionDataset:
    folder = tmp_path_factory.mktemp("cells")
    document: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    document["categories"] = [{"id": 7 + label, "name": NAMES[label]} for label in (0, 1)]
    for place, objects in enumerate(truths):
        Image.new("RGB", (SIDE, SIDE)).save(folder / f"{place}.png")
        document["images"].append(
            {"id": place + 1, "file_name": f"{place}.png", "width": SIDE, "height": SIDE}
        )
        for x0, y0, x1, y1, label in objects.tolist():
            number = len(document["annotations"]) + 1
            entry = {"id": number, "image_id": place + 1, "category_id": 7 + int(label), "iscrowd": 0}
            document["annotations"].append({**entry, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    (folder / "cells.json").write_text(json.dumps(document))
    return check_dataset(DetectionDataset.from_coco(folder, folder / "cells.json")).dataset


def test_the_best_settings_are_chosen_and_their_worth_is_honest(
    truths: list[np.ndarray], dataset: DetectionDataset, tmp_path: Path
) -> None:
    detector = Doubling(truths)
    detector.detection_config = DetectionConfig(chosen={"training_scale": "that of the model", "images": 7})
    found = calibrate_detector(detector, dataset)
    config = found.config
    assert config.overlap is not None
    assert config.chosen["training_scale"] == "that of the model"
    assert found.before[""].recall == 0  # every score is below 0.5
    assert found.after[""].f1 > 0.95
    assert found.ap["after"]["AP"] > found.ap["before"]["AP"] + 0.05
    before, after = found.errors()
    assert after < before / 2
    assert config.chosen["images"] == IMAGES
    assert config.chosen["objects"]["cell"] == sum(int((one[:, 4] == 0).sum()) for one in truths)
    config.save_pretrained(tmp_path)  # as JSON
    assert DetectionConfig.from_pretrained(tmp_path).threshold == config.threshold

    written = save_calibration(found, tmp_path)
    assert [path.name for path in written] == [output.path.name for output in calibration_outputs(tmp_path)]
    assert all(output.is_own for output in calibration_outputs(tmp_path))
    assert threshold_table(found).row_count == 3  # no row for dust, which the data set does not have
    assert comparison_table(found).row_count == 6


def test_thresholds_of_each_class_where_they_are_better(
    truths: list[np.ndarray], dataset: DetectionDataset
) -> None:
    config = calibrate_detector(Doubling(truths), dataset, Wishes(scores="none")).config
    assert config.calibration is None
    assert isinstance(config.threshold, dict)
    assert config.threshold["cell"] > config.threshold["platelet"]
    assert set(config.threshold) == set(NAMES.values())
    one = calibrate_detector(Doubling(truths), dataset, Wishes(scores="none", per_class=False)).config
    assert isinstance(one.threshold, float)


def test_a_wish_for_precision_or_recall_is_met(truths: list[np.ndarray], dataset: DetectionDataset) -> None:
    detector = Doubling(truths)
    precise = calibrate_detector(detector, dataset, Wishes(precision=0.99, scores="none"))
    finding = calibrate_detector(detector, dataset, Wishes(recall=0.97, scores="none"))
    assert precise.after[""].precision > 0.95
    assert finding.after[""].recall > 0.93
    assert finding.config.least_threshold < precise.config.least_threshold
    with pytest.raises(SettingError, match=r"no threshold has a recall of 0\.999"):
        calibrate_detector(_Missing(truths), dataset, Wishes(recall=0.999))


class _Missing(Doubling):
    """Misses the first object of each image."""

    def with_config(self, config: DetectionConfig, tiles: object = None) -> _Missing:
        return _Missing(self.truths, config)

    def stream(
        self, images: Sequence[Path], threshold: float, *args: Any, **options: Any
    ) -> Iterator[Detections]:
        fewer = Doubling([one[1:] for one in self.truths], self.detection_config)
        yield from fewer.stream(images, threshold)


def test_a_guarantee_keeps_the_settings_and_moves_the_threshold_only(
    truths: list[np.ndarray], dataset: DetectionDataset
) -> None:
    own = DetectionConfig(overlap=0.7, threshold=0.9, chosen={"training_scale": {"image_size": [9, 9]}})
    found = calibrate_detector(Doubling(truths, own), dataset, Wishes(recall=0.8, confidence=0.9))
    assert found.config.overlap == 0.7
    assert found.config.calibration is None
    assert found.after[""].recall >= 0.8
    assert not found.config.chosen["measured"]["cross_fitted"]
    same = replace(own, chosen={"data": dataset.source})
    with pytest.warns(UserWarning, match="the guarantee is too optimistic"):
        calibrate_detector(Doubling(truths, same), dataset, Wishes(recall=0.8, confidence=0.9))
    assert found.config.chosen["training_scale"] == {"image_size": [9, 9]}


def test_settings_for_a_trained_model_are_left_alone_where_little_is_known(
    truths: list[np.ndarray], dataset: DetectionDataset
) -> None:
    settings = quick_settings(Doubling(truths), dataset, DetectionConfig())
    assert settings.overlap is not None
    assert settings.threshold != 0.5
    assert settings.chosen["images"] == IMAGES
    known = DetectionConfig(overlap=0.9)
    assert quick_settings(Doubling(truths), dataset, known).overlap == 0.9
    assert quick_settings(Doubling([one[:0] for one in truths]), dataset, known) == known


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"precision": 1.0}, "precision must be above 0 and below 1"),
        ({"precision": 0.9, "recall": 0.9}, "either a precision or a recall"),
        ({"confidence": 0.9}, "confidence requires recall"),
        ({"recall": 0.9, "confidence": 0.9, "per_class": True}, "leave out per-class"),
        ({"scores": "platt"}, "scores must be one of auto, none, temperature, isotonic"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Wishes(**wishes)


def test_one_image_is_too_few(truths: list[np.ndarray], dataset: DetectionDataset) -> None:
    with pytest.raises(AnnotationError, match="not enough to choose settings from"):
        calibrate_detector(Doubling(truths), dataset, limit=1)
