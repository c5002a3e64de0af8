"""A detector against a data set: COCO's numbers for boxes and masks, panoptic quality for segments.

Example:
    ```python
    from detrkit import Detector
    from detrkit.evaluation import evaluate_detector

    detector = Detector.from_pretrained("facebook/detr-resnet-50")
    evaluation = evaluate_detector(detector, "val2017", "instances_val2017.json")
    print(evaluation.stats["AP"])
    ```
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from detrkit.common.errors import AnnotationError, DetrkitError, ImageError, SettingError
from detrkit.common.files import atomic_file
from detrkit.common.progress import with_progress
from detrkit.common.schema import Annotation, Image
from detrkit.data import documents
from detrkit.evaluation.categories import match_categories
from detrkit.evaluation.coco import (
    IOU_TYPES,
    RESULT_KEYS,
    CocoEvaluator,
    CocoResult,
    compare,
    read_ground_truth,
    read_results,
)
from detrkit.evaluation.panoptic_files import in_categories, panoptic_quality_of_files, read_panoptic_ids
from detrkit.evaluation.panoptic_quality import PanopticQuality, PanopticResult
from detrkit.results.finder import ObjectFinder

PANOPTIC_THRESHOLD = 0.85
"""The score of a query above which the original keeps its segment."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        images: Number of images.
        seconds_per_image: Mean time from the image's file to the detections or segments; None when they were
            read from a file.
        boxes: COCO's numbers for boxes; None for a panoptic evaluation.
        masks: The same for masks, where the model gives them.
        panoptic: Panoptic quality, for a panoptic evaluation.
        results: The detections as COCO results, "bbox" and "segm".
    """

    images: int
    seconds_per_image: float | None
    boxes: CocoResult | None = None
    masks: CocoResult | None = None
    panoptic: PanopticResult | None = None
    results: Mapping[str, Sequence[Annotation]] = field(default_factory=dict)

    @property
    def stats(self) -> dict[str, float]:
        """The main numbers, in [0, 1].

        COCO's twelve for boxes (for masks where there are no boxes), or PQ, SQ and RQ over all categories and
        the PQ of things and of stuff.
        """
        if self.panoptic is not None:
            overall = self.panoptic.all
            parts = {"PQthings": self.panoptic.things.pq, "PQstuff": self.panoptic.stuff.pq}
            return {"PQ": overall.pq, "SQ": overall.sq, "RQ": overall.rq, **parts}
        detected = self.boxes or self.masks
        assert detected is not None  # something was evaluated
        return detected.stats

    def to_dict(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        parts = {"boxes": self.boxes, "masks": self.masks, "panoptic": self.panoptic}
        return {
            "images": self.images,
            "seconds_per_image": self.seconds_per_image,
            **{name: part.to_dict() for name, part in parts.items() if part is not None},
        }

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Writes tables, curves and matrices as CSV and PNG, and the detections as COCO results files.

        Args:
            folder: Where to; made if missing.

        Returns:
            The files.

        Raises:
            MissingExtraError: matplotlib is not installed.
            DetrkitError: A file cannot be written.
        """
        from detrkit.evaluation.charts import PANOPTIC_TABLE, save_coco_result, write_csv

        folder = Path(folder)
        written = []
        for result in (self.boxes, self.masks):
            if result is not None:
                written += save_coco_result(result, folder)
                path = folder / f"{IOU_TYPES[result.iou_type]}_results.json"
                with atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(self.results[result.iou_type]) + "\n", encoding="utf-8")
                written.append(path)
        if self.panoptic is not None:
            rows = [{"id": c.id, **c.to_dict()} for c in self.panoptic.categories]
            path = folder / PANOPTIC_TABLE
            written.append(write_csv(path, list(rows[0]), [list(row.values()) for row in rows]))
        return written


