"""Checks of a data set before training or evaluation: its problems, and the data set without them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from detrkit.common.errors import AnnotationError
from detrkit.common.log import logger
from detrkit.common.schema import Annotation, Category, Document, Image
from detrkit.common.text import fold_name
from detrkit.data.check_objects import (
    Sizes,
    check_objects,
    check_panoptic,
    find_corner_boxes,
    name_of_row,
    refuse_fractions,
)
from detrkit.data.coco import UNUSED_LABEL, DetectionDataset
from detrkit.data.image_files import ImageFiles
from detrkit.data.image_sizes import ImageSize, read_image_sizes
from detrkit.data.normalisation import normalise
from detrkit.data.problems import Findings, Problem, fault_of
from detrkit.processing.coco_masks import decode_segmentations


@dataclass(frozen=True)
class DatasetReport:
    """The result of ``check_dataset``.

    Attributes:
        dataset: The data set without the entries that have problems.
        problems: The kinds of problems found, those of images first, and then what was only read differently.
        images: Number of usable images.
        objects: Number of usable annotated objects, including crowds.
        empty_images: Number of usable images without objects, which are not a problem.
    """

    dataset: DetectionDataset
    problems: tuple[Problem, ...]
    images: int
    objects: int
    empty_images: int

    def __str__(self) -> str:
        summary = f"{self.dataset.source}: {self.images} images, {self.objects} objects"
        if self.empty_images:
            summary += f", {self.empty_images} images without objects"
        return "\n".join([summary, *map(str, self.problems)])


def check_dataset(dataset: DetectionDataset, *, strict: bool = False, decode: bool = False) -> DatasetReport:
    """Finds entries that would break or distort training and evaluation, and mends them or leaves them out.

    Training, evaluation and every command use a data set as this check gives it. Reads only the headers of
    image files. Each kind of problem is logged as one line.

    Args:
        dataset: The data set as it was read.
        strict: Raise an error if there is any problem. Images without objects are not a problem, nor is what
            can be read without loss, such as numbers in quotes.
        decode: Decode every image, which also finds truncated files; takes a few milliseconds per image.

    Returns:
        The report, with a data set in which every image has a size and every annotation an ``id``, ``bbox``,
        ``area`` and ``iscrowd``.

    Raises:
        AnnotationError: No usable image or object is left, boxes are fractions of the image, or ``strict`` is
            set and there are problems.
        MissingExtraError: Polygons must be converted to masks, and no package that can do so is installed.
    """
    report = _checked(dataset, decode=decode)
    problems = [problem for problem in report.problems if not problem.is_note]
    if strict and problems:
        found = "; ".join(map(str, problems))
        raise AnnotationError(f"{dataset.source} has problems. {found}. Correct them, or leave out --strict")
    for problem in report.problems:
        logger.warning("%s: %s", dataset.source, problem)
    return report


def _checked(dataset: DetectionDataset, *, decode: bool) -> DatasetReport:
    findings = Findings()
    for problem in dataset.problems:  # those that the reader of its format met
        findings.counts[problem.kind], findings.examples[problem.kind] = problem.count, problem.example
    dataset = replace(dataset, document=normalise(dataset.document, findings), problems=())
    categories, ids = _check_categories(dataset, findings)
    images, upright, same = _check_images(dataset, findings, decode)
    sizes = {image["id"]: _size_of(image) for image in images}
    rows = _rows_of_images(dataset, findings, sizes, same)
    if dataset.panoptic_dir is not None:
        annotations = check_panoptic(dataset.panoptic_dir, rows, sizes, ids, findings, decode)
        objects_of = Counter({a["image_id"]: len(a["segments_info"]) for a in annotations})
        images = [image for image in images if image["id"] in objects_of]
        used = {segment["category_id"] for a in annotations for segment in a["segments_info"]}
    else:
        refuse_fractions(rows, dataset.source)
        annotations = check_objects(rows, sizes, ids, findings, dataset.return_masks)
        find_corner_boxes(rows, sizes, findings)
        objects_of = Counter(annotation["image_id"] for annotation in annotations)
        used = {annotation["category_id"] for annotation in annotations}
    if dataset.images_dir is not None:  # without, results may refer to any category
        categories = _without_root(categories, used, findings)
    document: Document = {"images": images, "annotations": annotations, "categories": categories}
    problems = findings.problems()
    objects = sum(objects_of.values())
    _refuse_nothing(dataset, document, objects, problems)
    if dataset.return_masks:
        _try_polygons(annotations, sizes)
    elif dataset.panoptic_dir is None:
        for annotation in annotations:
            annotation.pop("segmentation", None)
    return DatasetReport(
        dataset=replace(dataset, document=document, exif_orientation=upright, checked=True),
        problems=problems,
        images=len(images),
        objects=objects,
        empty_images=sum(not objects_of[image["id"]] for image in images),
    )


def _refuse_nothing(
    dataset: DetectionDataset, document: Document, objects: int, problems: Sequence[Problem]
) -> None:
    """Raises an AnnotationError if there is nothing to train on or to evaluate."""
    found = "; ".join(map(str, problems)) or "It lists none"
    for what, left in (
        ("image", len(document["images"])),
        ("category", len(document["categories"])),
        ("object", objects),
    ):
        if not left:
            raise AnnotationError(f"{dataset.source}: no usable {what} is left. {found}")
    if dataset.panoptic_dir is None and all(entry["iscrowd"] for entry in document["annotations"]):
        raise AnnotationError(
            f"{dataset.source}: all {objects} objects are crowds (iscrowd 1), which are neither trained on "
            "nor evaluated; set iscrowd to 0"
        )


def _try_polygons(annotations: Sequence[Annotation], sizes: Sizes) -> None:
    """Draws one polygon: that a package is missing should not show in the first step of a training."""
    polygons = (a for a in annotations if isinstance(a.get("segmentation"), list))
    first = next(polygons, None)
    size = None if first is None else sizes[first["image_id"]]
    if first is not None and size is not None:
        decode_segmentations([first["segmentation"]], *size, first["image_id"])


def _size_of(image: Image) -> tuple[int, int] | None:
    return (image["height"], image["width"]) if "height" in image and "width" in image else None


def _rows_of_images(
    dataset: DetectionDataset, findings: Findings, sizes: Sizes, same: Mapping[int, int]
) -> list[Annotation]:
    """The annotations of usable images, those of an image that is listed twice with its first id."""
    listed = {i["id"] for i in dataset.document["images"] if fault_of(i, {"id": int}) is None}
    rows: list[Annotation] = []
    for row in dataset.document["annotations"]:
        if findings.lacks(row, {"image_id": int}, f"annotation {name_of_row(row)}"):
            continue
        if row["image_id"] not in listed:
            findings.add("unknown_image", f"annotation {name_of_row(row)}, image {row['image_id']}")
            continue
        image_id = same.get(row["image_id"], row["image_id"])
        if image_id in sizes:  # annotations of dropped images are dropped with them
            rows.append({**row, "image_id": image_id})
    return rows


def _check_categories(dataset: DetectionDataset, findings: Findings) -> tuple[list[Category], dict[int, int]]:
    """Usable categories, and the id that each id stands for: another one's if that has the same name."""
    kept: dict[int, Category] = {}
    ids_by_name: dict[str, int] = {}
    merged: dict[int, int] = {}
    spellings: dict[str, str] = {}
    for position, entry in enumerate(dataset.document["categories"], start=1):
        if findings.lacks(entry, {"id": int, "name": str}, f"category {position} in the list"):
            continue
        if entry["id"] in kept or entry["name"] in ids_by_name:
            findings.add("duplicate_category", f"{entry['id']} ({entry['name']})")
            merged.setdefault(entry["id"], ids_by_name.get(entry["name"], entry["id"]))
            continue
        kept[entry["id"]] = entry
        ids_by_name[entry["name"]] = entry["id"]
        first = spellings.setdefault(fold_name(entry["name"]), entry["name"])
        if first != entry["name"] and entry["name"] != UNUSED_LABEL:
            findings.add("similar_names", f"{entry['name']!r} and {first!r}")
    return list(kept.values()), merged | {category: category for category in kept}


