"""Data sets as tools export them: which files of a folder are which split, in which format."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Document
from detrkit.data.coco import DetectionDataset
from detrkit.data.documents import read_lines, read_lists
from detrkit.data.image_files import ImageFiles, image_files_in
from detrkit.data.voc import read_voc
from detrkit.data.yolo import SPLITS, read_labels, read_settings, read_yolo, split_of

WHOLE = "all"
"""The split of a data set that has none."""

_JSON_SUFFIXES = (".json", ".json.gz")
_SAMPLE = 20  # images that are looked for to find their folder
_WITH_LABELS = ("instances", "coco", "annotation", "result", "label")


def open_split(
    data: str | os.PathLike[str], split: str, *, return_masks: bool = False
) -> DetectionDataset | None:
    """Reads one split of a data set of any format.

    Args:
        data: A YOLO ``data.yaml``, a COCO JSON file, a Hugging Face data set (its Hub id or folder), or a
            folder: of COCO as Roboflow, CVAT, Label Studio, LabelMe, VIA, Datumaro and FiftyOne export it, of
            YOLO, or of Pascal VOC.
        split: "train", "val" or "test", whatever the data set calls it, or :data:`WHOLE` for a data set
            without splits.
        return_masks: Whether targets have masks.

    Returns:
        The data set; None if it has no such split.

    Raises:
        AnnotationError: Nothing is found at ``data``, or it cannot be read.
    """
    path = Path(data)
    if not path.exists():
        from detrkit.data.hugging_face import is_hub_id, read_hub

        if is_hub_id(os.fspath(data)):
            return read_hub(os.fspath(data), split, return_masks=return_masks)
        raise AnnotationError(
            f"{path}: data set not found; pass a file, a folder, or the id of a Hub data set"
        )
    if path.is_file():
        return _open_file(path, split, return_masks)
    for read in (_yolo, _coco, _voc, _labels_without_settings, _hugging_face):
        found = read(path, split, return_masks)
        if found is not None:
            return found
    return None


def open_any(data: str | os.PathLike[str], *splits: str, return_masks: bool = False) -> DetectionDataset:
    """The first of some splits that a data set has.

    Raises:
        AnnotationError: It has none of them.
    """
    for split in splits:
        found = open_split(data, split, return_masks=return_masks)
        if found is not None:
            return found
    there = [name for name in (*SPLITS, WHOLE) if name not in splits and _has(data, name)]
    raise AnnotationError(
        f"{data}: no annotations found for {' or '.join(splits)}"
        + (f" (it has {', '.join(there)})" if there else "")
        + "; a data set is a YOLO data.yaml, a COCO JSON file beside its images, a folder with COCO, YOLO "
        "or Pascal VOC annotations, or a Hugging Face data set"
    )


def _has(data: str | os.PathLike[str], split: str) -> bool:
    try:
        return open_split(data, split) is not None
    except AnnotationError:
        return False


def _open_file(path: Path, split: str, return_masks: bool) -> DetectionDataset | None:
    if path.suffix.lower() in (".yaml", ".yml"):
        if split_of(read_settings(path), split) is None:
            return None
        return read_yolo(path, split, return_masks=return_masks)
    if not path.name.lower().endswith(_JSON_SUFFIXES):
        raise AnnotationError(f"{path}: a data set must be a YAML or JSON file, or a folder")
    named = split_in(path.name)
    if split != (named or WHOLE):
        return None
    document = read_lists(path, "images", "annotations", "categories")
    return _read_coco(path, document, _image_folders(path.parent, named), return_masks)


def split_in(name: str) -> str | None:
    """The split that a name contains as a word, such as "val" in ``instances_val2017.json``."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, names in SPLITS.items() if set(words) & set(names)), None)


def _yolo(folder: Path, split: str, return_masks: bool) -> DetectionDataset | None:
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            settings = read_settings(path)
        except AnnotationError:
            if path.name in ("data.yaml", "data.yml", "dataset.yaml"):
                raise
            continue
        if split_of(settings, split) is not None:
            return read_yolo(path, split, return_masks=return_masks)
    return None


def _coco(folder: Path, split: str, return_masks: bool) -> DetectionDataset | None:
    names = None if split == WHOLE else SPLITS[split]
    inside = [child for child in sorted(folder.iterdir()) if child.is_dir()]
    if names is not None:
        # A folder for each split, as Roboflow and FiftyOne export.
        for child in (child for child in inside if split_in(child.name) == split):
            for path, document in _coco_files([child, child / "annotations"], None):
                return _read_coco(path, document, _image_folders(child, split), return_masks)
    folders = [folder, folder / "annotations", folder / "Annotations"]
    for path, document in _coco_files(folders, split):
        return _read_coco(path, document, _image_folders(folder, split), return_masks)
    return None


def _coco_files(folders: Sequence[Path], split: str | None) -> Iterator[tuple[Path, Document]]:
    """COCO JSON files of a split (any if None), those most likely to have the objects first."""

    def rank(path: Path) -> tuple[int, str]:
        name = path.name.lower()
        ranks = [i for i, word in enumerate(_WITH_LABELS) if word in name]
        return min(ranks, default=len(_WITH_LABELS) + ("panoptic" in name)), name

    files = [
        path
        for folder in folders
        if folder.is_dir()
        for path in folder.iterdir()
        if path.is_file() and path.name.lower().endswith(_JSON_SUFFIXES)
        if split is None or (split_in(path.name) or WHOLE) == split
    ]
    refused: AnnotationError | None = None
    for path in sorted(files, key=rank):
        try:
            document = read_lists(path, "images", "annotations", "categories")
        except AnnotationError as error:
            refused = refused or error
            continue
        if document["annotations"] or "image_info" not in path.name:  # COCO's lists of test images
            refused = None
            yield path, document
    if refused is not None and len(files) == 1:  # the only file is another tool's, or broken
        raise refused


