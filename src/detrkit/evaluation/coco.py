"""COCO's average precision and recall of boxes and masks, through faster-coco-eval.

Example:
    ```python
    from detrkit.evaluation.coco import evaluate_results

    result = evaluate_results("instances_val2017.json", "results.json")
    print(result.stats["AP"], [(c.name, c.stats["AP"]) for c in result.categories])
    ```
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from detrkit.common.errors import AnnotationError, MissingExtraError, SettingError
from detrkit.common.quiet import same_environment
from detrkit.common.schema import Annotation, Document, RunLengths
from detrkit.common.terminal import make_table
from detrkit.common.text import percent
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.data.documents import DocumentSource, category_name, field, name_of, read_lists
from detrkit.evaluation.categories import match_categories
from detrkit.evaluation.confusion import BACKGROUND, ConfusionMatrix
from detrkit.evaluation.error_analysis import ErrorAnalysis, analyse_errors
from detrkit.evaluation.results_files import aligned, check_results, read_results

if TYPE_CHECKING:
    from rich.table import Table

    from detrkit.inference.detector import Detections

# The statistics in COCO's order: recall rather than precision, place of the IoU threshold (None for the mean
# over all ten), of the area range and of the number of detections in the evaluator's arrays.
_STATISTICS: dict[str, tuple[bool, int | None, int, int]] = {
    "AP": (False, None, 0, 2),
    "AP50": (False, 0, 0, 2),
    "AP75": (False, 5, 0, 2),
    "APsmall": (False, None, 1, 2),
    "APmedium": (False, None, 2, 2),
    "APlarge": (False, None, 3, 2),
    "AR1": (True, None, 0, 0),
    "AR10": (True, None, 0, 1),
    "AR100": (True, None, 0, 2),
    "ARsmall": (True, None, 1, 2),
    "ARmedium": (True, None, 2, 2),
    "ARlarge": (True, None, 3, 2),
}
STATISTICS = tuple(_STATISTICS)
"""Names of COCO's twelve numbers, in COCO's order."""

IOU_TYPES = {"bbox": "boxes", "segm": "masks"}
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RECALLS = tuple(step / 100 for step in range(101))

_CONFUSION_SCORE = 0.5
_CONFUSION_IOU = 0.5


@dataclass(frozen=True)
class CategoryScores:
    """The numbers of one category.

    Attributes:
        id: Category id of the data set.
        name: Its name.
        objects: How many objects of it the images hold, crowds left out.
        stats: COCO's twelve numbers for it, -1 where there is no object of that size.
    """

    id: int
    name: str
    objects: int
    stats: dict[str, float]


@dataclass(frozen=True, eq=False)
class CocoResult:
    """How well boxes or masks were detected.

    Attributes:
        iou_type: "bbox" or "segm".
        stats: COCO's twelve numbers in [0, 1] by name (see ``STATISTICS``), -1 where there is no object of
            that size, as COCO's own evaluation gives them.
        categories: The numbers of each category, in order of their ids.
        precision: (10, 101, categories): the precision at the IoU thresholds 0.5, 0.55, ... and the recalls
            0, 0.01, ..., of objects of any size; -1 for a category without objects.
        scores: The scores at which the recalls are reached, of the same shape; 0 where they are not.
        confusion: Which classes were taken for which.
    """

    iou_type: str
    stats: dict[str, float]
    categories: tuple[CategoryScores, ...]
    precision: np.ndarray
    scores: np.ndarray
    confusion: ConfusionMatrix

    def to_dict(self) -> dict[str, object]:
        """The twelve numbers and those of each category, ready for JSON."""
        per_class = [{"id": c.id, "name": c.name, "objects": c.objects, **c.stats} for c in self.categories]
        return {**self.stats, "per_class": per_class}

    def mean_precision(self) -> np.ndarray:
        """(10, 101) precision averaged over the categories with objects; -1 without any."""
        known = self.precision[:, :, self.precision[0, 0] > -1]
        return known.mean(axis=2) if known.shape[2] else np.full(self.precision.shape[:2], -1.0)

    def category_table(self) -> Table:
        """Average precision of each category with objects, in percent."""
        from rich.text import Text

        names = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR100")
        table = make_table(["category"], ["objects", *names])
        for category in self.categories:
            if category.objects:
                numbers = (percent(category.stats[name]) for name in names)
                table.add_row(Text(category.name), str(category.objects), *numbers)
        return table


def statistics_table(*results: CocoResult) -> Table:
    """COCO's twelve numbers in percent, a column for each result."""
    table = make_table([""], [IOU_TYPES[result.iou_type] for result in results])
    for name in STATISTICS:
        table.add_row(name, *(percent(result.stats[name]) for result in results))
    return table


