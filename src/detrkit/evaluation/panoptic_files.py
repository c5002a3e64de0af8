"""The panoptic quality of predictions in files, in COCO's panoptic format."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from detrkit.common.errors import AnnotationError, ImageError
from detrkit.common.progress import with_progress
from detrkit.common.schema import Annotation, Category, Segment
from detrkit.data.documents import field, read_document
from detrkit.evaluation.categories import classes_by_name
from detrkit.evaluation.panoptic_quality import VOID, PanopticQuality, PanopticResult

# Another process is only worth its start for this many images (about five seconds of work).
_IMAGES_PER_PROCESS = 250
_CHUNK = 8


def panoptic_quality_of_files(
    annotations_file: str | os.PathLike[str],
    predictions_file: str | os.PathLike[str],
    annotations_dir: str | os.PathLike[str] | None = None,
    predictions_dir: str | os.PathLike[str] | None = None,
    *,
    processes: int | None = None,
) -> PanopticResult:
    """The panoptic quality of predictions in COCO's panoptic format.

    Shows a progress bar on stderr when it takes more than a few seconds.

    Args:
        annotations_file: COCO panoptic JSON of the ground truth, with ``annotations`` and ``categories``.
        predictions_file: COCO panoptic JSON of the predictions. Images that the ground truth does not have
            are left out. Category ids are those of the ground truth, unless the file has ``categories`` of
            its own: these are matched by name, and segments of those that the ground truth does not have
            become void.
        annotations_dir: Folder of the ground truth's PNG files; by default the JSON's path without ".json".
        predictions_dir: Folder of the predictions' PNG files, with the same default.
        processes: How many to use; by default one more for every few hundred images, up to the number of
            processors. Where processes are not forked, a script that asks for several needs the usual
            ``if __name__ == "__main__":`` guard.

    Raises:
        AnnotationError: A file is missing or no such file, an image has no prediction, or a prediction does
            not fit (see ``PanopticQuality.update``).
    """
    truth = read_document(annotations_file, "annotations", "categories")
    predictions = read_document(predictions_file, "annotations")
    true_folder = _png_folder(annotations_dir, annotations_file)
    predicted_folder = _png_folder(predictions_dir, predictions_file)
    pairs = _pair_annotations(truth["annotations"], predictions["annotations"], predictions_file)
    categories = _match_by_name(predictions.get("categories"), truth["categories"])
    quality = PanopticQuality(truth["categories"])
    count = partial(_count_files, quality, true_folder, predicted_folder, categories)
    if processes is None:
        processes = max(1, min(_processors(), len(pairs) // _IMAGES_PER_PROCESS))
    if processes == 1:
        for counts in with_progress(map(count, pairs), len(pairs), "Comparing"):
            quality.add(counts)
    else:
        with ProcessPoolExecutor(processes, initializer=_ignore_interrupts) as pool:
            for counts in with_progress(pool.map(count, pairs, chunksize=_CHUNK), len(pairs), "Comparing"):
                quality.add(counts)
    return quality.result()


def _match_by_name(predicted: object, true: Sequence[Category]) -> dict[int, int | None]:
    """Category id of the predictions -> that of the ground truth, None where it has none of that name.

    Empty where the predictions name no category that the ground truth knows: ids are the same then.
    """
    listed = predicted if isinstance(predicted, list) else []
    named = [c for c in listed if isinstance(c, Mapping) and {"id", "name"} <= c.keys()]
    found = classes_by_name({category["id"]: str(category["name"]) for category in named}, true)
    return {category["id"]: found.get(category["id"]) for category in named} if found else {}


def _pair_annotations(
    truth: Sequence[Annotation],
    predictions: Sequence[Annotation],
    predictions_file: str | os.PathLike[str],
) -> list[tuple[Annotation, Annotation]]:
    """The true and the predicted annotation of each image, with the keys that the comparison needs."""
    for annotation, owner in [(a, "a true") for a in truth] + [(a, "a predicted") for a in predictions]:
        for key in ("image_id", "file_name", "segments_info"):
            field(annotation, key, f"{owner} panoptic annotation of image {annotation.get('image_id', '?')}")
    predicted = {annotation["image_id"]: annotation for annotation in predictions}
    missing = [a["image_id"] for a in truth if a["image_id"] not in predicted]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise AnnotationError(f"{predictions_file} has no prediction for image {missing[0]}{more}")
    return [(annotation, predicted[annotation["image_id"]]) for annotation in truth]


def _count_files(
    quality: PanopticQuality,
    true_folder: Path,
    predicted_folder: Path,
    categories: Mapping[int, int | None],
    pair: tuple[Annotation, Annotation],
) -> np.ndarray:
    """The counts of one image whose maps are PNG files."""
    true, predicted = pair
    image = f"image {true['image_id']}"
    ids = read_panoptic_ids(predicted_folder / predicted["file_name"], f"{image}: the predicted map")
    ids, segments = in_categories(ids, predicted["segments_info"], categories)
    true_ids = read_panoptic_ids(true_folder / true["file_name"], f"{image}: the true map")
    return quality.count(ids, segments, true_ids, true["segments_info"], image)


def in_categories(
    ids: np.ndarray, segments: Sequence[Segment], categories: Mapping[int, int | None]
) -> tuple[np.ndarray, list[Segment]]:
    """Gives the segments of a map (height, width) other category ids: the new one by the one so far.

    Segments of categories that become None are left out, their pixels void. Categories that are not listed
    stay.
    """
    kept: list[Segment] = []
    foreign: list[int] = []
    for segment in segments:
        category = segment.get("category_id")
        if category is None or category not in categories:
            kept.append(segment)
        elif (known := categories[category]) is not None:
            kept.append({**segment, "category_id": known})
        else:
            foreign.append(segment.get("id", VOID))
    return (np.where(np.isin(ids, foreign), VOID, ids) if foreign else ids), kept


def read_panoptic_ids(path: Path, what: str) -> np.ndarray:
    """The segment ids of a panoptic PNG, (height, width); ``what`` names the map in errors.

    Raises:
        AnnotationError: The file is missing or is not an image.
    """
    from detrkit.processing.images import load_image
    from detrkit.processing.panoptic_png import rgb_to_id

    try:
        return rgb_to_id(np.asarray(load_image(path)))
    except ImageError as error:
        raise AnnotationError(f"{what}: {error}") from error


def _png_folder(folder: str | os.PathLike[str] | None, file: str | os.PathLike[str]) -> Path:
    path = Path(file).with_suffix("") if folder is None else Path(folder)
    if not path.is_dir():
        raise AnnotationError(f"{path}: no such folder, but the PNG files of {file} must be in it")
    return path


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts() -> None:
    """Leaves Ctrl-C to the main process, which ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