def _image_folders(folder: Path, split: str | None) -> list[Path]:
    """Where the images of an annotation file may be, the nearest first."""
    roots = [folder, folder.parent] if folder.name.lower() == "annotations" else [folder]
    names = ("", "images", "data", "JPEGImages", "imgs", "img", "images/default")  # the last one is CVAT's
    found: list[Path] = []
    for root in roots:
        found += [root / name for name in names]
        for parent in (root, root / "images", root / "data"):
            if parent.is_dir() and split in SPLITS:
                own = [child for child in sorted(parent.iterdir()) if split_in(child.name) == split]
                found += [child / name for child in own if child.is_dir() for name in ("", "images", "data")]
    return [path for path in dict.fromkeys(found) if path.is_dir()]


def _read_coco(path: Path, document: Document, folders: list[Path], return_masks: bool) -> DetectionDataset:
    """A COCO document with the folder that has most of its images, and that of its panoptic PNG files."""
    entries = [entry for entry in document["images"] if isinstance(entry, Mapping)]
    sample = [str(entry.get("file_name")) for entry in islice(entries, _SAMPLE)]
    found = {folder: ImageFiles(folder).find(sample) for folder in folders}

    def matches(folder: Path) -> tuple[int, int]:
        return len(found[folder]), sum(file == name for name, file in found[folder].items())

    best = max(found, key=matches, default=path.parent)
    panoptic: dict[str, Any] = {}
    annotations = [entry for entry in document["annotations"] if isinstance(entry, Mapping)]
    if annotations and "segments_info" in annotations[0]:
        panoptic = {"panoptic_dir": _panoptic_folder(path, str(annotations[0].get("file_name")))}
    read = DetectionDataset.from_coco(best, document, return_masks=return_masks, **panoptic)
    return replace(read, source=str(path))


def _panoptic_folder(path: Path, name: str) -> Path:
    """The folder of the PNG files of a panoptic file."""
    near = [
        path.with_suffix(""),
        path.parent,
        *sorted(path.parent.glob("*")),
        *sorted(path.parent.parent.glob("*")),
    ]
    found = next((folder for folder in near if (folder / name).is_file()), None)
    if found is None:
        raise AnnotationError(
            f"{path}: folder of the panoptic PNG files, such as {name}, not found beside it"
        )
    return found


def _voc(folder: Path, split: str, return_masks: bool) -> DetectionDataset | None:
    pairs = [("JPEGImages", "Annotations"), ("images", "annotations"), ("images", "Annotations"), ("", "")]
    if split == WHOLE:
        if any((folder / "ImageSets" / "Main" / f"{name}.txt").is_file() for name in SPLITS):
            return None
        return _voc_in(folder, pairs, return_masks, folder)
    for name in SPLITS[split]:
        listed = folder / "ImageSets" / "Main" / f"{name}.txt"
        if listed.is_file():
            # A second column says whether an image shows one class; it has no say here.
            stems = [line.split()[0] for _, line in read_lines(listed)]
            return _voc_in(folder, pairs, return_masks, folder, stems)
        nested = [(f"{images}/{name}", f"{notes}/{name}") for images, notes in pairs if images]
        found = _voc_in(folder, nested, return_masks, folder)
        if found is None and (folder / name).is_dir():
            found = _voc_in(folder / name, pairs, return_masks, folder)
        if found is not None:
            return found
    return None


def _voc_in(
    folder: Path,
    pairs: list[tuple[str, str]],
    return_masks: bool,
    whole: Path,
    stems: list[str] | None = None,
) -> DetectionDataset | None:
    options: dict[str, Any] = {"return_masks": return_masks, "whole": whole, "stems": stems}
    for images, notes in pairs:
        if (folder / images).is_dir() and any((folder / notes).glob("*.xml")):
            return read_voc(folder / images, folder / notes, **options)
    return None


def _labels_without_settings(folder: Path, split: str, return_masks: bool) -> DetectionDataset | None:
    """YOLO labels without a ``data.yaml``, as Label Studio (classes.txt) and CVAT (obj.names) export them."""
    names = next((folder / name for name in ("classes.txt", "obj.names") if (folder / name).is_file()), None)
    if names is None:
        return None
    classes = [line for _, line in read_lines(names)]
    of_split = (
        ["images"]
        if split == WHOLE
        else [f"obj_{name}_data" for name in SPLITS[split]] + [f"images/{name}" for name in SPLITS[split]]
    )
    other = [child for child in (folder / "images").glob("*") if child.is_dir() and split_in(child.name)]
    if split == WHOLE and other:
        return None
    images = next((folder / name for name in of_split if (folder / name).is_dir()), None)
    if images is None:
        return None
    return read_labels(image_files_in(images), {"names": classes}, str(folder), return_masks=return_masks)


def _hugging_face(folder: Path, split: str, return_masks: bool) -> DetectionDataset | None:
    from detrkit.data.hugging_face import read_folder

    return read_folder(folder, split, return_masks=return_masks)