def _without_root(categories: list[Category], used: Container[int], findings: Findings) -> list[Category]:
    """Leaves out a category that only names the group of all others, as Roboflow writes."""
    for root in categories:
        others = [category for category in categories if category is not root]
        groups = others and all(category.get("supercategory") == root["name"] for category in others)
        if groups and root["id"] not in used:
            findings.add("root_category", f"{root['id']} ({root['name']})")
            return others
    return categories


def _check_images(
    dataset: DetectionDataset, findings: Findings, decode: bool
) -> tuple[list[Image], bool, dict[int, int]]:
    """Usable image entries with their sizes, whether to read them upright, and ids that stand for others."""
    listed: dict[int, list[Image]] = {}
    needed = {"id": int} if dataset.images_dir is None else {"id": int, "file_name": str}
    for position, entry in enumerate(dataset.document["images"], start=1):
        if not findings.lacks(entry, needed, f"image {position} in the list"):
            listed.setdefault(entry["id"], []).append(entry)
    candidates: list[Image] = []
    taken: dict[str, int] = {}
    same: dict[int, int] = {}
    for image_id, entries in listed.items():
        names = [str(entry.get("file_name", "")) for entry in entries]
        if len(set(names)) > 1:
            # It is unknown which annotations belong to which file.
            for name in names:
                findings.add("duplicate_image_id", f"{image_id} ({name})")
            continue
        for _ in entries[1:]:
            findings.add("duplicate_image_id", f"{image_id} ({names[0]})")
        if names[0] in taken and dataset.images_dir is not None:  # else results may refer to either id
            findings.add("duplicate_file_name", names[0])
            same[image_id] = taken[names[0]]
        else:
            candidates.append(entries[0])
            taken[names[0]] = image_id
    if dataset.images_dir is None:
        return candidates, bool(dataset.exif_orientation), same
    by_name = {entry["file_name"]: entry for entry in candidates}
    return *_check_files(by_name, dataset, findings, decode), same


