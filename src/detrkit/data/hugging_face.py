"""Hugging Face data sets: rows with an image and its objects, as in cppe-5.

The files are read with pyarrow: Parquet, as on the Hub, and the Arrow files of ``save_to_disk``. Images that
are inside the rows are written to a cache, since training and evaluation read files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detrkit.common.errors import AnnotationError, MissingExtraError
from detrkit.common.files import atomic_file
from detrkit.common.schema import Document, Image
from detrkit.data.coco import DetectionDataset
from detrkit.data.yolo import SPLITS

_CATEGORY_KEYS = ("category", "category_id", "label", "labels", "categories")
_BOX_KEYS = ("bbox", "bboxes", "boxes")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(name: str) -> bool:
    """Whether a name may be the id of a data set on the Hub."""
    return _HUB_ID.fullmatch(name) is not None


def read_hub(name: str, split: str, *, return_masks: bool = False) -> DetectionDataset | None:
    """Reads a split of a data set on the Hub, from its Parquet files.

    Raises:
        AnnotationError: It does not exist, cannot be fetched, or has no Parquet files.
        MissingExtraError: pyarrow is not installed.
    """
    _import_pyarrow()
    from huggingface_hub import snapshot_download

    for revision in (None, "refs/convert/parquet"):  # the Hub converts data sets of other formats itself
        try:
            folder = Path(
                snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns="*.parquet")
            )
        except Exception as error:  # of huggingface_hub, httpx and the operating system
            reason = str(error).split("\n")[0]
            raise AnnotationError(f"{name}: cannot fetch this data set from the Hub: {reason}") from error
        if any(folder.rglob("*.parquet")):
            return read_folder(folder, split, return_masks=return_masks, source=name)
    raise AnnotationError(f"{name}: this data set has no Parquet files on the Hub; download and convert it")


def read_folder(
    folder: Path, split: str, *, return_masks: bool = False, source: str | None = None
) -> DetectionDataset | None:
    """Reads a split of a local data set: Parquet files, or what ``save_to_disk`` writes.

    Returns:
        The data set, or None if there is no such split.

    Raises:
        AnnotationError: The rows do not have images and objects.
        MissingExtraError: pyarrow is not installed.
    """
    files = _files_of(folder, split)
    if not files:
        return None
    del return_masks  # rows have boxes only
    rows, names = _read(files)
    return _dataset(rows, names, source or str(folder), _cache_of(files))


def _files_of(folder: Path, split: str) -> list[Path]:
    """The files of a split: in a folder of its name, or with its name; all files without any."""
    patterns = ("*.parquet", "*.arrow", "metadata.jsonl")
    found = sorted(path for pattern in patterns for path in folder.rglob(pattern))
    found = [path for path in found if not path.name.startswith("cache-")]

    def split_named(path: Path) -> str | None:
        words = set(re.split(r"[^a-z]+", path.relative_to(folder).as_posix().lower()))
        return next((name for name, aliases in SPLITS.items() if words & set(aliases)), None)

    wanted = None if split == "all" else split
    return [path for path in found if split_named(path) == wanted]


def _read(files: Sequence[Path]) -> tuple[Iterator[Mapping[str, Any]], dict[int, str]]:
    """The rows, and the class names by number if the files say them."""
    if files[0].suffix == ".jsonl":
        return _read_lines(files), {}
    pyarrow, parquet = _import_pyarrow()
    tables = []
    try:
        for path in files:
            if path.suffix == ".parquet":
                tables.append(parquet.read_table(path))
            else:
                with pyarrow.memory_map(str(path)) as stream:
                    tables.append(pyarrow.ipc.open_stream(stream).read_all())
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{files[0]}: cannot be read: {error}") from error
    metadata = (tables[0].schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(metadata).get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        features = {}
    batches = (batch for table in tables for batch in table.to_batches(max_chunksize=64))
    return (row for batch in batches for row in batch.to_pylist()), dict(enumerate(_class_names(features)))


def _read_lines(files: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    """The rows of ``metadata.jsonl`` beside images ("imagefolder")."""
    for path in files:
        for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
            try:
                row = json.loads(line)
                yield {**row, "image": {"path": str(path.parent / row["file_name"])}}
            except (ValueError, KeyError, TypeError) as error:
                raise AnnotationError(f"{path} line {number} is not an object with a file_name") from error


def _class_names(features: Any) -> list[str]:
    """The names of the first ``ClassLabel`` within the objects' features."""
    if isinstance(features, Mapping):
        if features.get("_type") == "ClassLabel" and isinstance(features.get("names"), list):
            return [str(name) for name in features["names"]]
        features = list(features.values())
    if isinstance(features, list):
        return next(filter(None, map(_class_names, features)), [])
    return []


