"""Commands that are killed at random moments, and what they leave behind.

``python -m tools.kills --kills 100`` kills that many, spread over the commands, and after each looks at
the files: none may lie half-written under its final name. Where a command can go on, it does, until it is
through; the results must then be those of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
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

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def contents(folder: Path) -> dict[str, bytes]:
    """The files under final names; what begins with a dot was being written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if "/." not in f"/{name}"}


@dataclass
class Job:
    """A command to be killed.

    Attributes:
        arguments: Of ``detrkit``, given the folder of its output.
        resume: What is added to go on; None where the command is begun anew.
        settled: Files of an unfinished run that must be as in a finished one, by their names; others may come
            and go.
        compared: Turns the files of a finished run into what must be equal.
        progress: Pieces of work that are done, from the files of an unfinished run.
    """

    arguments: Callable[[Path], list[Any]]
    resume: list[str] | None
    settled: Callable[[str], bool]
    compared: Callable[[dict[str, bytes]], Any] = field(default=lambda files: files)
    progress: Callable[[dict[str, bytes]], set[str]] = field(default=lambda files: set())


def jobs(work: Path) -> dict[str, Job]:
    """The commands and what they work on."""
    model, images = FAMILIES["detr"].save(work / "model"), work / "images"
    images.mkdir()
    for number in range(250):
        make_picture(160, 120, seed=number % 13).save(images / f"{number}.png")
    annotations = make_dataset(work / "data", count=40)
    truth = work / "truth.json"  # the same boxes under names that the model knows
    document = read_json(annotations)
    for category, name in zip(document["categories"], ("cat", "couch"), strict=True):
        category["name"] = name
    truth.write_text(json.dumps(document))
    checkpoint = work / "checkpoint.pth"
    torch.save({"model": detr_checkpoint(num_labels=3, num_queries=25, learned=True)}, checkpoint)
    data = ["--train-images", annotations.parent / "images", "--train-annotations", annotations]
    data += ["--val-images", annotations.parent / "images", "--val-annotations", annotations]
    panoptic = FAMILIES["detr"].save(work / "panoptic", masks=True)
    deformable = FAMILIES["deformable_detr_two_stage"].save(work / "deformable")
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
        "train": Job(
            lambda out: [
                *("train", "--model", deformable, "--output", out / "run", *data, "--device", "cpu"),
                *("--epochs", 2, "--batch-size", 4, "--log-every", 1, "--save-every", 3, "--workers", 0),
            ],
            ["--resume"],
            settled=lambda name: name.endswith((".png", "run/model.safetensors")),
            compared=lambda files: {
                name: data
                for name, data in files.items()
                if name in ("run/metrics.csv", "run/model.safetensors")
            },
        ),
        "export": Job(
            lambda out: ["export", "--model", model, "--to", "onnx", out / "exported"],
            None,
            settled=lambda name: True,
        ),
    }


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


def campaign(
    job: Job, kills: int, work: Path, choose: random.Random, say: Callable[[str], None]
) -> Counter[str]:
    """Kills a command so many times; gives how the kills fell.

    Raises:
        AssertionError: A kill left something it must not leave, or the end is not that of an undisturbed run.
    """
    whole = work / "whole"
    whole.mkdir(parents=True)
    started = time.monotonic()
    process = _start(job, whole, resume=False)
    first_change = None
    while process.poll() is None:
        if first_change is None and any(whole.rglob("*")):
            first_change = time.monotonic() - started
        time.sleep(0.005)
    duration = time.monotonic() - started
    assert process.returncode == 0, process.communicate()
    wanted = contents(whole)
    # Before it writes anything a command cannot leave anything; most kills are to fall later.
    begin = 0.8 * (first_change or duration)
    tally: Counter[str] = Counter()
    attempt, done, out = 0, set(), work / "out 0"
    out.mkdir()
    resumed = False
    while tally["killed"] < kills:
        process = _start(job, out, resume=resumed)
        moment = choose.uniform(begin, 1.02 * duration)
        kind = choose.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        try:
            _, messages = process.communicate(timeout=moment)
            assert process.returncode == 0, messages
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            _, messages = process.communicate(timeout=120)
            tally["killed"] += process.returncode != 0
            tally[kind.name] += process.returncode != 0
        assert "Traceback" not in messages, messages
        found = contents(out)
        if process.returncode == 0:
            assert job.compared(found) == job.compared(wanted)
            tally["finished"] += 1
            attempt += 1
            shutil.rmtree(out)
            out, done, resumed = work / f"out {attempt}", set(), False
            out.mkdir()
            continue
        _check_settled(job, found, wanted)
        before, done = done, job.progress(found)
        assert done >= before, "finished work was lost"
        tally["with work done"] += bool(done) or bool(found)
        if job.resume is None and choose.random() < 0.5:
            shutil.rmtree(out)
            out.mkdir()
        resumed = job.resume is not None and any(out.iterdir())
        say(f"{tally['killed']} of {kills} killed after {moment:.1f} of {duration:.1f} s: {len(found)} files")
    process = _start(job, out, resume=resumed)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 0, messages
    assert job.compared(contents(out)) == job.compared(wanted)
    return tally


def _check_settled(job: Job, found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
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
        else:
            assert data == wanted[name], f"{name} is not what an undisturbed run leaves"


def _unnumbered(entry: dict[str, Any]) -> str:
    return json.dumps({key: value for key, value in entry.items() if key != "id"})


def _start(job: Job, out: Path, *, resume: bool) -> subprocess.Popen[str]:
    arguments = [*job.arguments(out), *((job.resume or []) if resume else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "detrkit", *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(k, signal.SIG_DFL) for k in (signal.SIGINT, signal.SIGTERM)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="In all, shared by the commands.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--commands", nargs="+", default=["detect", "segment", "convert", "evaluate", "train", "export"]
    )
    args = parser.parse_args()
    choose = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="detrkit-kills-") as work:
        known = jobs(Path(work))
        for number, name in enumerate(args.commands):
            share = args.kills // len(args.commands) + (number < args.kills % len(args.commands))
            tally = campaign(
                known[name],
                share,
                Path(work) / name,
                choose,
                lambda line, name=name: print(f"{name}: {line}", file=sys.stderr, flush=True),
            )
            print(f"{name}: {dict(tally)}", flush=True)


if __name__ == "__main__":
    main()
