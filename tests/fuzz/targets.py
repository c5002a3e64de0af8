"""What is fuzzed: functions that take bytes of anybody's making and may only raise detrkit's own errors.

``python -m tools.fuzz TARGET`` searches with atheris for bytes that make one raise anything else. What it
found lies in ``findings`` and is run by ``test_targets.py`` ever after.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_safetensors

from detrkit.checkpoints.loading import read_model_files
from detrkit.conversion.reading import read_checkpoint
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.data.voc import read_voc
from detrkit.data.yolo import read_yolo
from detrkit.errors import DetrkitError
from detrkit.evaluation import evaluate_results
from detrkit.families import FAMILIES
from detrkit.processing.images import load_frames, load_image
from tests.fuzz.animations import animation, animation_seeds, video, video_seeds
from tests.fuzz.base import Choices, Target, branching_seeds, edited, folder, json_text
from tests.fuzz.documents import document, document_seeds, journal, settings
from tests.fuzz.services import request, request_seeds

# Images


def image_seeds() -> list[bytes]:
    pixels = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(9, 12, 3)
    rgb = Image.fromarray(pixels)
    variants = {
        "PNG": [
            rgb,
            rgb.convert("RGBA"),
            rgb.convert("P"),
            rgb.convert("L"),
            rgb.convert("1"),
        ],
        "JPEG": [rgb, rgb.convert("L"), rgb.convert("CMYK")],
        "GIF": [rgb.convert("P")],
        "BMP": [rgb, rgb.convert("P")],
        "TIFF": [rgb, rgb.convert("F"), rgb.convert("I;16"), rgb.convert("LAB")],
        "WEBP": [rgb, rgb.convert("RGBA")],
        "PPM": [rgb, rgb.convert("L")],
    }
    seeds = []
    for kind, images in variants.items():
        for image in images:
            stream = io.BytesIO()
            image.save(stream, kind)
            seeds.append(stream.getvalue())
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    exif[0x011A] = 72.5
    for kind in ("JPEG", "PNG", "WEBP"):
        stream = io.BytesIO()
        rgb.save(stream, kind, exif=exif)
        seeds.append(stream.getvalue())
    for kind in ("GIF", "TIFF", "WEBP", "PNG", "MPO"):
        stream = io.BytesIO()
        rgb.save(stream, kind, save_all=True, append_images=[rgb.rotate(90, expand=True).resize(rgb.size)])
        seeds.append(stream.getvalue())
    return seeds


def image(data: bytes) -> None:
    for picture in (load_image(data, exif_orientation=True), *load_frames(data)):
        assert picture.mode == "RGB"
        assert len(picture.tobytes()) == 3 * picture.width * picture.height


# COCO


COCO: dict[str, Any] = {
    "images": [
        {"id": 1, "file_name": "1.png", "width": 12, "height": 9},
        {"id": 2, "file_name": "2.png", "width": 12, "height": 9},
    ],
    "categories": [{"id": 3, "name": "cell"}, {"id": 5, "name": "plate", "supercategory": "x"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 5], "area": 20, "iscrowd": 0},
        {
            **{"id": 2, "image_id": 1, "category_id": 5, "bbox": [0, 0, 12, 9], "iscrowd": 1},
            "segmentation": {"counts": [50, 8, 50], "size": [9, 12]},
        },
        {
            **{"id": 3, "image_id": 2, "category_id": 3, "bbox": [2, 2, 3, 3]},
            "segmentation": [[2, 2, 5, 2, 5, 5]],
        },
    ],
}

PANOPTIC: dict[str, Any] = {
    "images": COCO["images"],
    "categories": [{"id": 3, "name": "cell", "isthing": 1}, {"id": 5, "name": "sky", "isthing": 0}],
    "annotations": [
        {
            **{"image_id": 1, "file_name": "1.png"},
            "segments_info": [{"id": 0, "category_id": 3, "iscrowd": 0, "area": 3, "bbox": [0, 0, 1, 1]}],
        },
        {"image_id": 2, "file_name": "2.png", "segments_info": [{"id": 131844, "category_id": 5}]},
    ],
}


@cache
def _images() -> Path:
    images = folder() / "images"
    images.mkdir()
    for number in (1, 2):
        pixels = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(9, 12, 3)
        Image.fromarray(pixels).save(images / f"{number}.png")
    return images


def coco(data: bytes) -> None:
    """A data set for training: read, looked through, its targets made."""
    panoptic = data[:1] >= b"\x80"
    path = folder() / "coco.json"
    path.write_bytes(json_text(PANOPTIC if panoptic else COCO, data[1:]))
    dataset = DetectionDataset.from_coco(
        _images(), path, panoptic_dir=_images() if panoptic else None, return_masks=data[:1] >= b"\x40"
    )
    _looked_through(dataset)


RESULTS: list[dict[str, Any]] = [
    {"image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 4], "score": 0.9},
    {"image_id": 2, "category_id": 3, "bbox": [2, 2, 3, 3], "score": 0.4},
]


def evaluation(data: bytes) -> None:
    """Ground truth and results of an evaluation."""
    truth, results = folder() / "truth.json", folder() / "results.json"
    half = len(data) // 2
    truth.write_bytes(json_text(COCO, data[:half]) if data[:1] >= b"\x40" else json.dumps(COCO).encode())
    results.write_bytes(json_text(RESULTS, data[half:]))
    numbers = evaluate_results(truth, results).stats
    assert all(-1 <= value <= 1 for value in numbers.values())


# YOLO and Pascal VOC

YOLO: dict[str, Any] = {"path": ".", "train": "images", "val": "list.txt", "names": ["cell", "plate"]}
ROWS: list[list[Any]] = [[0, 0.5, 0.5, 0.3, 0.4], [1, 0.1, 0.1, 0.6, 0.1, 0.6, 0.7], [1, 0.9, 0.9, 0.2, 0.2]]
VOC: dict[str, Any] = {
    "filename": "1.png",
    "size": {"width": 12, "height": 9, "depth": 3},
    "object": [
        {"name": "cell", "bndbox": {"xmin": 2, "ymin": 2, "xmax": 6, "ymax": 7}, "difficult": 0},
        {
            **{"name": "plate", "bndbox": {"xmin": 1, "ymin": 1, "xmax": 12, "ymax": 9}},
            "polygon": {"x1": 1, "y1": 1, "x2": 12, "y2": 1, "x3": 12, "y3": 9},
        },
    ],
}


@cache
def _data_folder(name: str, inside: str) -> Path:
    """A folder for a data set of a format, with two images in a folder of it."""
    shutil.copytree(_images(), folder() / name / inside)
    return folder() / name


def _looked_through(dataset: DetectionDataset) -> None:
    """What every reader's data set goes through: the check, and the targets of a training."""
    checked = check_dataset(dataset).dataset
    for index in range(min(len(checked), 4)):
        _, target = checked[index]
        assert bool(torch.as_tensor(target["boxes"]).isfinite().all())