def evaluate_detector(
    detector: ObjectFinder,
    images_dir: str | os.PathLike[str],
    annotations_file: documents.DocumentSource,
    *,
    panoptic_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    masks: bool | None = None,
    max_objects: int | None = None,
    threshold: float = PANOPTIC_THRESHOLD,
) -> Evaluation:
    """Runs a detector over a data set and compares what it finds with the annotations.

    Shows a progress bar on stderr when it takes more than a few seconds.

    Args:
        detector: The detector; a ``RayDetector`` spreads the images over the machines of a cluster.
        images_dir: Folder of the images.
        annotations_file: COCO instances JSON, or with ``panoptic_dir`` a COCO panoptic JSON.
        panoptic_dir: Folder of the panoptic PNG files; panoptic quality is evaluated instead of boxes.
        batch_size: Maximum number of images that go through the model at once.
        limit: Only use the first so many images.
        masks: Whether to evaluate masks too; by default where the model gives and the annotations have them.
        max_objects: The most detections of an image, the best ones; by default as many as the model has
            object queries, of which COCO counts the best 100 of each class. The originals take 100.
        threshold: Only segments with a higher score enter the panoptic quality. Boxes and masks count
            whatever their score, as COCO asks.

    Raises:
        AnnotationError: The annotations cannot be read or used, or do not fit the model or the images.
        ImageError: Images are missing or cannot be read.
        SettingError: A number is out of range, or the model cannot give what is asked.
        MissingExtraError: faster-coco-eval is not installed.
    """
    if limit is not None and limit < 1:
        raise SettingError(f"limit must be at least 1, not {limit}")
    if batch_size > 1 and getattr(detector.config, "dilation", False):
        warnings.warn(
            f"DC5 models were made for one image at a time; at batch size {batch_size} the numbers may "
            "differ from the published ones",
            stacklevel=2,
        )
    if panoptic_dir is not None:
        if not detector.has_masks:
            raise SettingError(
                "this model finds boxes only; panoptic quality needs a panoptic one such as "
                "detr-resnet-50-panoptic"
            )
        return _evaluate_panoptic(
            detector, Path(images_dir), annotations_file, Path(panoptic_dir), batch_size, limit, threshold
        )
    return _evaluate_detections(
        detector, Path(images_dir), annotations_file, batch_size, limit, masks, max_objects
    )


