"""What a detector's mistakes cost: the AP at an IoU of 0.5 that it would gain without those of each kind.

Source: Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", ECCV 2020; the
numbers are those of its authors' program.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from detrkit.common.quiet import same_environment
from detrkit.common.schema import Annotation, Document
from detrkit.common.terminal import make_table
from detrkit.common.text import percent

if TYPE_CHECKING:
    from rich.table import Table

POSITIVE_IOU = 0.5
BACKGROUND_IOU = 0.1
MAX_DETECTIONS = 100
"""Detections of an image that count, the best ones."""

KINDS = {
    "classification": "right place, wrong class",
    "localisation": "right class, IoU with the object from 0.1 to 0.5",
    "both": "wrong class, and IoU with the object from 0.1 to 0.5",
    "duplicate": "an object that a better detection has found",
    "background": "no object there",
    "missed": "objects that no detection is near enough to",
}
"""The kinds of mistakes, and what they are."""

_CORRECTABLE = ("localisation", "classification")
WORST = 24
"""How many false detections, and how many missed objects, are kept as examples."""


@dataclass(frozen=True)
class Mistake:
    """A false detection, or a missed object.

    Attributes:
        kind: One of :data:`KINDS`.
        image_id: The image.
        found: The detection, as in a COCO results file; None for a missed object.
        true: The object that was missed, or that the detection was judged by; None for "background".
        iou: IoU of the two, 0 where there are not two.
    """

    kind: str
    image_id: int
    found: Annotation | None
    true: Annotation | None
    iou: float = 0.0


@dataclass(frozen=True)
class ErrorAnalysis:
    """The mistakes of a detector on a data set.

    Attributes:
        ap50: AP at an IoU of 0.5 of the (up to 100) best detections of each image, in [0, 1].
        costs: By kind (see :data:`KINDS`), how much higher ``ap50`` would be without these mistakes, in
            [0, 1]. The costs of several kinds do not add up.
        counts: By kind, the number of detections, or of missed objects.
        false: The most confident false detections, up to :data:`WORST`, which cost the most.
        missed: The largest missed objects, up to as many.
    """

    ap50: float
    costs: dict[str, float]
    counts: dict[str, int]
    false: Sequence[Mistake] = ()
    missed: Sequence[Mistake] = ()

    def to_dict(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        return {"AP50": self.ap50, "costs": self.costs, "counts": self.counts}

    def table(self) -> Table:
        """Costs in percent, and counts."""
        table = make_table(["mistake", "what it is"], ["AP50 lost", "count"])
        for kind, meaning in KINDS.items():
            table.add_row(kind, meaning, percent(self.costs[kind]), str(self.counts[kind]))
        return table


@dataclass(eq=False)
class _Object:
    """A true object."""

    entry: Annotation
    found: bool = False
    near: bool = False  # a wrong detection could be corrected to find it
    best: _Detection | None = None  # the best of these

    @property
    def category(self) -> int:
        return self.entry["category_id"]


@dataclass(eq=False)
class _Detection:
    """A detection and how it was judged."""

    entry: Annotation
    correct: bool = False
    ignored: bool = False  # in a crowd
    mistake: str | None = None
    near: tuple[_Object, float] | None = None  # what it was judged by, and the IoU
    meant: _Object | None = None  # what it would find if it were corrected

    @property
    def category(self) -> int:
        return self.entry["category_id"]

    @property
    def score(self) -> float:
        return self.entry["score"]


@dataclass
class _Judged:
    """All detections and objects, in the order in which they were judged."""

    detections: list[_Detection] = field(default_factory=list)
    objects: list[_Object] = field(default_factory=list)


def analyse_errors(
    document: Document, results: Sequence[Annotation], iou_type: str = "bbox"
) -> ErrorAnalysis:
    """Sorts the mistakes of detections into kinds.

    Args:
        document: A checked ground truth.
        results: Entries of a COCO results file with the ground truth's ids.
        iou_type: "bbox" for boxes, "segm" for masks.
    """
    judged = _Judged()
    truths: dict[int, list[Annotation]] = defaultdict(list)
    found: dict[int, list[Annotation]] = defaultdict(list)
    for grouped, entries in ((truths, document["annotations"]), (found, results)):
        for entry in entries:
            grouped[entry["image_id"]].append(entry)
    sizes = {image["id"]: (image.get("height"), image.get("width")) for image in document["images"]}
    for image_id, size in sizes.items():
        best = sorted(found[image_id], key=lambda entry: -entry["score"])[:MAX_DETECTIONS]
        _judge_image(best, truths[image_id], size, iou_type, judged)

    ap50 = _mean_ap(judged, None)
    # Bins of recall may shift, so that a correction seems to harm.
    costs = {kind: max(0.0, _mean_ap(judged, kind) - ap50) for kind in KINDS}
    counts = Counter(detection.mistake for detection in judged.detections)
    counts["missed"] = sum(map(_is_missed, judged.objects))
    return ErrorAnalysis(ap50, costs, {kind: counts[kind] for kind in KINDS}, *_worst(judged))


def _worst(judged: _Judged) -> tuple[list[Mistake], list[Mistake]]:
    """The most confident false detections, and the largest missed objects."""
    wrong = [d for d in judged.detections if d.mistake is not None and not d.ignored]
    missed = [thing.entry for thing in judged.objects if _is_missed(thing)]
    false = []
    for detection in sorted(wrong, key=lambda detection: -detection.score)[:WORST]:
        assert detection.mistake is not None
        near, iou = detection.near or (None, 0.0)
        true = None if near is None else near.entry
        entry = detection.entry
        false.append(Mistake(detection.mistake, entry["image_id"], entry, true, iou))
    largest = sorted(missed, key=lambda entry: -entry["area"])[:WORST]
    return false, [Mistake("missed", entry["image_id"], None, entry) for entry in largest]


def _judge_image(
    entries: Sequence[Annotation],
    truths: Iterable[Annotation],
    size: tuple[int | None, int | None],
    iou_type: str,
    judged: _Judged,
) -> None:
    """Matches the detections of an image with its objects, and says what is wrong with the others."""
    single = [entry for entry in truths if not entry["iscrowd"]]
    crowds = [entry for entry in truths if entry["iscrowd"]]
    detections = list(map(_Detection, entries))
    objects = list(map(_Object, single))
    judged.detections += detections
    judged.objects += objects
    if not detections:
        return
    shapes, true_shapes, crowd_shapes = (
        [_shape(entry, size, iou_type) for entry in some] for some in (entries, single, crowds)
    )
    ious = _ious(shapes, true_shapes, crowd=False)
    same = np.array([[d.category == o.category for o in objects] for d in detections], dtype=bool)
    same = same.reshape(ious.shape)
    free = ious * same
    for place, detection in enumerate(detections):
        if not objects:
            break
        nearest = int(free[place].argmax())
        if free[place, nearest] >= POSITIVE_IOU:
            detection.correct = objects[nearest].found = True
            free[:, nearest] = 0
    in_crowds = _ious(shapes, crowd_shapes, crowd=True)
    for place, detection in enumerate(detections):
        inside = (
            crowd["category_id"] == detection.category and in_crowds[place, i] > POSITIVE_IOU
            for i, crowd in enumerate(crowds)
        )
        detection.ignored = not detection.correct and any(inside)
        if not detection.correct:
            _judge_mistake(detection, objects, ious[place], same[place])


def _judge_mistake(
    detection: _Detection, objects: Sequence[_Object], ious: np.ndarray, same: np.ndarray
) -> None:
    """Sets the kind of a mistake, and the object that the detection would find if it were corrected."""
    if not objects:
        detection.mistake = "background"
        return
    of_class, of_others = ious * same, ious * ~same
    of_found = of_class * np.array([thing.found for thing in objects])
    if BACKGROUND_IOU <= of_class.max() <= POSITIVE_IOU:
        detection.mistake, judged_by = "localisation", of_class
    elif of_others.max() >= POSITIVE_IOU:
        detection.mistake, judged_by = "classification", of_others
    elif of_found.max() >= POSITIVE_IOU:
        detection.mistake, judged_by = "duplicate", of_found
    else:
        detection.mistake, judged_by = "background" if ious.max() <= BACKGROUND_IOU else "both", ious
    nearest = int(judged_by.argmax())
    thing = objects[nearest]
    if detection.mistake != "background":
        detection.near = thing, float(judged_by[nearest])
    if detection.mistake in _CORRECTABLE and not thing.found:
        meant = detection.meant = thing
        meant.near = True
        if meant.best is None or detection.score > meant.best.score:
            meant.best = detection


def _is_missed(thing: _Object) -> bool:
    return not thing.found and not thing.near


def _mean_ap(judged: _Judged, corrected: str | None) -> float:
    """Mean over the classes of the AP, with the mistakes of one kind corrected."""
    outcomes: dict[int, list[tuple[float, bool]]] = defaultdict(list)
    positives: Counter[int] = Counter()
    for thing in judged.objects:
        positives[thing.category] += not (corrected == "missed" and _is_missed(thing))
    detections = judged.detections
    if corrected is not None:  # of equal scores, those to correct count first, as in the authors' program
        detections = sorted(detections, key=lambda detection: detection.correct)
    for detection in detections:
        if corrected is not None and detection.mistake == corrected:
            meant = detection.meant
            if meant is not None and meant.best is detection:
                outcomes[meant.category].append((detection.score, True))
        elif not detection.ignored:
            outcomes[detection.category].append((detection.score, detection.correct))
    classes = {category for category in positives if positives[category]} | outcomes.keys()
    values = [_average_precision(outcomes[category], positives[category]) for category in sorted(classes)]
    return sum(values) / len(values) if values else 0.0


def _average_precision(outcomes: list[tuple[float, bool]], positives: int) -> float:
    """Precision, made monotonous, averaged over 101 recalls."""
    if not positives or not outcomes:
        return 0.0
    correct = np.array([right for _, right in sorted(outcomes, key=lambda outcome: -outcome[0])])
    hits = np.cumsum(correct)
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    places = np.searchsorted(hits / positives, np.arange(101) / 100, side="left")
    reached = places < len(precision)
    return float(precision[places[reached]].sum() / 101)


def _shape(entry: Annotation, size: tuple[int | None, int | None], iou_type: str) -> Any:
    """The box, or the run lengths of the mask."""
    if iou_type == "bbox":
        return entry["bbox"]
    segmentation = entry["segmentation"]
    if isinstance(segmentation, Mapping) and isinstance(segmentation["counts"], (str, bytes)):
        return segmentation
    mask = _mask_module()
    encoded = mask.frPyObjects(segmentation, *size)
    return mask.merge(encoded) if isinstance(encoded, list) else encoded


def _ious(shapes: list[Any], others: list[Any], *, crowd: bool) -> np.ndarray:
    """(shapes, others); of a crowd, the share of the shape that is inside."""
    if not shapes or not others:
        return np.zeros((len(shapes), len(others)))
    return np.asarray(_mask_module().iou(shapes, others, [int(crowd)] * len(others)))


def _mask_module() -> Any:
    with same_environment():
        from faster_coco_eval.core import mask

    return mask
