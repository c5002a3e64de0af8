"""Detections judged one by one, and the thresholds at which they are worth the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detrkit.results.overlap import box_iou

CORRECT_IOU = 0.5
"""The least IoU of a detection with its object."""


@dataclass(frozen=True, eq=False)
class ImageTruth:
    """The objects of an image.

    Attributes:
        boxes: (n, 4) xyxy in pixels.
        classes: (n,) int64, the column of each object's class.
        crowds: (n,) bool.
    """

    boxes: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray


@dataclass(frozen=True, eq=False)
class Judged:
    """Detections of many images, each judged against the objects.

    Attributes:
        scores: (n,) float64 in [0, 1].
        classes: (n,) int64.
        correct: (n,) bool; an object counts for the best detection on it.
        images: (n,) int64, the place of each detection's image.
        objects: (images, classes) int64, the number of objects without crowds.
    """

    scores: np.ndarray
    classes: np.ndarray
    correct: np.ndarray
    images: np.ndarray
    objects: np.ndarray

    def of_class(self, column: int) -> Judged:
        """The detections and objects of one class."""
        rows = self.classes == column
        return Judged(
            self.scores[rows],
            np.zeros(int(rows.sum()), np.int64),
            self.correct[rows],
            self.images[rows],
            self.objects[:, column : column + 1],
        )

    def of_images(self, chosen: np.ndarray) -> Judged:
        """The detections and objects of the images (images,) bool that are chosen."""
        rows = chosen[self.images]
        return Judged(
            self.scores[rows],
            self.classes[rows],
            self.correct[rows],
            self.images[rows],
            self.objects * chosen[:, None],
        )

    def above(self, thresholds: np.ndarray) -> Judged:
        """The detections that score higher than the threshold of their class; all objects."""
        rows = self.scores > thresholds[self.classes]
        return Judged(
            self.scores[rows], self.classes[rows], self.correct[rows], self.images[rows], self.objects
        )


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold gives.

    Attributes:
        threshold: Only detections with a higher score count.
        detections: How many there are.
        correct: How many of them find an object.
        objects: How many objects there are.
    """

    threshold: float
    detections: int
    correct: int
    objects: int

    @property
    def precision(self) -> float:
        """The share of the detections that find an object; 1 without any."""
        return self.correct / self.detections if self.detections else 1.0

    @property
    def recall(self) -> float:
        """The share of the objects that are found; 1 without any."""
        return self.correct / self.objects if self.objects else 1.0

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall."""
        return f1(self.correct, self.detections, self.objects)


def f1(correct: int, detections: int, objects: int) -> float:
    """The harmonic mean of precision and recall; 1 if there is neither detection nor object."""
    return 2 * correct / (detections + objects) if detections + objects else 1.0


def judge_image(boxes: np.ndarray, classes: np.ndarray, truth: ImageTruth) -> tuple[np.ndarray, np.ndarray]:
    """Judges the detections of an image as COCO's evaluation does at an IoU of 0.5.

    Args:
        boxes: (n, 4) xyxy in pixels, the best first.
        classes: (n,) the column of each one's class.
        truth: The objects.

    Returns:
        Whether each detection is correct, and whether it counts at all: not on a crowd.
    """
    correct, counts = np.zeros(len(boxes), bool), np.ones(len(boxes), bool)
    ious = box_iou(boxes, truth.boxes) * (classes[:, None] == truth.classes[None])
    free = ious * ~truth.crowds
    for place in range(len(boxes)):
        best = int(free[place].argmax()) if free.shape[1] else None
        if best is not None and free[place, best] >= CORRECT_IOU:
            correct[place] = True
            free[:, best] = 0
        elif truth.crowds.any():
            counts[place] = not (_inside(boxes[place], truth) * (classes[place] == truth.classes)).any()
    return correct, counts


def _inside(box: np.ndarray, truth: ImageTruth) -> np.ndarray:
    """Of which crowds a box has half of its area inside."""
    low = np.maximum(box[:2], truth.boxes[:, :2])
    high = np.minimum(box[2:], truth.boxes[:, 2:])
    area = max(float(np.prod(box[2:] - box[:2])), np.finfo(np.float32).tiny)
    return truth.crowds & (np.prod(np.clip(high - low, 0, None), axis=1) / area >= CORRECT_IOU)


def operating_points(judged: Judged) -> list[OperatingPoint]:
    """The points of all thresholds that differ in their detections, the highest threshold first.

    Each threshold lies between two scores, with as few digits as will do.
    """
    order = np.argsort(-judged.scores, kind="stable")
    scores, hits = judged.scores[order], np.cumsum(judged.correct[order])
    objects = int(judged.objects.sum())
    last = np.flatnonzero(np.append(scores[1:] < scores[:-1], [True] * (len(scores) > 0)))
    points = [OperatingPoint(1.0, 0, 0, objects)]
    for place in last:
        below = scores[place + 1] if place + 1 < len(scores) else 0.0
        threshold = _round_between(float(below), float(scores[place]))
        points.append(OperatingPoint(threshold, int(place) + 1, int(hits[place]), objects))
    return points


def point_at(judged: Judged, threshold: float) -> OperatingPoint:
    """What one threshold gives."""
    rows = judged.scores > threshold
    return OperatingPoint(
        threshold, int(rows.sum()), int(judged.correct[rows].sum()), int(judged.objects.sum())
    )


def best_f1(points: Sequence[OperatingPoint]) -> OperatingPoint:
    """The point with the highest F1, of several the one with the highest threshold."""
    return max(points, key=lambda point: point.f1)


def best_at_precision(points: Sequence[OperatingPoint], least: float) -> OperatingPoint | None:
    """The point that finds the most at a precision of at least ``least``; None if none is as precise."""
    fitting = [point for point in points if point.detections and point.precision >= least]
    return max(fitting, key=lambda point: point.recall, default=None)


def best_at_recall(points: Sequence[OperatingPoint], least: float) -> OperatingPoint | None:
    """The highest threshold with a recall of at least ``least``; None if none finds as much."""
    return next((point for point in points if point.recall >= least), None)


def _round_between(low: float, high: float) -> float:
    """A number with as few digits as possible that is not below ``low`` and below ``high``."""
    middle = (low + high) / 2
    for digits in range(1, 16):
        rounded = round(middle, digits)
        if low <= rounded < high:
            return rounded
    return low