def yolo(data: bytes) -> None:
    """A data.yaml, a list of images, or the labels of an image: bytes, or good ones that they change."""
    root, choices = _data_folder("yolo", "images"), Choices(data)
    kind, masks = choices.number(5), bool(choices.number(2))
    rest = data[choices.place :]
    settings, listed = json.dumps(YOLO).encode(), b"images/1.png\n./images/2.png\n"
    labels = _rows(ROWS)
    if kind == 0:  # no place outside of the folder, which would be searched
        settings = rest.replace(b"/", b"").replace(b"..", b"")
    elif kind == 1:
        settings = json.dumps(edited(YOLO, Choices(rest))).encode()
    elif kind == 2:
        listed = rest
    elif kind == 3:
        labels = rest
    else:
        labels = _rows(edited(ROWS, Choices(rest)))
    (root / "data.yaml").write_bytes(settings)
    (root / "list.txt").write_bytes(listed)
    (root / "labels").mkdir(exist_ok=True)
    (root / "labels" / "1.txt").write_bytes(labels)
    _looked_through(read_yolo(root, "val" if kind == 2 else "train", return_masks=masks))


def _rows(rows: Any) -> bytes:
    lines = (row if isinstance(row, list) else [row] for row in rows) if isinstance(rows, list) else [[rows]]
    text = "\n".join(" ".join(map(str, line)) for line in lines)
    return text.encode("utf-8", "surrogatepass")


def yolo_seeds() -> list[bytes]:
    raw = [f"\0\1names: {what}\ntrain: images\n" for what in ("[a]", "{0: a, x: b}", "!!int ''", "&a [*a]")]
    raw += ["\2\0images/1.png\n", "\3\1" + "0 .5 .5 .2 .2\n1 nan 0 0 0\n"]
    return [*(text.encode() for text in raw), *branching_seeds(5)]


def voc(data: bytes) -> None:
    """The XML of an image: bytes, or a good one that they change."""
    root, choices = _data_folder("voc", "JPEGImages"), Choices(data)
    raw, masks = choices.number(2), bool(choices.number(2))
    rest = data[choices.place :]
    notes = root / "Annotations"
    notes.mkdir(exist_ok=True)
    content = rest if raw else _xml(edited(VOC, Choices(rest)))
    (notes / "1.xml").write_bytes(content)
    (notes / "2.xml").write_bytes(_xml(VOC))
    _looked_through(read_voc(root / "JPEGImages", notes, return_masks=masks))


