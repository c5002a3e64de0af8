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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from detrkit.common.errors import AnnotationError, SettingError
from detrkit.common.files import atomic_file
from detrkit.common.schema import Annotation
from detrkit.data import documents
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.evaluation.categories import match_categories
from detrkit.evaluation.coco import (
    IOU_TYPES,
    CocoEvaluator,
    CocoResult,
    compare,
    read_ground_truth,
)
from detrkit.evaluation.error_analysis import ErrorAnalysis, analyse_errors
from detrkit.evaluation.layers import LayerEvaluator, LayerScores
from detrkit.evaluation.panoptic_files import in_categories, panoptic_quality_of_files, read_panoptic_ids
from detrkit.evaluation.panoptic_quality import PanopticQuality, PanopticResult
from detrkit.evaluation.results_files import RESULT_KEYS, aligned, read_results
from detrkit.evaluation.streams import Clock, detections_of, results_of
from detrkit.results.detection_config import DetectionConfig
from detrkit.results.finder import ObjectFinder

PANOPTIC_THRESHOLD = 0.85
"""The score of a query above which the original keeps its segment."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        images: Number of images.
        seconds_per_image: Mean time from the image's file to the detections or segments; None when they were
            read from a file.
        boxes: COCO's numbers for boxes; None for a panoptic evaluation.
        masks: The same for masks, where the model gives them.
        panoptic: Panoptic quality, for a panoptic evaluation.
        results: The detections as COCO results, "bbox" and "segm".
        errors: The kinds of mistakes (of masks where there are no boxes), if they were asked for.
        layers: COCO's numbers for the boxes of each decoder layer, if they were asked for.
        dataset: The images, from which the worst mistakes are drawn. None where no detector was run.
        detection_config: The settings that made the detections. A threshold has no part in it; the overlap
            filter and the most objects do. None where no detector was run for boxes.
    """

    images: int
    seconds_per_image: float | None
    boxes: CocoResult | None = None
    masks: CocoResult | None = None
    panoptic: PanopticResult | None = None
    results: Mapping[str, Sequence[Annotation]] = field(default_factory=dict)
    errors: ErrorAnalysis | None = None
    layers: LayerScores | None = None
    dataset: DetectionDataset | None = None
    detection_config: DetectionConfig | None = None

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
        parts = {
            "boxes": self.boxes,
            "masks": self.masks,
            "panoptic": self.panoptic,
            "errors": self.errors,
            "layers": self.layers,
        }
        config = self.detection_config
        settings = {} if config is None else {"settings": _without_thresholds(config)}
        return {
            "images": self.images,
            "seconds_per_image": self.seconds_per_image,
            **settings,
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
        from detrkit.common.tables import write_csv
        from detrkit.evaluation.charts import ERROR_GALLERY, PANOPTIC_TABLE, save_coco_result
        from detrkit.evaluation.error_gallery import error_gallery

        folder = Path(folder)
        written = []
        for result in (self.boxes, self.masks):
            if result is not None:
                written += save_coco_result(result, folder)
                path = folder / f"{IOU_TYPES[result.iou_type]}_results.json"
                with atomic_file(path) as temporary:
                    temporary.write_text(json.dumps(self.results[result.iou_type]) + "\n", encoding="utf-8")
                written.append(path)
        if self.layers is not None:
            written += self.layers.save(folder)
        if self.errors is not None and self.dataset is not None:
            path = folder / ERROR_GALLERY
            with atomic_file(path) as temporary:
                error_gallery(self.errors, self.dataset).save(temporary, format="PNG")
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
    overlap: float | None = None,
    tiles: int | str | Sequence[int] | None = None,
    raw: bool = False,
    threshold: float = PANOPTIC_THRESHOLD,
    strict: bool = False,
) -> Evaluation:
    """Runs a detector over a data set and compares its detections with the annotations.

    Shows a progress bar on stderr when it takes more than a few seconds.

    Args:
        detector: The detector; a ``RayDetector`` spreads the images over the machines of a cluster.
        images_dir: Folder of the images.
        annotations_file: COCO instances JSON, or with ``panoptic_dir`` a COCO panoptic JSON.
        panoptic_dir: Folder of the panoptic PNG files; panoptic quality is evaluated instead of boxes.
        batch_size: Maximum number of images that go through the model at once.
        limit: Only use the first so many images.
        masks: Whether to evaluate masks too; by default where the model gives and the annotations have them.
        max_objects: The most detections of an image, the best ones; by default as the detector's
            ``detection_config`` says, or as many as the model has object queries, of which COCO counts the
            best 100 of each class. The originals take 100.
        overlap: IoU above which the lower-scored of two boxes is dropped (1 keeps all); by default as
            ``detection_config`` says.
        tiles: Cut larger images into tiles, as for a call of the detector.
        raw: Leave ``detection_config`` out: neither overlap filter nor calibration, and tiles only where
            ``tiles`` asks for them.
        threshold: Only segments with a higher score enter the panoptic quality. Boxes and masks count
            whatever their score, as COCO asks.
        strict: Raise an error if the data set has problems or an image cannot be read, instead of leaving
            them out with a warning.

    Raises:
        AnnotationError: The annotations cannot be read or used, or do not fit the model or the images.
        ImageError: No image can be read, or ``strict`` is set and one cannot.
        SettingError: A number is out of range, or the model cannot give what is asked.
        MissingExtraError: faster-coco-eval is not installed.
    """
    _check_masks(detector, panoptic=panoptic_dir is not None, masks=masks)
    # Polygons are only kept where masks may be evaluated.
    keep = detector.has_masks if masks is None else masks
    dataset = DetectionDataset.from_coco(
        images_dir, annotations_file, panoptic_dir=panoptic_dir, return_masks=keep and panoptic_dir is None
    )
    return evaluate_dataset(
        detector,
        dataset,
        batch_size=batch_size,
        limit=limit,
        masks=masks,
        max_objects=max_objects,
        overlap=overlap,
        tiles=tiles,
        raw=raw,
        threshold=threshold,
        strict=strict,
    )