def _dataset(
    rows: Iterator[Mapping[str, Any]], names: dict[int, str], source: str, cache: Path
) -> DetectionDataset:
    document: Document = {"images": [], "annotations": [], "categories": []}
    numbers: dict[str, int] = {}  # of classes that are given by name
    ids: set[int] = set()
    for place, row in enumerate(rows, start=1):
        where = f"{source}, row {place}"
        image_id = row.get("image_id")
        if not isinstance(image_id, int) or image_id in ids:
            image_id = place if place not in ids else max(ids) + 1
        ids.add(image_id)
        image: Image = {"id": image_id, "file_name": _stored(row.get("image"), place, cache, where)}
        if row.get("width") and row.get("height"):
            image["width"], image["height"] = row["width"], row["height"]
        document["images"].append(image)
        for category, box, crowd in _objects(row, where):
            number = numbers.setdefault(category, len(numbers)) if isinstance(category, str) else category
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": number,
                    "bbox": list(box),
                    "iscrowd": crowd,
                }
            )
    if numbers:  # in the order of the names, whichever row comes first
        names = dict(enumerate(sorted(numbers)))
        places = {numbers[name]: place for place, name in names.items()}
        for entry in document["annotations"]:
            entry["category_id"] = places.get(entry["category_id"], entry["category_id"])
    if not names:
        used = sorted({entry["category_id"] for entry in document["annotations"]})
        names = {number: str(number) for number in used}
    document["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    # The library datasets gives images upright.
    return DetectionDataset(document, cache, source, exif_orientation=True, format="Hugging Face")


def _objects(row: Mapping[str, Any], where: str) -> Iterator[tuple[Any, Sequence[float], int]]:
    """Category, box and crowd of a row's objects, whether it has a list of objects or an object of lists."""
    objects = row.get("objects", row.get("annotations"))
    if isinstance(objects, list):
        keys = objects[0].keys() if objects else ()
        objects = {key: [thing.get(key) for thing in objects] for key in keys} or {"bbox": [], "category": []}
    if not isinstance(objects, Mapping):
        raise AnnotationError(f"{where} has no objects (it has {', '.join(row)})")
    categories = next((objects[key] for key in _CATEGORY_KEYS if key in objects), None)
    boxes = next((objects[key] for key in _BOX_KEYS if key in objects), None)
    if categories is None or boxes is None or len(categories) != len(boxes):
        raise AnnotationError(
            f"{where}: each object needs a category and a bbox (it has {', '.join(objects)})"
        )
    crowds = objects.get("iscrowd") or [0] * len(boxes)
    return zip(categories, boxes, crowds)


def _stored(image: Any, place: int, cache: Path, where: str) -> str:
    """The file of a row's image, relative to the cache, which is written if it is inside the row."""
    content = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(content, bytes):
        path = image.get("path") if isinstance(image, Mapping) else None
        if isinstance(path, str) and Path(path).is_file():
            return os.path.relpath(path, cache)
        raise AnnotationError(f"{where} has no image")
    suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg"
    path = cache / f"{place:08d}{suffix}"
    if not path.exists() or path.stat().st_size != len(content):
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
    return path.name


def _cache_of(files: Sequence[Path]) -> Path:
    """The folder for the images of these files, which changes if they do."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "detrkit" / "datasets" / key
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("reading Hugging Face data sets", "datasets") from error
    return pyarrow, pyarrow.parquet