class CocoEvaluator:
    """Collects the detections of a model image by image and compares them with the ground truth.

    Masks are kept as run lengths, so only those of the image at hand are in memory.

    Attributes:
        ground_truth: The COCO document.
        image_ids: Ids of the images so far.
        results: "bbox" and, for detections with masks, "segm": entries of a COCO results file.
    """

    def __init__(
        self, ground_truth: DocumentSource | DetectionDataset, names: Mapping[int, str] | None = None
    ) -> None:
        """Reads the ground truth.

        Args:
            ground_truth: COCO instances document, or its file, or a checked data set.
            names: Class id -> class name of the model, to find its classes among the data set's categories
                (see ``match_categories``); by default class ids are category ids.

        Raises:
            AnnotationError: The ground truth cannot be read or used, or the model lacks its categories.
            MissingExtraError: faster-coco-eval is not installed.
        """
        _library()
        if isinstance(ground_truth, DetectionDataset):
            self.ground_truth = ground_truth.document
        else:
            self.ground_truth = read_ground_truth(ground_truth)
        self._categories: dict[int, int] | None = None
        if names is not None:
            used = {annotation["category_id"] for annotation in self.ground_truth["annotations"]}
            self._categories = match_categories(names, self.ground_truth["categories"], used)
        self._images = {image["id"]: image for image in self.ground_truth["images"]}
        self.image_ids: list[int] = []
        self.results: dict[str, list[Annotation]] = {"bbox": [], "segm": []}

    def add(self, image_id: int, detections: Detections) -> None:
        """Takes the detections of one image; classes that the data set does not have are left out.

        Raises:
            AnnotationError: The ground truth has no such image, or one of another size.
        """
        image = self._images.get(image_id)
        if image is None:
            raise AnnotationError(f"the ground truth has no image {image_id}")
        height, width = detections.image_size
        if (image.get("height", height), image.get("width", width)) != (height, width):
            raise AnnotationError(
                f"image {image_id} ({image.get('file_name', 'no file name')}) has {width}x{height} pixels, "
                f"but {image['width']}x{image['height']} in the annotations; boxes would not fit"
            )
        self.image_ids.append(image_id)
        boxes = detections.to_coco(image_id=image_id)
        for position, (entry, label) in enumerate(zip(boxes, detections.labels.tolist())):
            category = label if self._categories is None else self._categories.get(label)
            if category is None:
                continue
            common: Annotation = {"image_id": image_id, "category_id": category, "score": entry["score"]}
            self.results["bbox"].append({**common, "bbox": entry["bbox"]})
            if detections.masks is not None:
                rle = encode_mask(detections.masks[position])
                self.results["segm"].append({**common, "segmentation": rle})

    def like(self) -> CocoEvaluator:
        """One for the same ground truth and classes, without detections."""
        other = copy.copy(self)
        other.image_ids, other.results = [], {"bbox": [], "segm": []}
        return other

    def result(self, iou_type: str = "bbox") -> CocoResult:
        """Compares the detections so far with the ground truth of their images.

        Args:
            iou_type: "bbox" for boxes, "segm" for masks.
        """
        return compare(self.ground_truth, self.results[iou_type], iou_type, image_ids=self.image_ids)

    def errors(self, iou_type: str = "bbox") -> ErrorAnalysis:
        """Sorts the mistakes so far into kinds.

        Args:
            iou_type: "bbox" for boxes, "segm" for masks.
        """
        document = _only_images(self.ground_truth, set(self.image_ids))
        return analyse_errors(document, self.results[iou_type], iou_type)


