"""Pascal VOC data sets: an XML file for each image."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from detrkit.common.errors import AnnotationError
from detrkit.common.schema import Annotation, Document
from detrkit.data.coco import DetectionDataset, existing_folder
from detrkit.data.image_files import image_files_in
from detrkit.data.problems import Findings


@dataclass(frozen=True)
class _Object:
    image_id: int
    name: str
    corners: list[float]
    polygon: list[float]


def read_voc(
    images_dir: str | os.PathLike[str],
    annotations_dir: str | os.PathLike[str] | None = None,
    *,
    return_masks: bool = False,
    stems: Sequence[str] | None = None,
    whole: str | os.PathLike[str] | None = None,
) -> DetectionDataset:
    """Reads a Pascal VOC data set: a folder of images and a folder of XML files.

    Images are rotated as their EXIF orientation says. An image without an XML file has no objects. Pascal VOC
    counts pixels from 1; where a corner is below 1 or a fraction, the tool counted from 0, and so does this.
    All XML files have a say in that, also those of other splits.

    Args:
        images_dir: The folder of the images (``JPEGImages``).
        annotations_dir: The folder of the XML files (``Annotations``); None for the folder of the images.
        return_masks: Whether targets have masks, made from the polygons of the files.
        stems: Names of the images to read, without suffix; all by default.
        whole: The folder of all splits, if they are in several; by default ``annotations_dir``.

    Returns:
        A data set whose category ids are 0, 1, 2, ... in the order of the names. ``check_dataset`` reports
        the files and objects that cannot be read.

    Raises:
        AnnotationError: A folder is missing, or has no images or no XML files.
    """
    images = existing_folder(images_dir, "images")
    annotations = existing_folder(annotations_dir or images_dir, "Pascal VOC annotations")
    files = {
        path.relative_to(annotations).with_suffix("").as_posix(): path for path in annotations.rglob("*.xml")
    }
    if not files:
        raise AnnotationError(f"{annotations}: no XML files found; check the folder of annotations")
    wanted = None if stems is None else set(stems)
    findings = Findings()
    document: Document = {"images": [], "annotations": [], "categories": []}
    objects: list[_Object] = []
    found = set()
    for path in image_files_in(images):
        stem = path.relative_to(images).with_suffix("").as_posix()
        if wanted is not None and stem not in wanted:
            continue
        found.add(stem)
        image_id = len(document["images"]) + 1
        if stem in files:
            read = _read(files[stem], image_id, findings)
            if read is None:
                continue
            objects += read
        document["images"].append({"id": image_id, "file_name": os.path.relpath(path, images)})
    for stem in sorted((files.keys() if wanted is None else wanted) - found):
        findings.add("missing_image", f"image of {files.get(stem, stem)}")
    names = {name: number for number, name in enumerate(sorted({thing.name for thing in objects}))}
    document["categories"] = [{"id": number, "name": name} for name, number in names.items()]
    own = {files[stem] for stem in found if stem in files}
    others = (path for path in Path(whole or annotations).rglob("*.xml") if path not in own)
    first = 0 if _counts_from_0(objects) or any(_counts_from_0(_objects_of(path)) for path in others) else 1
    for number, thing in enumerate(objects, start=1):
        x0, y0, x1, y1 = thing.corners
        entry: Annotation = {"id": number, "image_id": thing.image_id, "category_id": names[thing.name]}
        entry["bbox"] = [x0 - first, y0 - first, x1 - (x0 - first), y1 - (y0 - first)]
        entry["iscrowd"] = 0
        if thing.polygon:
            entry["segmentation"] = [[value - first for value in thing.polygon]]
        document["annotations"].append(entry)
    return DetectionDataset(
        document,
        images,
        str(annotations),
        return_masks=return_masks,
        exif_orientation=True,
        problems=findings.problems(),
        format=f"Pascal VOC, pixels counted from {first}",
    )


def _counts_from_0(objects: Iterable[_Object]) -> bool:
    """Whether a corner shows that the tool counted pixels from 0."""
    return any(value < 1 or value != round(value) for thing in objects for value in thing.corners)


def _objects_of(path: Path) -> list[_Object]:
    """The objects of a file of another split, which may be broken."""
    return _read(path, 0, Findings()) or []


def _read(path: Path, image_id: int, findings: Findings) -> list[_Object] | None:
    """The objects of a file; None if it cannot be read, so that its image is left out."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        reason = "is empty" if _is_empty(path) else f"is not XML ({error})"
        findings.add("broken_file", f"{path} {reason}")
        return None
    objects = []
    for place, element in enumerate(root.iter("object"), start=1):
        name = element.findtext("name") or ""
        box = element.find("bndbox")
        texts = [] if box is None else [box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")]
        corners = _numbers(texts)
        if not name.strip() or len(corners) != 4:
            lacking = "corners of a box" if name.strip() else "name"
            findings.add("broken_entry", f"{path}, object {place} has no {lacking}")
            continue
        objects.append(_Object(image_id, name, corners, _polygon(element.find("polygon"))))
    return objects


def _is_empty(path: Path) -> bool:
    try:
        return not path.stat().st_size
    except OSError:
        return False


def _numbers(texts: Sequence[str | None]) -> list[float]:
    """The numbers of texts; none if one of them is not a finite number."""
    try:
        numbers = [float(text) for text in texts if text is not None]
    except ValueError:
        return []
    return numbers if len(numbers) == len(texts) and all(map(math.isfinite, numbers)) else []


def _polygon(element: ElementTree.Element | None) -> list[float]:
    """X and y of the points of a polygon, as Roboflow writes them: x1, y1, x2, ..."""
    if element is None:
        return []
    count = 1 + len(element) // 2
    texts = [element.findtext(f"{axis}{i}") for i in range(1, count) for axis in "xy"]
    return _numbers(texts) if len(texts) >= 6 else []