def _check_files(
    candidates: Mapping[str, Image], dataset: DetectionDataset, findings: Findings, decode: bool
) -> tuple[list[Image], bool]:
    """The entries, by file name, whose file is there and has the size that they state."""
    assert dataset.images_dir is not None
    files = ImageFiles(dataset.images_dir).find(candidates)
    for name, file in files.items():
        if file != name:
            findings.add("renamed_image", f"{name} as {dataset.images_dir / file}")
    measured: dict[str, ImageSize] = {}
    paths = [dataset.images_dir / files.get(name, name) for name in candidates]
    for name, size in zip(candidates, read_image_sizes(paths, decode=decode)):
        if isinstance(size, ImageSize):
            measured[name] = size
        elif isinstance(size, FileNotFoundError):
            findings.add("missing_image", str(dataset.images_dir / name))
        else:
            findings.add("unreadable_image", str(size))
    upright = dataset.exif_orientation
    if upright is None:
        upright = _stated_upright(candidates, measured, findings)
    kept: list[Image] = []
    for name, size in measured.items():
        entry = candidates[name]
        height, width = size.frame(upright)
        stated = entry.get("height", height), entry.get("width", width)
        if stated == (height, width):
            kept.append({**entry, "file_name": files[name], "height": height, "width": width})
            continue
        rotated = "; rotated by its EXIF orientation?" if stated == (width, height) else ""
        findings.add("size_mismatch", f"{name} is {width}x{height}, not {stated[1]}x{stated[0]}{rotated}")
    return kept, upright


def _stated_upright(
    candidates: Mapping[str, Image], measured: Mapping[str, ImageSize], findings: Findings
) -> bool:
    """Whether the sizes in the file are those of upright images, where EXIF orientations make a difference.

    COCO's boxes refer to the pixels as they are stored, and most tools' to the image as it is shown.
    """
    shown: list[str] = []
    for name, size in measured.items():
        stated = _size_of(candidates[name])
        if size.rotated and size.height != size.width and stated is not None:
            if stated == size.frame(False):
                return False
            if stated == size.frame(True):
                shown.append(name)
    for name in shown:
        findings.add("upright_images", name)
    return bool(shown)