def evaluate_dataset(
    detector: ObjectFinder,
    dataset: DetectionDataset,
    *,
    batch_size: int = 1,
    limit: int | None = None,
    masks: bool | None = None,
    max_objects: int | None = None,
    overlap: float | None = None,
    tiles: int | str | Sequence[int] | None = None,
    raw: bool = False,
    threshold: float = PANOPTIC_THRESHOLD,
    strict: bool = False,
    errors: bool = False,
    layers: bool = False,
) -> Evaluation:
    """Runs a detector over a data set of any format, see :func:`evaluate_detector`.

    The data set is checked first if it is not yet (:func:`detrkit.data.check_dataset`), so training and
    evaluation measure the same.

    Args:
        detector: The detector.
        dataset: The data set; its images are read in its own EXIF frame.
        batch_size: Maximum number of images that go through the model at once.
        limit: Only use the first so many images.
        masks: Whether to evaluate masks too; by default where the model gives and all annotations have them.
        max_objects: The most detections of an image, see :func:`evaluate_detector`.
        overlap: IoU of the overlap filter, see there.
        tiles: Cut larger images into tiles, see there.
        raw: Leave the detector's detection settings out.
        threshold: Only segments with a higher score enter the panoptic quality.
        strict: Raise an error if the data set has problems or an image cannot be read, instead of leaving
            them out with a warning.
        errors: Whether to sort the mistakes of boxes into kinds, see
            :func:`detrkit.evaluation.error_analysis.analyse_errors`.
        layers: Whether to evaluate the boxes of every decoder layer, not only of the last one. Masks are not
            evaluated then.

    Raises:
        AnnotationError: The annotations cannot be used, or do not fit the model or the images.
        ImageError: No image can be read, or ``strict`` is set and one cannot.
        SettingError: A number is out of range, or the model cannot give what is asked.
        MissingExtraError: faster-coco-eval is not installed.
    """
    if limit is not None and limit < 1:
        raise SettingError(f"limit must be at least 1, not {limit}")
    panoptic = dataset.panoptic_dir is not None
    _check_masks(detector, panoptic=panoptic, masks=masks)
    if batch_size > 1 and getattr(detector.config, "dilation", False):
        warnings.warn(
            f"DC5 models were made for one image at a time; at batch size {batch_size} the numbers may "
            "differ from the published ones",
            stacklevel=2,
        )
    if layers and (panoptic or masks):
        raise SettingError("decoder layers are compared by their boxes; leave out masks and panoptic data")
    if masks and not panoptic and not dataset.has_segmentations:
        raise AnnotationError(f"{dataset.source} has annotations without a segmentation; leave out masks")
    if masks is None:
        masks = detector.has_masks and not layers and dataset.has_segmentations
    if not dataset.checked:
        masked = bool(masks) and not panoptic
        dataset = check_dataset(replace(dataset, return_masks=masked), strict=strict).dataset
    if panoptic:
        return _evaluate_panoptic(detector, dataset, batch_size, limit, threshold, strict)
    config = detector.detection_config
    config = DetectionConfig(chosen=config.chosen) if raw else config
    detector = detector.with_config(config.with_options(max_objects=max_objects, overlap=overlap), tiles)
    return _evaluate_detections(detector, dataset, batch_size, limit, bool(masks), strict, errors, layers)


def _without_thresholds(config: DetectionConfig) -> dict[str, object]:
    return {name: value for name, value in config.decisions().items() if name != "threshold"}


