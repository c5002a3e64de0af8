"""What the pages take for granted: pictures, data sets, and checkpoints on a Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import id_to_rgb
from detrkit.checkpoints.registry import REGISTRY, resolve_model
from detrkit.errors import CheckpointError
from tests.clips import panned, write_clip
from tests.conftest import make_picture
from tests.docs.blocks import ROOT
from tests.docs.warm_process import install_program
from tests.hub.server import HubServer, folder_files
from tests.training.conftest import make_dataset

# Names and ids of the stand-ins' classes, see tests/conftest.py.
CLASSES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "remote"}, {"id": 3, "name": "couch"}]


@pytest.fixture(scope="session")
def hub(
    tiny_detr: Path,
    tiny_conditional_detr: Path,
    tiny_deformable_detr: Path,
    tiny_table_transformer: Path,
    tiny_panoptic: Path,
) -> Iterator[HubServer]:
    """A Hub on the loopback address with a tiny model of random weights for every released checkpoint."""
    stand_ins = {
        "detr": tiny_detr,
        "conditional_detr": tiny_conditional_detr,
        "deformable_detr": tiny_deformable_detr,
        "table-transformer": tiny_table_transformer,
    }
    repositories = {}
    for entry in REGISTRY.values():
        if entry.hub_id is not None:
            folder = tiny_panoptic if entry.task == "panoptic" else stand_ins[entry.family]
            repositories[entry.hub_id] = {"main": folder_files(folder)}
    with HubServer(repositories) as server:
        yield server


@pytest.fixture(scope="session")
def environment(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of the blocks: that Hub, and ``detrkit`` as a program that starts at once."""
    folder = tmp_path_factory.mktemp("programs")
    address = str(folder / "warm")
    environment = hub.environment(tmp_path_factory.mktemp("hub-cache"))
    environment["PATH"] = f"{folder}:{Path(sys.executable).parent}:{environment['PATH']}"
    environment["WARM_PROCESS"] = address
    install_program(folder, address)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.docs.warm_process", address], env=environment, cwd=ROOT
    ) as warm:
        deadline = time.monotonic() + 120
        while not Path(address).exists() and warm.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        try:
            yield environment
        finally:
            warm.kill()


@pytest.fixture(scope="session")
def _material(tmp_path_factory: pytest.TempPathFactory, tiny_detr: Path) -> Path:
    """A folder with all that the pages name."""
    folder = tmp_path_factory.mktemp("material")
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copyfile(ROOT / "examples" / "000000269314.jpg", folder / "photo.jpg")
    for name in ("holiday/1.jpg", "shots/1.png", "shots/2.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        make_picture(96, 64, seed=len(name)).save(folder / name)
    frames = panned(make_picture(160, 64), (96, 64), frames=4)
    frames[0].save(folder / "cells.gif", save_all=True, append_images=frames[1:], duration=100)
    write_clip(folder / "clip.mp4", frames, sound=True)
    for split in ("train", "val"):
        annotations = make_dataset(folder / "made" / split, count=4)
        (folder / "cells").mkdir(exist_ok=True)
        shutil.copytree(annotations.parent / "images", folder / "cells" / split)
        shutil.copyfile(annotations, folder / "cells" / f"{split}.json")
        write_yolo(annotations, folder / "cells-yolo", split)
        write_exports(annotations, folder, split)
    write_coco(folder)
    try:
        resolve_model("blood-cells")
    except CheckpointError:  # not yet in the package
        shutil.copytree(tiny_detr, folder / "blood-cells")
    return folder


@pytest.fixture
def folder(_material: Path, tmp_path: Path) -> Path:
    """A fresh copy of that folder for one page."""
    return Path(shutil.copytree(_material, tmp_path / "page"))


def write_yolo(annotations: Path, folder: Path, split: str) -> None:
    """The same data set as YOLO has it: class, centre and size as parts of the picture's sides."""
    document = json.loads(annotations.read_text())
    classes = {category["id"]: i for i, category in enumerate(document["categories"])}
    (folder / "labels" / split).mkdir(parents=True)
    shutil.copytree(annotations.parent / "images", folder / "images" / split)
    for image in document["images"]:
        lines = []
        for entry in document["annotations"]:
            if entry["image_id"] == image["id"]:
                x, y, w, h = entry["bbox"]
                parts = (x + w / 2) / image["width"], (y + h / 2) / image["height"]
                sizes = w / image["width"], h / image["height"]
                lines.append(" ".join(map(str, (classes[entry["category_id"]], *parts, *sizes))))
        (folder / "labels" / split / f"{Path(image['file_name']).stem}.txt").write_text(
            "\n".join(lines) + "\n"
        )
    names = [category["name"] for category in document["categories"]]
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {json.dumps(names)}\n")


def write_exports(annotations: Path, folder: Path, split: str) -> None:
    """The same data set as Roboflow exports it, and its training images as Label Studio and CVAT do."""
    exports = {f"roboflow/{'valid' if split == 'val' else split}": ("", "_annotations.coco.json", "")}
    if split == "train":
        exports["label-studio"] = ("images", "result.json", "images\\")
        exports["cvat"] = ("images/default", "annotations/instances_default.json", "")
    for name, (images, file, prefix) in exports.items():
        document = json.loads(annotations.read_text())
        for image in document["images"]:
            image["file_name"] = prefix + image["file_name"]
        shutil.copytree(annotations.parent / "images", folder / name / images)
        (folder / name / file).parent.mkdir(exist_ok=True)
        (folder / name / file).write_text(json.dumps(document))


def write_coco(folder: Path) -> None:
    """``val2017`` of three pictures with boxes and panoptic annotations: an object before a couch."""
    annotations = folder / "annotations"
    png = annotations / "panoptic_val2017"
    png.mkdir(parents=True)
    (folder / "val2017").mkdir()
    instances: dict = {"images": [], "annotations": [], "categories": CLASSES}
    things = [{**category, "isthing": int(category["name"] != "couch")} for category in CLASSES]
    panoptic: dict = {"images": [], "annotations": [], "categories": things}
    width, height = 96, 64
    for image_id in (1, 2, 3):
        name = f"{image_id:012d}"
        make_picture(width, height, seed=image_id).save(folder / "val2017" / f"{name}.jpg")
        row = {"id": image_id, "file_name": f"{name}.jpg", "width": width, "height": height}
        x, y, w, h = 8 * image_id, 10, 30, 20
        ids = np.full((height, width), 2, dtype=np.int32)
        ids[y : y + h, x : x + w] = 1
        Image.fromarray(id_to_rgb(ids)).save(png / f"{name}.png")
        thing = {"category_id": 1 + image_id % 2, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
        stuff = {
            "category_id": 3,
            "bbox": [0, 0, width, height],
            "area": width * height - w * h,
            "iscrowd": 0,
        }
        instances["images"].append(row)
        instances["annotations"].append({"id": image_id, "image_id": image_id, **thing})
        panoptic["images"].append(row)
        panoptic["annotations"].append(
            {
                "image_id": image_id,
                "file_name": f"{name}.png",
                "segments_info": [{"id": 1, **thing}, {"id": 2, **stuff}],
            }
        )
    (annotations / "instances_val2017.json").write_text(json.dumps(instances))
    (annotations / "panoptic_val2017.json").write_text(json.dumps(panoptic))