def evaluate_results(
    ground_truth: DocumentSource,
    results: Sequence[Annotation] | str | os.PathLike[str],
    iou_type: str = "bbox",
    *,
    image_ids: Sequence[int] | None = None,
) -> CocoResult:
    """Compares a COCO results file with the ground truth.

    Args:
        ground_truth: COCO instances document, or its file.
        results: Entries with ``image_id``, ``category_id``, ``score`` and ``bbox`` (x, y, width, height in
            pixels) or ``segmentation`` (run lengths), or their file. All detections count, whatever their
            score, up to COCO's 100 best of an image and category.
        iou_type: "bbox" for boxes, "segm" for masks.
        image_ids: Only compare these images; by default all of the ground truth.

    Raises:
        AnnotationError: A file cannot be read or used, or the results have an image that is not in the
            ground truth.
        SettingError: An unknown ``iou_type``.
        MissingExtraError: faster-coco-eval is not installed.
    """
    truth = read_ground_truth(ground_truth, masks=iou_type == "segm")
    entries = aligned(read_results(results), truth)
    return compare(truth, entries, iou_type, image_ids=image_ids, name=name_of(results))


def compare(
    document: Document,
    results: Sequence[Annotation],
    iou_type: str,
    *,
    image_ids: Sequence[int] | None = None,
    name: str = "the detections",
    confusion: bool = True,
) -> CocoResult:
    """Compares aligned results with what :func:`read_ground_truth` gave.

    Arguments and errors are those of :func:`evaluate_results`; ``name`` is what errors call the results.
    Without ``confusion`` the matrix is empty, which takes half of the time.
    """
    if iou_type not in IOU_TYPES:
        raise SettingError(f"unknown iou_type {iou_type!r}; use 'bbox' or 'segm'")
    coco_class, evaluator_class, _ = _library()
    # Without this key the library would make a polygon of every box, which nothing reads.
    extra: dict[str, None] = {} if iou_type == "segm" else {"segmentation": None}
    found = [{**entry, **extra} for entry in results]
    check_results(found, name, iou_type, document)
    if image_ids is not None:
        chosen = set(image_ids)
        document = _only_images(document, chosen)
        found = [entry for entry in found if entry["image_id"] in chosen]
    if iou_type == "segm":
        _check_segmentations(document)
    # The library marks matches by id, where 0 means none, and adds keys to its entries.
    objects = [{**entry, **extra, "id": i} for i, entry in enumerate(document["annotations"], start=1)]
    truth = coco_class({**document, "annotations": objects})
    # faster-coco-eval fails on an empty list before version 1.7.
    detections = truth.loadRes(found) if found else coco_class({**document, "annotations": []})
    evaluator = evaluator_class(truth, detections, iou_type)
    evaluator.evaluate()

    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    row = {int(category): i for i, category in enumerate(evaluator.params.catIds)}
    numbers = Counter(entry["category_id"] for entry in document["annotations"] if not entry["iscrowd"])
    categories = tuple(
        CategoryScores(
            id=category,
            name=category_name(truth.cats[category]),
            objects=numbers[category],
            stats=_statistics(precision[:, :, [i]], recall[:, [i]]),
        )
        for category, i in row.items()
    )
    return CocoResult(
        iou_type=iou_type,
        stats=_statistics(precision, recall),
        categories=categories,
        precision=precision[:, :, :, 0, 2].copy(),
        scores=evaluator.eval["scores"][:, :, :, 0, 2].copy(),
        confusion=_confusion(truth, detections, iou_type, row, fill=confusion),
    )


def read_ground_truth(source: DocumentSource, *, masks: bool | None = None) -> Document:
    """Reads and checks a COCO instances document as every evaluation does, but without its images.

    Args:
        source: The document, or its file.
        masks: Whether masks are evaluated; by default if all annotations have them.

    Returns:
        A document with ``images``, ``annotations`` and ``categories``, none of them empty. Every annotation
        has ``iscrowd`` and ``area``, by default 0 and the area of its box.

    Raises:
        AnnotationError: It cannot be read, an image id stands for several images, or nothing usable is left.
    """
    document = read_lists(source, "images", "annotations", "categories")
    name = name_of(source)
    if any(isinstance(entry, Mapping) and "segments_info" in entry for entry in document["annotations"]):
        raise AnnotationError(
            f"{name} is a COCO panoptic document; give the folder of its PNG files too (--panoptic-dir), or "
            "instance annotations to evaluate boxes"
        )
    dataset = DetectionDataset(document, None, name)
    if masks and not dataset.has_segmentations:
        raise AnnotationError(f"{name} has annotations without a segmentation, so masks cannot be evaluated")
    masks = dataset.has_segmentations if masks is None else masks
    report = check_dataset(replace(dataset, return_masks=masks))
    left = {image["id"] for image in report.dataset.document["images"]}
    for problem in report.problems:
        lost = problem.kind == "duplicate_image_id" and int(problem.example.split()[0]) not in left
        if lost or problem.kind == "unknown_category" or problem.kind == "unknown_image":
            raise AnnotationError(f"{name}: {problem}; correct it, since results may refer to it")
    return report.dataset.document