def _check_masks(detector: ObjectFinder, *, panoptic: bool, masks: bool | None) -> None:
    """Refuses, with a SettingError, to evaluate masks of a model that gives none."""
    if not detector.has_masks and (panoptic or masks):
        wanted = "panoptic quality needs" if panoptic else "masks need"
        raise SettingError(
            f"this model detects boxes only; {wanted} a panoptic one such as detr-resnet-50-panoptic"
        )


def evaluate_predictions(
    annotations_file: str | os.PathLike[str],
    predictions_file: str | os.PathLike[str],
    *,
    panoptic_dir: str | os.PathLike[str] | None = None,
    errors: bool = False,
) -> Evaluation:
    """Compares predictions in files with the annotations.

    Args:
        annotations_file: COCO instances JSON, or with ``panoptic_dir`` a COCO panoptic JSON.
        predictions_file: COCO results JSON (boxes, masks, or both in one entry), a document of
            ``detrkit detect``, or with ``panoptic_dir`` a COCO panoptic JSON such as ``detrkit segment``
            writes, whose PNG files are in the folder of its name (see ``panoptic_quality_of_files``).
        panoptic_dir: Folder of the ground truth's panoptic PNG files.
        errors: Whether to sort the mistakes into kinds.

    Raises:
        AnnotationError: A file cannot be read or used, or they do not fit each other.
        MissingExtraError: faster-coco-eval is not installed.
    """
    if panoptic_dir is not None:
        quality = panoptic_quality_of_files(annotations_file, predictions_file, panoptic_dir)
        return Evaluation(images=quality.images, seconds_per_image=None, panoptic=quality)
    read = read_results(predictions_file)
    shapes = {kind: any(key in entry for entry in read.entries) for kind, key in RESULT_KEYS.items()}
    shapes["bbox"] |= not shapes["segm"]  # nothing found is no box found
    truth = read_ground_truth(annotations_file, masks=shapes["segm"] or None)
    results = aligned(read, truth)
    name = documents.name_of(predictions_file)
    found = {kind: compare(truth, results, kind, name=name) for kind, given in shapes.items() if given}
    return Evaluation(
        images=len(truth["images"]),
        seconds_per_image=None,
        boxes=found.get("bbox"),
        masks=found.get("segm"),
        results=dict.fromkeys(found, results),
        errors=analyse_errors(truth, results, next(iter(found))) if errors else None,
    )


def _evaluate_detections(
    detector: ObjectFinder,
    dataset: DetectionDataset,
    batch_size: int,
    limit: int | None,
    masks: bool,
    strict: bool,
    errors: bool,
    layers: bool,
) -> Evaluation:
    evaluator = CocoEvaluator(dataset, detector.names)
    clock = Clock()
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "strict": strict, "clock": clock}
    images = dataset.document["images"]
    by_layer = LayerEvaluator(detector, evaluator) if layers else None
    if by_layer is not None:
        for place, found in results_of(by_layer.stream, dataset, **options):
            by_layer.add(images[place]["id"], found)
    else:
        for place, detections in detections_of(detector, dataset, masks=masks, **options):
            evaluator.add(images[place]["id"], detections)
    return Evaluation(
        images=len(evaluator.image_ids),
        seconds_per_image=clock.seconds / len(evaluator.image_ids),
        boxes=evaluator.result("bbox"),
        masks=evaluator.result("segm") if masks else None,
        results=evaluator.results,
        errors=evaluator.errors() if errors else None,
        layers=None if by_layer is None else by_layer.result(),
        dataset=dataset,
        detection_config=detector.detection_config,
    )


def _evaluate_panoptic(
    detector: ObjectFinder,
    dataset: DetectionDataset,
    batch_size: int,
    limit: int | None,
    threshold: float,
    strict: bool,
) -> Evaluation:
    quality = PanopticQuality(dataset.document["categories"])
    known = match_categories(detector.names, dataset.document["categories"], dataset.used_categories)
    categories = {label: known.get(label) for label in detector.names}
    by_image = {entry["image_id"]: entry for entry in dataset.document["annotations"]}
    images = dataset.document["images"]
    clock = Clock()
    stream = partial(detector.stream_segments, threshold=threshold)
    assert dataset.panoptic_dir is not None
    evaluated = 0
    options: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "strict": strict, "clock": clock}
    for place, prediction in results_of(stream, dataset, **options):
        annotation = by_image[images[place]["id"]]
        image_id = annotation["image_id"]
        ids, segments = in_categories(prediction.ids, prediction.segments, categories)
        png = dataset.panoptic_dir / annotation["file_name"]
        true_ids = read_panoptic_ids(png, f"image {image_id}: the true map")
        quality.update(ids, segments, true_ids, annotation["segments_info"], image_id=image_id)
        evaluated += 1
    seconds = clock.seconds / evaluated
    return Evaluation(images=evaluated, seconds_per_image=seconds, panoptic=quality.result())