def evaluate_predictions(
    annotations_file: str | os.PathLike[str],
    predictions_file: str | os.PathLike[str],
    *,
    panoptic_dir: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Compares predictions in files with the annotations.

    Args:
        annotations_file: COCO instances JSON, or with ``panoptic_dir`` a COCO panoptic JSON.
        predictions_file: COCO results JSON (boxes, masks, or both in one entry), a document of
            ``detrkit detect``, or with ``panoptic_dir`` a COCO panoptic JSON such as ``detrkit segment``
            writes, whose PNG files are in the folder of its name (see ``panoptic_quality_of_files``).
        panoptic_dir: Folder of the ground truth's panoptic PNG files.

    Raises:
        AnnotationError: A file cannot be read or used, or they do not fit each other.
        MissingExtraError: faster-coco-eval is not installed.
    """
    if panoptic_dir is not None:
        quality = panoptic_quality_of_files(annotations_file, predictions_file, panoptic_dir)
        return Evaluation(images=quality.images, seconds_per_image=None, panoptic=quality)
    truth = read_ground_truth(annotations_file)
    results = read_results(predictions_file)
    shapes = {iou_type: any(key in entry for entry in results) for iou_type, key in RESULT_KEYS.items()}
    shapes["bbox"] |= not shapes["segm"]  # nothing found is no box found
    name = documents.name_of(predictions_file)
    found = {kind: compare(truth, results, kind, name=name) for kind, given in shapes.items() if given}
    return Evaluation(
        images=len(truth["images"]),
        seconds_per_image=None,
        boxes=found.get("bbox"),
        masks=found.get("segm"),
        results=dict.fromkeys(found, results),
    )


def _evaluate_detections(
    detector: ObjectFinder,
    images_dir: Path,
    annotations_file: documents.DocumentSource,
    batch_size: int,
    limit: int | None,
    masks: bool | None,
    max_objects: int | None,
) -> Evaluation:
    evaluator = CocoEvaluator(annotations_file, detector.names)
    images = evaluator.ground_truth["images"][:limit]
    paths = _find_images(images, images_dir, documents.name_of(annotations_file))
    if masks is None:
        annotated = all(entry.get("segmentation") for entry in evaluator.ground_truth["annotations"])
        masks = detector.has_masks and annotated
    clock = _Clock()
    found = detector.stream(paths, 0.0, batch_size, masks=masks, max_objects=max_objects)
    for image, detections in zip(images, with_progress(clock.time(found), len(images), "Evaluating")):
        evaluator.add(image["id"], detections)
    return Evaluation(
        images=len(images),
        seconds_per_image=clock.seconds / len(images),
        boxes=evaluator.result("bbox"),
        masks=evaluator.result("segm") if masks else None,
        results=evaluator.results,
    )


def _evaluate_panoptic(
    detector: ObjectFinder,
    images_dir: Path,
    annotations_file: documents.DocumentSource,
    panoptic_dir: Path,
    batch_size: int,
    limit: int | None,
    threshold: float,
) -> Evaluation:
    name = documents.name_of(annotations_file)
    document = documents.read_document(annotations_file, "images", "annotations", "categories")
    annotations = document["annotations"]
    for annotation in annotations:
        if "segments_info" not in annotation:
            raise AnnotationError(
                f"{name} is not a COCO panoptic document: its annotations have no segments_info; "
                "to evaluate boxes, leave out the folder of panoptic PNG files"
            )
        for key in ("image_id", "file_name"):
            documents.field(annotation, key, f"a panoptic annotation of {name}")
    quality = PanopticQuality(document["categories"])
    used = {
        documents.field(segment, "category_id", f"a segment of image {entry['image_id']} of {name}")
        for entry in annotations
        for segment in entry["segments_info"]
    }
    known = match_categories(detector.names, document["categories"], used)
    categories = {label: known.get(label) for label in detector.names}
    annotations = annotations[:limit]
    images = _images_of(annotations, document["images"], name)
    paths = _find_images(images, images_dir, name)
    pngs = _existing(
        [a["file_name"] for a in annotations], panoptic_dir, f"panoptic PNG files of {name}", AnnotationError
    )
    clock = _Clock()
    found = clock.time(detector.stream_segments(paths, threshold, batch_size))
    predictions = with_progress(found, len(images), "Evaluating")
    for annotation, png, prediction in zip(annotations, pngs, predictions):
        image_id = annotation["image_id"]
        ids, segments = in_categories(prediction.ids, prediction.segments, categories)
        true_ids = read_panoptic_ids(png, f"image {image_id}: the true map")
        quality.update(ids, segments, true_ids, annotation["segments_info"], image_id=image_id)
    return Evaluation(
        images=len(images), seconds_per_image=clock.seconds / len(images), panoptic=quality.result()
    )


def _images_of(annotations: Sequence[Annotation], images: Iterable[Image], name: str) -> list[Image]:
    """The image of each panoptic annotation."""
    by_id = {documents.field(image, "id", f"an image of {name}"): image for image in images}
    for annotation in annotations:
        if annotation["image_id"] not in by_id:
            raise AnnotationError(f"{name} annotates image {annotation['image_id']}, which it does not list")
    return [by_id[annotation["image_id"]] for annotation in annotations]


def _find_images(images: Sequence[Image], folder: Path, name: str) -> list[Path]:
    """The files of the images, all of which must be there."""
    if not folder.is_dir():
        raise ImageError(f"there is no folder {folder} of images")
    names = [
        documents.field(image, "file_name", f"image {image.get('id', '?')} of {name}") for image in images
    ]
    return _existing(names, folder, f"images of {name}", ImageError)


def _existing(names: Sequence[str], folder: Path, what: str, error: type[DetrkitError]) -> list[Path]:
    """The files of these names, all of which must be in the folder."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and len(missing) == len(names):
        raise error(f"none of the {len(names)} {what} is in {folder}, such as {missing[0]}")
    if missing:
        raise error(
            f"{len(missing)} of the {len(names)} {what} are missing in {folder}, such as {missing[0]}"
        )
    return [folder / name for name in names]


class _Clock:
    """Adds up the time that an iterator takes, without that of its consumer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, items: Iterable[_Item]) -> Iterator[_Item]:
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item