def encode_mask(mask: np.ndarray) -> RunLengths:
    """COCO's compressed run lengths of a (height, width) mask, ready for JSON."""
    _, _, mask_module = _library()
    encoded = mask_module.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = encoded["counts"]
    return {
        "size": [int(length) for length in encoded["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def _library() -> tuple[Any, Any, Any]:
    """faster-coco-eval's data set, evaluator and mask functions."""
    try:
        with same_environment():
            from faster_coco_eval import COCO, COCOeval_faster
            from faster_coco_eval.core import mask
    except ImportError as error:
        raise MissingExtraError("COCO evaluation", "coco", package="faster-coco-eval") from error
    return COCO, COCOeval_faster, mask


def _statistics(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """The twelve numbers: means over the categories that have objects, -1 where none has."""
    # precision: (IoU thresholds, recalls, categories, areas, numbers of detections); recall has no recalls.
    stats = {}
    for name, (of_recall, threshold, area, limit) in _STATISTICS.items():
        values = recall if of_recall else precision
        values = values[..., area, limit] if threshold is None else values[threshold, ..., area, limit]
        known = values[values > -1]
        stats[name] = float(known.mean()) if known.size else -1.0
    return stats


def _confusion(
    truth: Any, detections: Any, iou_type: str, row: Mapping[int, int], *, fill: bool
) -> ConfusionMatrix:
    _, _, mask_module = _library()
    counts = np.zeros((len(row) + 1, len(row) + 1), dtype=np.int64)
    names = tuple(category_name(truth.cats[category]) for category in row)
    matrix = ConfusionMatrix(counts, (*names, BACKGROUND), _CONFUSION_SCORE, _CONFUSION_IOU)

    def shape(data_set: Any, entry: dict[str, Any]) -> Any:
        return entry["bbox"] if iou_type == "bbox" else data_set.annToRLE(entry)

    for image_id in truth.imgs if fill else ():
        objects = truth.imgToAnns[image_id]
        confident = [
            entry
            for entry in detections.imgToAnns[image_id]
            if entry["score"] > _CONFUSION_SCORE and entry["category_id"] in row
        ]
        confident.sort(key=lambda entry: -entry["score"])
        crowds = [int(entry["iscrowd"]) for entry in objects]
        ious = np.zeros((len(confident), len(objects)))
        if ious.size:
            ious[:] = mask_module.iou(
                [shape(detections, entry) for entry in confident],
                [shape(truth, entry) for entry in objects],
                crowds,
            )
        detected, true = ([row[entry["category_id"]] for entry in some] for some in (confident, objects))
        matrix.add(ious, detected, true, list(map(bool, crowds)))
    return matrix


def _only_images(document: Document, image_ids: set[int]) -> Document:
    missing = image_ids - {image["id"] for image in document["images"]}
    if missing:
        raise AnnotationError(f"the ground truth has no image {min(missing)}")
    return {
        **document,
        "images": [image for image in document["images"] if image["id"] in image_ids],
        "annotations": [entry for entry in document["annotations"] if entry["image_id"] in image_ids],
    }


def _check_segmentations(document: Document) -> None:
    for image in document["images"]:
        for key in ("height", "width"):
            field(image, key, f"image {image['id']} of the ground truth, whose masks are evaluated,")
    for annotation in document["annotations"]:
        if not annotation.get("segmentation"):
            raise AnnotationError(
                f"annotation {annotation.get('id', '?')} of the ground truth has no segmentation, so masks "
                "cannot be evaluated"
            )
