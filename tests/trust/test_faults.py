"""Full disks, places that take no files, shares that vanish, and kills: nothing is lost or left half."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import kills
from tools.killed_jobs import jobs
from tools.prepared import Prepared

from detrkit import Detector
from tests.cli.conftest import Run, detrkit, detrkit_here, working_directory  # noqa: F401 - fixtures
from tests.closeness import assert_same_documents
from tests.conftest import make_picture, read_json

needs_mount = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk"
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def read_only(small_disk: Path) -> Path:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    return small_disk


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        make_picture(160, 120, seed=number).save(folder / f"{number}.png")
    return folder


def final_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


@needs_mount
def test_a_disk_that_gets_full_under_results_keeps_what_was_found(
    detrkit_here: Run,  # noqa: F811
    tiny_detr: Path,
    images: Path,
    small_disk: Path,
    tmp_path: Path,
) -> None:
    command = ["detect", images, "--model", tiny_detr, "-t", 0, "--json"]
    detrkit_here(*command, tmp_path / "whole.json")
    assert (tmp_path / "whole.json").stat().st_size > 2**15
    (small_disk / "ballast").write_bytes(bytes(32 * 2**10))
    done = detrkit_here(*command, small_disk / "out.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr
    assert final_files(small_disk) == ["ballast", "out.json.unfinished.jsonl"]
    lines = (small_disk / "out.json.unfinished.jsonl").read_bytes().splitlines()
    assert len(lines) > 2
    # There is room again, for the rest but not for the document beside it.
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert detrkit_here(*command, small_disk / "out.json", "--resume").returncode == 0
    assert_same_documents(small_disk / "out.json", tmp_path / "whole.json")
    assert final_files(small_disk) == ["out.json"]


@needs_mount
@pytest.mark.parametrize(
    "command",
    [
        "detect --json {}/out.json",
        "detect --save-dir {}/out",
        "evaluate --json {}/out.json",
        "segment --save-dir {}/out",
    ],
)
def test_a_place_that_takes_no_files_is_refused_before_any_work(
    detrkit_here: Run,  # noqa: F811
    tiny_detr: Path,
    tiny_panoptic: Path,
    images: Path,
    read_only: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Detector, "from_pretrained", None)  # loading the model would be work
    name, *options = command.format(read_only).split()
    what = ["--images", images, "--annotations", images / "none.json"] if name == "evaluate" else [images]
    done = detrkit_here(name, *what, "--model", tiny_panoptic if name == "segment" else tiny_detr, *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "Read-only file system" in done.stderr
    assert final_files(read_only) == []


@needs_mount
@pytest.mark.parametrize("command", ["export --to onnx {}/onnx", "train --output {}/run"])
def test_a_full_disk_under_a_model_leaves_no_half_of_it(
    detrkit_here: Run,  # noqa: F811
    tiny_detr: Path,
    annotations: Path,
    small_disk: Path,
    command: str,
) -> None:
    name, *options = command.format(small_disk).split()
    if name == "train":
        images = annotations.parent / "images"
        options += ["--train-images", images, "--train-annotations", annotations, "--epochs", 1]
        options += [
            "--val-images",
            images,
            "--val-annotations",
            annotations,
            "--device",
            "cpu",
            "--workers",
            0,
        ]
    done = detrkit_here(name, "--model", tiny_detr, *options)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]
    left = final_files(small_disk)
    assert not [file for file in left if file.endswith((".onnx", ".safetensors"))], left


def test_a_share_that_vanishes_takes_only_its_own_images(
    detrkit_here: Run,  # noqa: F811
    tiny_detr: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from detrkit.results.coco_document import CocoOutput

    away = tmp_path / "away"
    command = ["detect", images, "--model", tiny_detr, "-t", 0.1, "--json"]
    detrkit_here(*command, tmp_path / "whole.json")
    add = CocoOutput.add

    def add_and_vanish(output: CocoOutput, position: int, detections: object) -> None:
        add(output, position, detections)
        if len(output.done) == 5:
            images.rename(away)

    with monkeypatch.context() as patch:
        patch.setattr(CocoOutput, "add", add_and_vanish)
        # A glob instead of the folder: a folder that is not there when the program starts would be a mistake.
        done = detrkit_here(*command, tmp_path / "out.json", "--resume")
    assert done.returncode == 1
    assert "of 30 inputs could not be read:" in done.stderr
    found = len(read_json(tmp_path / "out.json")["images"])
    assert 5 <= found < 30
    away.rename(images)
    assert detrkit_here(*command, tmp_path / "out.json", "--resume").returncode == 0
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_an_output_folder_that_vanishes_is_named_in_one_line(
    detrkit_here: Run,  # noqa: F811
    tiny_detr: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from detrkit.results.coco_document import CocoOutput

    add = CocoOutput.add

    def vanish_and_add(output: CocoOutput, position: int, detections: object) -> None:
        if len(output.done) == 5:
            shutil.rmtree(tmp_path / "out")
        add(output, position, detections)

    monkeypatch.setattr(CocoOutput, "add", vanish_and_add)
    done = detrkit_here("detect", images, "--model", tiny_detr, "--json", tmp_path / "out" / "boxes.json")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot write" in done.stderr
    assert "No such file or directory" in done.stderr


@pytest.fixture(scope="module")
def prepared() -> Iterator[tuple[Prepared, Prepared]]:
    pair = Prepared(kills.ENVIRONMENT), Prepared(kills.ENVIRONMENT)
    yield pair
    for each in pair:
        each.close()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["detect", "segment", "convert", "evaluate", "train", "export"])
def test_a_command_that_is_disturbed_at_random_moments_loses_nothing(
    command: str, tmp_path: Path, prepared: tuple[Prepared, Prepared]
) -> None:
    job = jobs(tmp_path / "inputs")[command]
    whole = kills.Whole.of(job, tmp_path / "whole", prepared[0])
    choose = random.Random(command)
    disturber = kills.Disturber(job, whole, tmp_path, prepared, choose, print)
    assert disturber.kills(4)["killed"] == 4
    assert sum(disturber.full_disks(2).values()) >= 2
    disturber.pairs(2)
