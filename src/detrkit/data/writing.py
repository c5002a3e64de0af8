"""Data sets written as COCO, YOLO or Pascal VOC, with copies of their images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import PIL.Image
import yaml  # type: ignore[import-untyped,unused-ignore]

from detrkit.common.errors import SettingError
from detrkit.common.files import atomic_folder
from detrkit.common.progress import with_progress
from detrkit.common.schema import Annotation
from detrkit.data.coco import DetectionDataset
from detrkit.processing.images import load_image, stored_orientation

_JPEG_QUALITY = 95


def check_output(output: Path, to: str) -> None:
    """Refuses, with a SettingError, an unknown format and a folder in which files are already."""
    if to not in _WRITERS:
        raise SettingError(f"unknown format {to!r}; use one of: {', '.join(_WRITERS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SettingError(f"{output} is not an empty folder; choose another one")


def write_dataset(
    splits: Mapping[str, DetectionDataset], output: str | os.PathLike[str], to: str
) -> dict[str, int]:
    """Writes the splits of a data set in a format, so that reading them gives the same images and objects.

    Images are copied. One with an EXIF orientation is written again as its boxes refer to it, without the
    orientation, so that no tool can read it in another frame.

    Args:
        splits: Checked data sets by "train", "val" or "test".
        output: The folder to write, which must be new or empty.
        to: "coco", "yolo" or "voc".

    Returns:
        Number of objects by split that the format cannot hold: crowds, except in COCO.

    Raises:
        SettingError: The format is unknown, the folder has files, or a data set is panoptic.
        ImageError: An image cannot be read.
        DetrkitError: A file cannot be written.
    """
    output = Path(output)
    check_output(output, to)
    if any(dataset.panoptic_dir is not None for dataset in splits.values()):
        raise SettingError("a panoptic data set cannot be converted; pass its instance annotations")
    left_out = {}
    taken: set[str] = set()
    with atomic_folder(output) as folder:
        for split, dataset in splits.items():
            if to == "voc":  # one folder for all splits
                names = _copy_images(dataset, folder / "JPEGImages", taken)
            else:
                names = _copy_images(dataset, folder / "images" / split, set())
            left_out[split] = _WRITERS[to](dataset, names, split, folder)
        if to == "yolo":
            first = next(iter(splits.values()))
            settings = {split: f"images/{split}" for split in splits}
            content = {"path": ".", **settings, "names": list(first.category_names.values())}
            (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return left_out


def _copy_images(dataset: DetectionDataset, folder: Path, taken: set[str]) -> dict[int, str]:
    """Copies the images, and gives their names by id; folders inside are kept, names taken get a number."""
    names: dict[int, str] = {}
    places = with_progress(range(len(dataset)), len(dataset), "Copying")
    for place in places:
        entry, path = dataset.document["images"][place], dataset.path(place)
        parts = PurePosixPath(str(entry["file_name"]).replace("\\", "/")).parts
        name = PurePosixPath(*(part for part in parts if part not in ("..", ".", "/")))
        with PIL.Image.open(path) as image:
            rotated = stored_orientation(image) != 1
        if rotated and name.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            name = name.with_suffix(".png")
        # Labels are called by the name without its suffix.
        stem, number = str(name.with_suffix("")), 1
        while stem.lower() in taken:
            number += 1
            stem = f"{name.with_suffix('')}_{number}"
        taken.add(stem.lower())
        names[entry["id"]] = f"{stem}{name.suffix}"
        target = folder / names[entry["id"]]
        target.parent.mkdir(parents=True, exist_ok=True)
        if rotated:
            upright = load_image(path, exif_orientation=dataset.upright)
            upright.info.pop("exif", None)
            upright.save(target, quality=_JPEG_QUALITY)
        else:
            shutil.copyfile(path, target)
    return names


def _objects(dataset: DetectionDataset) -> tuple[dict[int, list[Annotation]], int]:
    """The objects by image id, and the number of crowds, which are left out."""
    found: dict[int, list[Annotation]] = {image["id"]: [] for image in dataset.document["images"]}
    crowds = 0
    for entry in dataset.document["annotations"]:
        if entry["iscrowd"]:
            crowds += 1
        else:
            found[entry["image_id"]].append(entry)
    return found, crowds


def _write_coco(dataset: DetectionDataset, names: Mapping[int, str], split: str, folder: Path) -> int:
    images = [{**image, "file_name": names[image["id"]]} for image in dataset.document["images"]]
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**dataset.document, "images": images}) + "\n", encoding="utf-8")
    return 0


def _write_yolo(dataset: DetectionDataset, names: Mapping[int, str], split: str, folder: Path) -> int:
    numbers = {category: number for number, category in enumerate(dataset.category_names)}
    objects, crowds = _objects(dataset)
    for image in dataset.document["images"]:
        width, height = image["width"], image["height"]
        rows = []
        for entry in objects[image["id"]]:
            x, y, w, h = entry["bbox"]
            shape = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
            polygons = entry.get("segmentation")
            if isinstance(polygons, list) and len(polygons) == 1:
                shape = [value / (width, height)[i % 2] for i, value in enumerate(polygons[0])]
            rows.append(" ".join([str(numbers[entry["category_id"]]), *(f"{value:.8f}" for value in shape)]))
        path = (folder / "labels" / split / names[image["id"]]).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return crowds


def _write_voc(dataset: DetectionDataset, names: Mapping[int, str], split: str, folder: Path) -> int:
    objects, crowds = _objects(dataset)
    category_names = dataset.category_names
    # Pascal VOC counts whole pixels from 1. Fractions are written from 0, which tells readers of it.
    values = [value for entries in objects.values() for entry in entries for value in entry["bbox"]]
    first = 1 if all(float(value).is_integer() for value in values) else 0
    for image in dataset.document["images"]:
        root = ElementTree.Element("annotation")
        _add(root, "filename", names[image["id"]])
        size = ElementTree.SubElement(root, "size")
        for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
            _add(size, key, value)
        for entry in objects[image["id"]]:
            element = ElementTree.SubElement(root, "object")
            _add(element, "name", category_names[entry["category_id"]])
            box = ElementTree.SubElement(element, "bndbox")
            x, y, w, h = entry["bbox"]
            corners = {"xmin": x + first, "ymin": y + first, "xmax": x + w, "ymax": y + h}
            for key, corner in corners.items():
                _add(box, key, int(corner) if first else corner)
        path = (folder / "Annotations" / names[image["id"]]).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        ElementTree.ElementTree(root).write(path, encoding="utf-8")
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    listed.parent.mkdir(parents=True, exist_ok=True)
    stems = [PurePosixPath(name).with_suffix("") for name in names.values()]
    listed.write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
    return crowds


def _add(parent: ElementTree.Element, tag: str, value: object) -> None:
    ElementTree.SubElement(parent, tag).text = str(value)


_WRITERS: dict[str, Callable[[DetectionDataset, Mapping[int, str], str, Path], int]] = {
    "coco": _write_coco,
    "yolo": _write_yolo,
    "voc": _write_voc,
}
FORMATS = tuple(_WRITERS)
