"""What belongs to the process that uses detrkit is after every public call as it was before."""

from __future__ import annotations

import contextlib
import decimal
import itertools
import json
import locale
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers import PreTrainedModel

import detrkit
from detrkit import Detector
from detrkit.cli import run
from detrkit.conversion.convert import convert_checkpoint
from detrkit.data import DetectionDataset, check_dataset, read_voc, read_yolo
from detrkit.data.writing import write_dataset
from detrkit.engines.export import export_model
from detrkit.errors import DetrkitError
from detrkit.evaluation import evaluate_detector, evaluate_predictions
from detrkit.processing import load_frames, load_image
from detrkit.results import draw_boxes
from detrkit.training import TrainingRecipe, train
from tests.conftest import make_picture, read_json
from tests.conversion.synthetic import detr_checkpoint
from tests.training.conftest import make_dataset

THREADS = 8
_OF_LIBRARIES = ("torch.__trace",)  # PyTorch sets it up when it first records a graph


def process_state() -> dict[str, object]:
    """What a host may have set and relies on, by what it is called."""
    root = logging.getLogger()
    state: dict[str, object] = {
        "warnings.filters": list(warnings.filters),
        "warnings.showwarning": warnings.showwarning,
        "warnings.formatwarning": warnings.formatwarning,
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),  # noqa: PTH109 - as the process has it
        "umask": _umask(),
        "sys.path": list(sys.path),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.displayhook),
        "standard streams": (sys.stdin, sys.stdout, sys.stderr),
        "recursion limit": sys.getrecursionlimit(),
        "socket timeout": socket.getdefaulttimeout(),
        "decimal context": str(decimal.getcontext()),
        "logging of all": (root.level, tuple(root.handlers), logging.root.manager.disable),
        "random": random.getstate(),
        "numpy.random": repr(np.random.get_state()),
        "torch random": torch.get_rng_state().tolist(),
        "numpy settings": (str(np.geterr()), str(np.get_printoptions())),
        "torch dtype": torch.get_default_dtype(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch precision": torch.get_float32_matmul_precision(),
        "torch backends": (torch.backends.mkldnn.enabled, torch.backends.cudnn.benchmark),
        "PyTorch's functions": [getattr(torch.nn.init, name) for name in torch.nn.init.__all__],
        "Transformers' functions": PreTrainedModel.tie_weights,
        "Pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
    }
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name not in _OF_LIBRARIES:
            settings = (logger.level, tuple(logger.handlers), logger.propagate, logger.disabled)
            state[f"logger {name}"] = settings
    return state


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def changes(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """What is not as it was; loggers that have been made since belong to nobody else."""
    changed = [name for name in before if before[name] != after[name]]
    return [f"{name}: {before[name]!r} -> {after[name]!r}"[:600] for name in changed]


@dataclass(frozen=True)
class Place:
    """What the calls work on, and an empty folder for each."""

    detector: Detector
    segmenter: Detector
    model: Path
    annotations: Path
    pictures: list[Path]
    checkpoint: Path
    folder: Path

    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def images(self) -> Path:
        return self.annotations.parent / "images"

    def dataset(self) -> DetectionDataset:
        return DetectionDataset.from_coco(self.images, self.annotations)

    def own(self, name: str) -> Path:
        """A path that is this call's alone."""
        return self.folder / f"{name} {next(self.numbers)}"

    def written(self, to: str) -> Path:
        folder = self.own(to)
        write_dataset({"train": check_dataset(self.dataset()).dataset}, folder, to)
        return folder


def _call(place: Place) -> None:
    place.detector(place.pictures, 0.1, batch_size=2)
    place.detector(np.asarray(make_picture(60, 40)), 0.1)


def _draw(place: Place) -> None:
    image = make_picture(60, 40)
    found = place.detector(image, 0.0)
    found.draw(image)
    found.to_coco()
    draw_boxes(image, found.boxes, [str(name) for name in found.names])


def _segment(place: Place) -> None:
    segments = place.segmenter.segment(place.pictures[0], 0.3)
    segments.draw()
    segments.to_png()
    segments.to_coco()
    place.segmenter(place.pictures[0], 0.3)


def _unreadable(place: Place) -> None:
    for source in (b"no image", "nowhere.jpg", np.zeros((0, 4, 3))):
        with contextlib.suppress(DetrkitError):
            place.detector(source)


def _evaluate(place: Place) -> None:
    evaluate_detector(place.detector, place.images, _known_names(place), batch_size=2)


def _known_names(place: Place) -> Path:
    document = read_json(place.annotations)
    for category, name in zip(document["categories"], ("cat", "couch"), strict=True):
        category["name"] = name
    path = place.own("truth").with_suffix(".json")
    path.write_text(json.dumps(document))
    return path


def _evaluate_predictions(place: Place) -> None:
    evaluate_predictions(place.annotations, _results(place))


def _results(place: Place) -> Path:
    path = place.own("results").with_suffix(".json")
    path.write_text(json.dumps([{"image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9], "score": 0.5}]))
    return path


def _train(place: Place) -> None:
    train(_recipe(place, place.own("run")))


def _recipe(place: Place, output: Path) -> TrainingRecipe:
    return TrainingRecipe(
        model=str(place.model),
        train_images=place.images,
        train_annotations=place.annotations,
        val_images=place.images,
        val_annotations=place.annotations,
        output=output,
        epochs=1,
        batch_size=2,
        workers=0,
        device="cpu",
    )


def _export(place: Place) -> None:
    model = detrkit.DetrForObjectDetection.from_pretrained(place.model)
    export_model(model, place.own("onnx"), "onnx", verify=False)


def _convert(place: Place) -> None:
    convert_checkpoint(place.checkpoint, place.own("converted"), "detr-resnet-50")


def _voc(place: Place) -> None:
    folder = place.written("voc")
    read_voc(folder / "JPEGImages", folder / "Annotations")


def _pipeline(place: Place) -> None:
    detrkit.pipeline("object-detection", model=str(place.model))(str(place.pictures[0]))


def _command(place: Place) -> None:
    assert run(["detect", str(place.pictures[0]), "--model", str(place.model), "--json", "-"]) == 0


def _refused_command(place: Place) -> None:
    assert run(["detect", "nowhere.jpg", "--model", str(place.model)]) == 2


CALLS: dict[str, Callable[[Place], object]] = {
    "call": _call,
    "stream": lambda place: list(place.detector.stream(place.pictures, 0.1, batch_size=2)),
    "predict": lambda place: place.detector.predict(place.pictures[0]),
    "stream_predictions": lambda place: list(place.detector.stream_predictions(place.pictures)),
    "segment": _segment,
    "stream_segments": lambda place: list(place.segmenter.stream_segments(place.pictures, 0.3)),
    "draw": _draw,
    "unreadable images": _unreadable,
    "from_pretrained": lambda place: Detector.from_pretrained(place.model),
    "check_dataset": lambda place: check_dataset(place.dataset(), decode=True),
    "read_yolo": lambda place: read_yolo(place.written("yolo")),
    "read_voc": _voc,
    "load_image": lambda place: [load_image(path) for path in place.pictures],
    "load_frames": lambda place: list(load_frames(place.pictures[0])),
    "evaluate_detector": _evaluate,
    "evaluate_predictions": _evaluate_predictions,
    "pipeline": _pipeline,
}
# One at a time: a program has one set of random generators, which a training seeds for itself.
ALONE: dict[str, Callable[[Place], object]] = {
    "train": _train,
    "convert": _convert,
    "command": _command,
    "refused command": _refused_command,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_detr: Path, tiny_panoptic: Path) -> Place:
    folder = tmp_path_factory.mktemp("host")
    pictures = []
    for number, size in enumerate(((120, 80), (80, 120), (90, 90))):
        make_picture(*size, seed=number).save(folder / f"{number}.png")
        pictures.append(folder / f"{number}.png")
    annotations = make_dataset(folder / "data", count=2)
    checkpoint = folder / "checkpoint.pth"
    torch.save({"model": detr_checkpoint(num_labels=3, num_queries=25, learned=True)}, checkpoint)
    return Place(
        Detector.from_pretrained(tiny_detr),
        Detector.from_pretrained(tiny_panoptic),
        tiny_detr,
        annotations,
        pictures,
        checkpoint,
        folder,
    )


@pytest.fixture(autouse=True)
def settled(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the libraries imported, so that what they set once when they are is not laid at a call's door."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(place.folder)


@pytest.mark.parametrize("name", [*CALLS, *ALONE])
def test_a_call_leaves_the_process_as_it_was(place: Place, name: str) -> None:
    before = process_state()
    (CALLS | ALONE)[name](place)
    assert changes(before, process_state()) == []


@pytest.mark.slow
def test_an_export_leaves_the_process_as_it_was(place: Place) -> None:
    before = process_state()
    _export(place)
    assert changes(before, process_state()) == []


def test_calls_of_eight_threads_at_once_leave_the_process_as_it_was(place: Place) -> None:
    before = process_state()
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(call, place) for _ in range(3) for call in CALLS.values()]:
            done.result()
    assert changes(before, process_state()) == []


def test_a_process_that_uses_detrkit_keeps_its_environment(place: Place) -> None:
    """In a new process, as it is the import of libraries that would change it."""
    code = (
        "import os, sys; before = dict(os.environ)\n"
        "from detrkit.evaluation import evaluate_predictions\n"
        "evaluate_predictions(*sys.argv[1:])\n"
        "assert 'cv2' in sys.modules or 'faster_coco_eval' in sys.modules\n"
        "found = dict(os.environ)\n"
        "changed = {k for k in {*before, *found} if before.get(k) != found.get(k)}\n"
        "assert not changed, changed"
    )
    results = _results(place)
    done = subprocess.run(
        [sys.executable, "-c", code, place.annotations, results], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
