"""A detector's detections on annotated images, to be decided on with any settings and judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from detrkit.common.schema import Annotation
from detrkit.data.coco import DetectionDataset
from detrkit.evaluation.categories import match_categories
from detrkit.evaluation.coco import CocoEvaluator, compare
from detrkit.evaluation.operating_points import ImageTruth, Judged, judge_image
from detrkit.evaluation.streams import Clock, detections_of, results_of
from detrkit.results.detection_config import DetectionConfig, DetectionRule
from detrkit.results.detections import Detections
from detrkit.results.finder import ObjectFinder

if TYPE_CHECKING:
    from detrkit.evaluation.layers import LayerFinder


@dataclass(frozen=True, eq=False)
class Sample:
    """All detections of a detector on a data set, and the objects.

    Attributes:
        names: The model's labels and class names.
        classes: The model's labels that the data set has; a column of numbers each.
        detections: For each image all candidates, raw.
        truths: For each image its objects.
        evaluator: Has the data set's document and the images' ids, for the AP.
    """

    names: Mapping[int, str]
    classes: list[int]
    detections: list[Detections]
    truths: list[ImageTruth]
    evaluator: CocoEvaluator
    _entries: dict[tuple[float | None, bool], list[list[Annotation]]] = field(default_factory=dict)

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images, in order."""
        return self.evaluator.image_ids

    def decide(self, place: int, config: DetectionConfig) -> Detections:
        """The detections that settings choose in an image, of classes that the data set has."""
        found = self.detections[place]
        chosen, scores = DetectionRule(config, self.names).select(found.scores, found.labels, found.boxes)
        kept = replace(found[chosen], scores=scores)
        return kept[np.isin(kept.labels, self.classes)]

    def judge(self, configs: Mapping[int, DetectionConfig]) -> Judged:
        """Judges the detections of some images, each with its settings.

        Args:
            configs: Place of an image -> its settings.
        """
        columns = {label: column for column, label in enumerate(self.classes)}
        scores, classes, correct, images = [], [], [], []
        objects = np.zeros((len(self.detections), len(self.classes)), np.int64)
        for place, config in configs.items():
            found, truth = self.decide(place, config), self.truths[place]
            of_class = np.array([columns[label] for label in found.labels.tolist()], np.int64)
            right, counts = judge_image(found.boxes, of_class, truth)
            scores.append(found.scores[counts].astype(np.float64))
            classes.append(of_class[counts])
            correct.append(right[counts])
            images.append(np.full(int(counts.sum()), place))
            np.add.at(objects[place], truth.classes[~truth.crowds], 1)
        return Judged(
            scores=np.concatenate(scores),
            classes=np.concatenate(classes),
            correct=np.concatenate(correct),
            images=np.concatenate(images),
            objects=objects,
        )

    def average_precision(self, configs: Mapping[int, DetectionConfig]) -> dict[str, float]:
        """COCO's numbers of some images, each with its settings but without any threshold."""
        evaluator = self.evaluator.like()
        for place, config in configs.items():
            evaluator.add(self.image_ids[place], self.decide(place, replace(config, threshold=0.0)))
        return evaluator.result("bbox").stats

    def average_precisions(self, configs: Sequence[DetectionConfig], places: Sequence[int]) -> list[float]:
        """The AP of some images with each of several settings that differ in the overlap filter only."""
        return [self._filtered(config, places) for config in configs]

    def _filtered(self, config: DetectionConfig, places: Sequence[int]) -> float:
        key = config.overlap, config.class_agnostic
        if key not in self._entries:  # asked for again with other images
            evaluator = self.evaluator.like()
            for place in range(len(self.detections)):
                evaluator.add(self.image_ids[place], self.decide(place, config))
            by_image: dict[int, list[Annotation]] = {image_id: [] for image_id in self.image_ids}
            for entry in evaluator.results["bbox"]:
                by_image[entry["image_id"]].append(entry)
            self._entries[key] = [by_image[image_id] for image_id in self.image_ids]
        ids = [self.image_ids[place] for place in places]
        results = [entry for place in places for entry in self._entries[key][place]]
        found = compare(self.evaluator.ground_truth, results, "bbox", image_ids=ids, confusion=False)
        return found.stats["AP"]


def collect(
    detector: ObjectFinder, dataset: DetectionDataset, batch_size: int, limit: int | None, strict: bool
) -> Sample:
    """Runs the detector over the images, with no more of its settings than the tiles."""
    results = detections_of(_raw(detector), dataset, batch_size=batch_size, limit=limit, strict=strict)
    [sample] = _samples(detector, dataset, ((place, [found]) for place, found in results))
    return sample


def collect_layers(
    detector: LayerFinder, dataset: DetectionDataset, batch_size: int, limit: int | None, strict: bool
) -> list[Sample]:
    """Runs the detector over the images once; gives what each decoder layer finds, the last one's last."""
    stream = partial(_raw(detector).stream_layers, overlaps=(None,))
    results = results_of(stream, dataset, batch_size=batch_size, limit=limit, strict=strict, clock=Clock())
    return _samples(detector, dataset, results)


_Finder = TypeVar("_Finder", bound=ObjectFinder)


def _raw(detector: _Finder) -> _Finder:
    own = detector.detection_config
    return detector.with_config(DetectionConfig(tile_size=own.tile_size, tile_overlap=own.tile_overlap))


def _samples(
    detector: ObjectFinder, dataset: DetectionDataset, results: Iterable[tuple[int, Sequence[Detections]]]
) -> list[Sample]:
    """A sample for each of the readings of the images, from the places of these and their detections."""
    evaluator = CocoEvaluator(dataset, detector.names)
    categories = match_categories(detector.names, dataset.document["categories"], dataset.used_categories)
    classes = sorted(categories)
    column_of = {categories[label]: column for column, label in enumerate(classes)}
    objects: dict[int, list[Annotation]] = {}
    for entry in dataset.document["annotations"]:
        objects.setdefault(entry["image_id"], []).append(entry)
    readings, truths = [], []
    for place, found in results:
        image_id = dataset.document["images"][place]["id"]
        evaluator.image_ids.append(image_id)
        readings.append(found)
        truths.append(_truth(objects.get(image_id, []), column_of))
    return [Sample(detector.names, classes, list(found), truths, evaluator) for found in zip(*readings)]


def _truth(entries: Sequence[Annotation], column_of: Mapping[int, int]) -> ImageTruth:
    known = [entry for entry in entries if entry["category_id"] in column_of]
    boxes = np.array([entry["bbox"] for entry in known], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return ImageTruth(
        boxes=boxes,
        classes=np.array([column_of[entry["category_id"]] for entry in known], np.int64),
        crowds=np.array([bool(entry["iscrowd"]) for entry in known], bool),
    )
