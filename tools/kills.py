"""Commands that are killed at random moments or run out of disk space, and what they leave behind.

``python -m tools.kills --kills 100 --full-disks 50`` disturbs that many, spread over the commands, and after
each looks at the files: none may be half-written under its final name, and the inputs must be what they were.
Where a command can be resumed, it is, until it is through; the results must then be those of a run that
nothing disturbed. A full disk is a small file system in memory, which takes root; otherwise a limit on the
size of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tests.conftest import make_picture, read_json
from tests.conversion.synthetic import detr_checkpoint
from tests.tiny import FAMILIES
from tests.training.conftest import make_dataset

from detrkit.common.files import content_hash

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
        check_inputs: Raises an AssertionError if an input is not what it was.
    """

    arguments: Callable[[Path], list[Any]]
    resume: list[str] | None
    settled: Callable[[str], bool]
    compared: Callable[[dict[str, bytes]], Any] = field(default=lambda files: files)
    progress: Callable[[dict[str, bytes]], set[str]] = field(default=lambda files: set())
    check_inputs: Callable[[], None] = lambda: None


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


@dataclass
class Whole:
    """A run that nothing disturbed.

    Attributes:
        files: What it wrote, by name.
        begin: Seconds after which it began to write, or a little less.
        duration: Seconds that it took.
    """

    files: dict[str, bytes]
    begin: float
    duration: float

    @classmethod
    def of(cls, job: Job, folder: Path) -> Whole:
        folder.mkdir(parents=True)
        started = time.monotonic()
        process = _start(job, folder, resume=False)
        first_change = None
        while process.poll() is None:
            if first_change is None and any(folder.rglob("*")):
                first_change = time.monotonic() - started
            time.sleep(0.005)
        duration = time.monotonic() - started
        assert process.returncode == 0, process.communicate()
        # Before it writes anything a command cannot leave anything; most kills are to fall later.
        return cls(contents(folder), 0.8 * (first_change or duration), duration)


def campaign(
    job: Job, kills: int, whole: Whole, work: Path, choose: random.Random, say: Callable[[str], None]
) -> Counter[str]:
    """Kills a command so many times; gives how the kills fell.

    Raises:
        AssertionError: A kill left something it must not leave, or the end is not that of an undisturbed run.
    """
    wanted = whole.files
    tally: Counter[str] = Counter()
    attempt, done, out = 0, set(), work / "out 0"
    out.mkdir()
    resumed = False
    while tally["killed"] < kills:
        process = _start(job, out, resume=resumed)
        moment = choose.uniform(whole.begin, 1.02 * whole.duration)
        kind = choose.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM))
        try:
            _, messages = process.communicate(timeout=moment)
            assert process.returncode == 0, messages
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            _, messages = process.communicate(timeout=600)
            tally["killed"] += process.returncode != 0
            tally[kind.name] += process.returncode != 0
        assert "Traceback" not in messages, messages
        job.check_inputs()
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
        say(f"{tally['killed']} of {kills} killed after {moment:.1f} s: {len(found)} files")
    if kills:
        _go_through(job, out, wanted, resume=resumed)
    return tally


def full_disks(
    job: Job, rounds: int, whole: Whole, work: Path, choose: random.Random, say: Callable[[str], None]
) -> Counter[str]:
    """Runs a command so many times with less space than its files take, then again with enough.

    Raises:
        AssertionError: As for :func:`campaign`, or the command did not end with one clear line.
    """
    tally: Counter[str] = Counter()
    total = sum(-(-len(data) // _PAGE) for data in whole.files.values())
    for number in range(rounds):
        out = work / f"small {number}"
        out.mkdir()
        pages = choose.randint(1, max(1, total - 1))
        with _small_disk(out, pages * _PAGE) as (limit, enlarge):
            process = _start(job, out, resume=False, largest_file=limit)
            _, messages = process.communicate(timeout=1200)
            tally["full" if process.returncode else "enough"] += 1
            assert "Traceback" not in messages, messages
            if process.returncode:
                last = messages.strip().splitlines()[-1]
                assert process.returncode == 2, (process.returncode, messages)
                assert any(word in last for word in ("No space left", "File too large", "disk")), messages
            job.check_inputs()
            found = contents(out)
            _check_settled(job, found, whole.files)
            tally["with work done"] += bool(process.returncode and found)
            enlarge()
            resume = bool(process.returncode and job.resume is not None and any(out.iterdir()))
            _go_through(job, out, whole.files, resume=resume)
        shutil.rmtree(out)
        say(f"{number + 1} of {rounds} with {pages * _PAGE} bytes: {len(found)} files, {process.returncode}")
    return tally


_PAGE = 4096


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[tuple[int | None, Callable[[], None]]]:
    """A file system of a size in a folder: a limit on files if there can be none, and what makes it large."""
    if os.geteuid():
        yield size, lambda: None
        return
    options = f"size={size + 8 * _PAGE}"  # folders take space too
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield None, lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def _go_through(job: Job, out: Path, wanted: dict[str, bytes], *, resume: bool) -> None:
    process = _start(job, out, resume=resume)
    _, messages = process.communicate(timeout=1200)
    assert process.returncode == 0, messages
    assert job.compared(contents(out)) == job.compared(wanted)


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


def _start(job: Job, out: Path, *, resume: bool, largest_file: int | None = None) -> subprocess.Popen[str]:
    def prepare() -> None:
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    arguments = [*job.arguments(out), *((job.resume or []) if resume else [])]
    return subprocess.Popen(
        [sys.executable, "-m", "detrkit", *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="In all, shared by the commands.")
    parser.add_argument("--full-disks", type=int, default=0, help="In all, shared by the commands.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--commands", nargs="+", default=["detect", "segment", "convert", "evaluate", "train", "export"]
    )
    args = parser.parse_args()
    choose = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="detrkit-kills-") as work:
        known = jobs(Path(work))
        inputs = _hashes(Path(work))

        def check_inputs() -> None:
            assert _hashes(Path(work), inputs) == inputs, "an input has changed"

        for number, name in enumerate(args.commands):
            job, place = replace(known[name], check_inputs=check_inputs), Path(work) / name
            whole = Whole.of(job, place / "whole")
            for kind, disturb, total in (
                ("killed", campaign, args.kills),
                ("full disks", full_disks, args.full_disks),
            ):
                share = total // len(args.commands) + (number < total % len(args.commands))
                tally = disturb(
                    job,
                    share,
                    whole,
                    place,
                    choose,
                    lambda line, name=name: print(f"{name}: {line}", file=sys.stderr, flush=True),
                )
                print(f"{name}, {kind}: {dict(tally)}", flush=True)


def _hashes(work: Path, names: Iterable[Path] | None = None) -> dict[Path, str | None]:
    """The files below a folder, or these, with what is the same while they are."""
    paths = [path for path in work.rglob("*") if path.is_file()] if names is None else list(names)
    return {path: content_hash(path) if path.is_file() else None for path in paths}


if __name__ == "__main__":
    main()
