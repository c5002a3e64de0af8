"""The commands that ``tools.kills`` disturbs, on models and images so small that most take a second."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tests.conftest import make_picture, read_json
from tests.conversion.synthetic import detr_checkpoint
from tests.tiny import FAMILIES
from tests.training.conftest import make_dataset

BROKEN = 3


@dataclass(frozen=True)
class Job:
    """A command to be disturbed.

    Attributes:
        arguments: Of ``detrkit``, given the folder of its output.
        resume: What is added to continue; None where the command is started again.
        settled: Files of an unfinished run that must be as in a finished one, by their names; others may come
            and go.
        compared: Turns the files of a finished run into what must be equal.
        progress: Pieces of work that are done, from the files of an unfinished run.
        status: Exit status of an undisturbed run.
        says: What an undisturbed run must say.
    """

    arguments: Callable[[Path], list[Any]]
    resume: list[str] | None
    settled: Callable[[str], bool]
    compared: Callable[[dict[str, bytes]], Any] = field(default=lambda files: files)
    progress: Callable[[dict[str, bytes]], set[str]] = field(default=lambda files: set())
    status: int = 0
    says: tuple[str, ...] = ()


def jobs(work: Path) -> dict[str, Job]:
    """The commands, after making what they work on."""
    model, images = FAMILIES["detr"].save(work / "model"), work / "images"
    images.mkdir()
    for number in range(24):
        make_picture(80, 60, seed=number % 13).save(images / f"{number}.png")
    annotations = make_dataset(work / "data", count=12)
    truth = work / "truth.json"  # the same boxes under names that the model knows
    document = read_json(annotations)
    for category, name in zip(document["categories"], ("cat", "couch"), strict=True):
        category["name"] = name
    truth.write_text(json.dumps(document))
    checkpoint = work / "checkpoint.pth"
    torch.save({"model": detr_checkpoint(num_labels=3, num_queries=25, learned=True)}, checkpoint)
    panoptic = FAMILIES["detr"].save(work / "panoptic", masks=True)
    return {
        "detect": Job(
            lambda out: [
                *("detect", images, "--model", model, "-t", 0.1),
                *("--json", out / "boxes.json", "--save-dir", out / "drawn"),
            ],
            ["--resume"],
            settled=lambda name: name.endswith(".png") or name == "boxes.json",
            progress=_images_done,
        ),
        "segment": Job(
            lambda out: ["segment", images, "--model", panoptic, "-t", 0.3, "--save-dir", out / "segments"],
            ["--resume"],
            settled=lambda name: name.endswith(".png"),
        ),
        "convert": Job(
            lambda out: ["convert", checkpoint, out / "converted", "--model", "detr-resnet-50"],
            None,
            settled=lambda name: True,
        ),
        "evaluate": Job(
            lambda out: [
                *("evaluate", "--model", model, "--images", annotations.parent / "images"),
                *("--annotations", truth, "--json", out / "numbers.json", "--save-dir", out / "curves"),
            ],
            None,
            settled=lambda name: name.endswith((".png", ".csv", "results.json")),
            compared=_without_time,
        ),
        "train": _training(work, annotations),
        "train on broken images": _training_on_broken_images(work),
        "export": Job(
            lambda out: ["export", "--model", model, "--to", "onnx", out / "exported"],
            None,
            settled=lambda name: True,
        ),
    }


def _training(work: Path, annotations: Path, status: int = 0, says: tuple[str, ...] = ()) -> Job:
    data = ["--train-images", annotations.parent / "images", "--train-annotations", annotations]
    data += ["--val-images", annotations.parent / "images", "--val-annotations", annotations]
    model = work / "deformable"
    if not model.exists():
        FAMILIES["deformable_detr_two_stage"].save(model)
    return Job(
        lambda out: [
            *("train", "--model", model, "--output", out / "run", *data, "--device", "cpu", "--epochs", 3),
            *("--batch-size", 4, "--log-every", 1, "--save-every", 2, "--workers", 0),
        ],
        ["--resume"],
        settled=lambda name: name.endswith((".png", "run/model.safetensors")),
        compared=lambda files: {
            name: data for name, data in files.items() if name in ("run/metrics.csv", "run/model.safetensors")
        },
        status=status,
        says=says,
    )


def _training_on_broken_images(work: Path) -> Job:
    """A training whose images end early, which shows only when they are decoded."""
    annotations = make_dataset(work / "broken data", count=12)
    broken = [annotations.parent / "images" / f"{number}.png" for number in range(2, 2 + BROKEN)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-200])
    return _training(work, annotations, says=tuple(path.name for path in broken))


def _images_done(files: dict[str, bytes]) -> set[str]:
    journal = files.get("boxes.json.unfinished.jsonl")
    if journal is None:  # killed when all was done, or before anything was
        images = json.loads(files["boxes.json"])["images"] if "boxes.json" in files else []
    else:
        lines = [line for line in journal.splitlines(keepends=True)[1:] if line.endswith(b"\n")]
        images = [json.loads(line)["entry"]["image"] for line in lines]
        assert len(images) == len({image["id"] for image in images}), "something was done twice"
    return {image["file_name"] for image in images}


def _without_time(files: dict[str, bytes]) -> Any:
    numbers = json.loads(files["numbers.json"])
    del numbers["seconds_per_image"]
    return {**files, "numbers.json": numbers}


def check_settled(job: Job, found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Raises an AssertionError if a file of an unfinished run is not whole, or not as it must be."""
    for name, data in found.items():
        if not job.settled(name):
            continue
        if name.endswith(".png"):
            with Image.open(io.BytesIO(data)) as picture:
                picture.load()
        elif name == "boxes.json":  # an interrupt leaves what was found until then
            whole, part = json.loads(wanted[name]), json.loads(data)
            pieces = {image["id"]: image for image in whole["images"]}
            assert all(pieces[image["id"]] == image for image in part["images"])
            boxes = Counter(_unnumbered(entry) for entry in whole["annotations"])
            assert not Counter(_unnumbered(entry) for entry in part["annotations"]) - boxes
        elif not name.endswith("run/model.safetensors"):
            assert data == wanted[name], f"{name} is not what an undisturbed run leaves"


def _unnumbered(entry: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in entry.items() if key != "id"})
