"""``detrkit detect --json FILE --resume``: what a run that ended early leaves, and how another goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from PIL.Image import Image

from tests.cli.conftest import Run, start_detrkit
from tests.closeness import assert_same_documents
from tests.conftest import make_picture, read_json, wait_until

COMMAND = ["detect", "-t", "0.1"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        make_picture(120, 80, seed=number).save(folder / f"{number}.png")
    return folder


def journal_of(json_file: Path) -> Path:
    return json_file.with_name(f"{json_file.name}.unfinished.jsonl")


def unfinished(detrkit_here: Run, command: list[object], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves what a run leaves that was killed after two images."""
    from detrkit.results.coco_document import CocoOutput

    add = CocoOutput.add

    def add_two(output: CocoOutput, position: int, detections: object) -> None:
        if len(output.done) == 2:
            raise KeyboardInterrupt
        add(output, position, detections)

    with monkeypatch.context() as patch:
        patch.setattr(CocoOutput, "add", add_two)
        assert detrkit_here(*command, "--json", out).returncode == 130


def watch_reading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are decoded from now on."""
    from detrkit.inference import prepared

    sources: list[str] = []
    read = prepared.read_image

    def watched(source: object, **options: object) -> Image:
        if isinstance(source, str):  # the detector reads the image again, which is not a file's any more
            sources.append(source)
        return read(source, **options)

    monkeypatch.setattr(prepared, "read_image", watched)
    return sources


def test_a_run_goes_on_where_another_ended(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*COMMAND, images, "--model", tiny_detr]
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert detrkit_here(*command, "--json", whole).returncode == 0
    assert not journal_of(whole).exists()
    unfinished(detrkit_here, command, parts, monkeypatch)
    assert len(read_json(parts)["images"]) == 2
    assert len(journal_of(parts).read_bytes().splitlines()) == 3
    with journal_of(parts).open("ab") as file:
        file.write(b'{"image": {"id": 2')  # the line that a kill cuts off
    read = watch_reading(monkeypatch)
    done = detrkit_here(*command, "--json", parts, "--resume")
    assert done.returncode == 0, done.stderr
    assert [Path(source).name for source in read] == ["2.png", "3.png", "4.png", "5.png"]
    assert_same_documents(parts, whole)
    assert not journal_of(parts).exists()
    assert "6 images, " in done.stderr


def test_a_run_ends_well_that_was_killed_before_its_document_was_written(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detrkit.results.coco_document import CocoOutput

    command = [*COMMAND, images, "--model", tiny_detr, "--json", tmp_path / "out.json"]
    with monkeypatch.context() as patch:
        patch.setattr(CocoOutput, "close", lambda output: None)
        detrkit_here(*command)
    wanted = (tmp_path / "out.json").read_bytes()
    (tmp_path / "out.json").unlink()
    assert detrkit_here(*command, "--resume").returncode == 0
    assert (tmp_path / "out.json").read_bytes() == wanted


def test_images_out_of_reach_do_not_cost_their_results(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    command = [*COMMAND, images, "--model", tiny_detr]
    detrkit_here(*command, "--json", whole)
    unfinished(detrkit_here, command, parts, monkeypatch)
    journal = journal_of(parts).read_bytes()
    images.rename(tmp_path / "away")  # such as a share that is not mounted
    assert detrkit_here(*command, "--json", parts, "--resume").returncode == 2
    assert journal_of(parts).read_bytes() == journal
    (tmp_path / "away").rename(images)
    (images / "0.png").rename(tmp_path / "0.png")
    done = detrkit_here(*command, "--json", parts, "--resume")
    assert "Left out: the results of 1 image of the earlier run" in done.stderr
    assert journal_of(parts).exists()
    (tmp_path / "0.png").rename(images / "0.png")
    assert detrkit_here(*command, "--json", parts, "--resume").returncode == 0
    assert_same_documents(parts, whole)


def test_images_that_come_between_do_not_cost_the_results_of_the_others(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "named"
    images.mkdir()
    for name in ("b", "d", "f"):
        make_picture(120, 80, seed=ord(name)).save(images / f"{name}.png")
    command = [*COMMAND, images, "--model", tiny_detr]
    unfinished(detrkit_here, command, tmp_path / "parts.json", monkeypatch)
    make_picture(120, 80, seed=5).save(images / "c.png")
    detrkit_here(*command, "--json", tmp_path / "whole.json")
    read = watch_reading(monkeypatch)
    assert detrkit_here(*command, "--json", tmp_path / "parts.json", "--resume").returncode == 0
    assert [Path(source).name for source in read] == ["c.png", "f.png"]
    assert_same_documents(tmp_path / "parts.json", tmp_path / "whole.json")


def test_a_finished_document_is_left_alone(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path
) -> None:
    command = [*COMMAND, images, "--model", tiny_detr, "--json", tmp_path / "out.json"]
    detrkit_here(*command)
    (tmp_path / "whole.json").write_bytes((tmp_path / "out.json").read_bytes())
    before = (tmp_path / "out.json").stat()
    done = detrkit_here(*command, "--resume")
    after = (tmp_path / "out.json").stat()
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "already contains all 6 images" in done.stderr
    # Neither another file nor other content; that it was read is no change.
    for kept in ("st_ino", "st_size", "st_mtime_ns"):
        assert getattr(after, kept) == getattr(before, kept)
    (tmp_path / "out.json").write_text("[]")
    done = detrkit_here(*command, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "which detrkit did not write" in done.stderr
    content = (tmp_path / "whole.json").read_text().replace('"bbox": [', '"bbox": [1, ')
    (tmp_path / "out.json").write_text(content)
    done = detrkit_here(*command, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not a document of detrkit detect" in done.stderr


def test_other_settings_cannot_be_resumed(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    unfinished(detrkit_here, [*COMMAND, images, "--model", tiny_detr], out, monkeypatch)
    before = journal_of(out).read_bytes()
    done = detrkit_here("detect", images, "--model", tiny_detr, "-t", 0.4, "--json", out, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "made with threshold 0.1, not 0.4" in done.stderr
    assert journal_of(out).read_bytes() == before


def test_images_that_failed_are_listed_at_the_end_and_tried_again(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path
) -> None:
    for number in range(6, 25):
        make_picture(40, 30, seed=number).save(images / f"{number}.png")
    command = [*COMMAND, images, "--model", tiny_detr, "--json"]
    detrkit_here(*command, tmp_path / "whole.json")
    lost = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(lost[:60])
    done = detrkit_here(*command, tmp_path / "out.json", "--resume")
    assert done.returncode == 1
    *_, heading, line = done.stderr.splitlines()
    assert heading == "1 of 25 inputs could not be read:"
    assert str(images / "3.png") in line
    assert len(read_json(tmp_path / "out.json")["images"]) == 24
    (images / "3.png").write_bytes(lost)
    assert detrkit_here(*command, tmp_path / "out.json", "--resume").returncode == 0
    assert_same_documents(tmp_path / "out.json", tmp_path / "whole.json")


def test_a_picture_that_is_missing_is_drawn_again(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*COMMAND, images, "--model", tiny_detr, "--save-dir", tmp_path / "drawn"]
    out = tmp_path / "out.json"
    unfinished(detrkit_here, command, out, monkeypatch)
    (tmp_path / "drawn" / "0.png").unlink()
    assert detrkit_here(*command, "--json", out, "--resume").returncode == 0
    assert len(list((tmp_path / "drawn").iterdir())) == 6
    assert [image["file_name"] for image in read_json(out)["images"]] == [f"{i}.png" for i in range(6)]


@pytest.mark.parametrize("target", [[], ["--json", "-"], ["--json", os.devnull]])
def test_resuming_needs_a_file(detrkit_here: Run, tiny_detr: Path, images: Path, target: list[str]) -> None:
    done = detrkit_here("detect", images, "--model", tiny_detr, "--resume", *target)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--resume" in done.stderr


def test_a_run_without_any_readable_image_leaves_nothing(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    done = detrkit_here("detect", tmp_path / "a.png", "--model", tiny_detr, "--json", tmp_path / "out.json")
    assert done.returncode == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "working-directory"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("kind", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_a_run_that_was_stopped_is_finished_as_if_it_had_not_been(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(60):
        make_picture(120, 80, seed=number % 7).save(images / f"{number}.png")
    command = [*COMMAND, images, "--model", tiny_detr, "--json"]
    whole, out = tmp_path / "whole.json", tmp_path / "out.json"
    assert detrkit_here(*command, whole).returncode == 0
    process = start_detrkit(*command, out)
    journal = journal_of(out)
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 5)
    process.send_signal(kind)
    _, messages = process.communicate(timeout=300)
    assert "Traceback" not in messages
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "Continue with --resume" in messages
        assert len(json.loads(out.read_bytes())["images"]) < 60
    else:
        assert not out.exists()
    assert detrkit_here(*command, out, "--resume").returncode == 0
    assert_same_documents(out, whole)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"images", "whole.json", "out.json", "working-directory"}