def _xml(document: Any) -> bytes:
    """An annotation file whose elements are called and filled as in a document."""
    root = ElementTree.Element("annotation")
    _fill(root, document)
    return ElementTree.tostring(root, "us-ascii")


def _fill(element: ElementTree.Element, content: Any) -> None:
    if not isinstance(content, dict):
        element.text = str(content)
        return
    for name, value in content.items():
        for each in value if isinstance(value, list) else [value]:
            _fill(ElementTree.SubElement(element, name), each)


def voc_seeds() -> list[bytes]:
    texts = (b"", b"<annotation/>", b'<?xml version="1.0" encoding="x"?><a/>')
    return [*(b"\1\1" + text for text in (*texts, _xml(VOC))), *branching_seeds(2)]


# Configurations


@cache
def _configs() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    pairs = []
    for family in FAMILIES.values():
        config = family.load(family.config)().to_dict()
        pairs.append((json.loads(json.dumps(config)), family.load(family.processor)().to_dict()))
    return pairs


def config(data: bytes) -> None:
    """A model's folder: its configuration and that of its image processor."""
    model = folder() / "model"
    model.mkdir(exist_ok=True)
    choices = Choices(data)
    settings, processing = choices.of(_configs())
    first = choices.number(2)
    rest = data[choices.place :]
    (model / "config.json").write_bytes(json_text(settings, rest) if first else json.dumps(settings).encode())
    (model / "preprocessor_config.json").write_bytes(
        json.dumps(processing).encode() if first else json_text(processing, rest)
    )
    processor = read_model_files(str(model)).load_processor()
    processor(images=[Image.new("RGB", (12, 9))], return_tensors="pt")


# Checkpoints


def checkpoint_seeds() -> list[bytes]:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    seeds = [b"\0" + save_safetensors(tensors)]
    for content, zipped in ((tensors, True), ({"model": tensors, "epoch": 3}, True), (tensors, False)):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=zipped)
        seeds.append(b"\1" + stream.getvalue())
    return seeds


def checkpoint(data: bytes) -> None:
    path = folder() / ("c.pth" if data[:1] == b"\1" else "c.safetensors")
    path.write_bytes(data[1:])
    for tensor in read_checkpoint(path).values():
        assert tensor.layout == torch.strided
        tensor.sum()


# Post-processing


def _reals(choices: Choices, *shape: int) -> torch.Tensor:
    return torch.tensor([choices.real() for _ in range(math.prod(shape))]).reshape(shape)


@cache
def _processors() -> list[Any]:
    return [family.load(family.processor)() for family in FAMILIES.values()]


def post_processing(data: bytes) -> None:
    """Outputs of a model that went wrong, sizes and thresholds of a caller who did."""
    choices = Choices(data)
    processor = choices.of(_processors())
    batch, queries, classes = choices.number(3), choices.number(5), 1 + choices.number(4)
    outputs = SimpleNamespace(
        logits=_reals(choices, batch, queries, classes),
        pred_boxes=_reals(choices, batch, queries, 4),
        pred_masks=_reals(choices, batch, queries, 2, 3),
    )
    sizes = [(choices.number(40), choices.number(40)) for _ in range(choices.number(4))]
    threshold = choices.of([0.0, 0.5, 1.0, -1.0, 2.0, math.nan, 0.85])
    target_sizes = choices.of([None, sizes, torch.tensor(sizes), [(4, 5)] * batch])
    kind = choices.number(4)
    if kind == 0 or not hasattr(processor, "post_process_panoptic_segmentation"):
        found = processor.post_process_object_detection(outputs, threshold, target_sizes)
        assert len(found) == batch
        for one in found:
            assert len(one["scores"]) == len(one["labels"]) == len(one["boxes"])
    elif kind == 1:
        found = processor.post_process_panoptic_segmentation(outputs, threshold, target_sizes=target_sizes)
        assert len(found) == batch
    elif kind == 2:
        found = processor.post_process_instance_segmentation(outputs, threshold, target_sizes=target_sizes)
        assert len(found) == batch
    else:
        processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)


TARGETS = {
    "image": Target(image, image_seeds, longest=4096),
    "coco": Target(coco),
    "yolo": Target(yolo, yolo_seeds),
    "voc": Target(voc, voc_seeds, longest=1024),
    "evaluation": Target(evaluation),
    "config": Target(config),
    "request": Target(request, request_seeds),
    "journal": Target(journal, document_seeds),
    "document": Target(document, document_seeds),
    "settings": Target(settings, document_seeds),
    "animation": Target(animation, animation_seeds, longest=2048),
    "video": Target(video, video_seeds, longest=16384),
    "checkpoint": Target(checkpoint, checkpoint_seeds, longest=8192),
    # A caller's mistake in an argument is a ValueError, as in Transformers.
    "post_processing": Target(post_processing, errors=(DetrkitError, ValueError)),
}
