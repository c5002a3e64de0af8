"""What commands may write over: a test for each row of the table in docs/files.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run, start_detrkit
from tests.conftest import make_picture, read_json

DOCS = Path(__file__).parents[2] / "docs" / "files.md"

EVALUATE = ("evaluate", "--annotations", "val.json", "--predictions", "found.json")
TRAIN = (
    *("train", "--model", "{model}", "--train-images", "shots", "--train-annotations", "val.json"),
    *("--val-images", "shots", "--val-annotations", "val.json", "--output", "out"),
)
CONVERT = ("convert", "c.pth", "out", "--model", "detr-resnet-50")
EXPLAIN = ("explain", "shots/a.jpg", "--model", "{model}", "--save-dir", "out")
EXPORT = ("export", "out", "--model", "{model}", "--to", "onnx")
DETECT = ("detect", "shots/a.jpg", "--model", "{model}")
CALIBRATE = (
    *("calibrate", "--model", "{model}", "--images", "shots", "--annotations", "val.json"),
    *("--output", "out"),
)
COPY = ("val.json", "out", "--images", "shots", "--to", "coco")
SEGMENT = ("segment", "shots/a.jpg", "--model", "{model}", "--save-dir", "out")

ROWS = [
    ((*DETECT, "--json", "out/found.json"), "found.json"),
    ((*DETECT, "--json", "out/found.json"), "found.json.unfinished.jsonl"),
    ((*DETECT, "--json", "out/found.jsonl"), "found.jsonl"),
    ((*DETECT, "--csv", "out/found.csv"), "found.csv"),
    ((*DETECT, "--csv", "out/found.csv"), "found.csv.unfinished.jsonl"),
    ((*DETECT, "--counts", "out/counts.csv"), "counts.csv"),
    ((*DETECT, "--save-dir", "out"), "a.jpg"),
    (("detect", "shots/b.webp", "--model", "{model}", "--save-dir", "out"), "b.png"),
    (("detect", "c.mp4", "--model", "{model}", "--save-dir", "out"), "c.mp4"),
    (SEGMENT, "panoptic.json"),
    (SEGMENT, "panoptic/a.png"),
    (SEGMENT, "pictures/a.jpg"),
    (SEGMENT, "unfinished.jsonl"),
    ((*EVALUATE, "--json", "out/numbers.json"), "numbers.json"),
    *(
        ((*EVALUATE, "--save-dir", "out"), name)
        for name in ("boxes_per_class.csv", "boxes_confusion_matrix.png", "masks_results.json")
    ),
    ((*EVALUATE, "--panoptic-dir", "shots", "--save-dir", "out"), "panoptic_per_class.csv"),
    *(((*EXPLAIN, "--queries", "shots"), f"a_{name}.png") for name in ("decoder", "encoder", "queries")),
    *(
        (TRAIN, name)
        for name in ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
    ),
    *((TRAIN, name) for name in ("recipe.json", "metrics.csv", "split.json")),
    *((TRAIN, name) for name in ("loss.png", "ap.png", "predictions.png")),
    *((CONVERT, name) for name in ("README.md", "config.json", "model.safetensors")),
    (CONVERT, "preprocessor_config.json"),
    (TRAIN, "detection_config.json"),
    *((CALIBRATE, name) for name in ("detection_config.json", "operating_points.csv", "calibration.png")),
    (CALIBRATE, "model.safetensors"),
    *((EXPORT, name) for name in ("config.json", "engine.json", "model.onnx")),
    (("data", "check", "val.json", "--images", "shots", "--sheet", "out/sheet.jpg"), "sheet.jpg"),
    (("benchmark", "--model", "{model}", "--csv", "out/speed.csv"), "speed.csv"),
]


@pytest.fixture
def here(working_directory: Path) -> Path:
    """The working directory with two images and what the commands are given as files."""
    (working_directory / "shots").mkdir()
    make_picture(60, 40).save(working_directory / "shots" / "a.jpg")
    make_picture(60, 40).save(working_directory / "shots" / "b.webp")
    for name in ("val.json", "found.json", "c.pth", "c.mp4"):
        (working_directory / name).write_text("{}")
    return working_directory


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("command", "file"), ROWS)
def test_a_file_that_detrkit_did_not_write_stays(
    detrkit_here: Run, tiny_detr: Path, here: Path, command: tuple[str, ...], file: str
) -> None:
    path = here / "out" / file
    path.parent.mkdir(parents=True)
    if path.suffix in (".png", ".jpg"):
        make_picture(20, 10).save(path)
    else:
        path.write_text('{"not": "of detrkit"}\n')
    before = files_of(here)
    done = detrkit_here(*(argument.format(model=tiny_detr) for argument in command))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"{file}, which detrkit did not write" in done.stderr
    assert "--overwrite" in done.stderr
    assert files_of(here) == before


@pytest.mark.parametrize(
    ("command", "victim"),
    [
        ((*DETECT, "--json", "shots/a.jpg"), "shots/a.jpg"),
        ((*DETECT, "--csv", "shots/a.jpg"), "shots/a.jpg"),
        ((*DETECT, "--json", "out/found.json", "--counts", "shots/a.jpg"), "shots/a.jpg"),
        ((*DETECT, "--save-dir", "shots"), "shots/a.jpg"),
        (("detect", "shots", "--model", "{model}", "--save-dir", "shots"), "shots/a.jpg"),
        ((*DETECT, "--json", "{model}/config.json"), "{model}/config.json"),
        ((*EVALUATE, "--json", "val.json"), "val.json"),
        ((*EVALUATE, "--json", "found.json"), "found.json"),
        ((*EVALUATE, "--panoptic-dir", "shots", "--json", "shots/a.jpg"), "shots/a.jpg"),
        (("export", "{model}", "--model", "{model}", "--to", "onnx"), "{model}/config.json"),
        (("benchmark", "--model", "{model}", "--csv", "{model}/config.json"), "{model}/config.json"),
    ],
)
def test_an_input_stays_even_if_overwriting_is_allowed(
    detrkit_here: Run, tiny_detr: Path, here: Path, command: tuple[str, ...], victim: str
) -> None:
    before = files_of(here), files_of(tiny_detr)
    allowed = () if command[0] == "benchmark" else ("--overwrite",)
    done = detrkit_here(*(argument.format(model=tiny_detr) for argument in (*command, *allowed)))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"overwrite the input {victim.format(model=tiny_detr)}" in done.stderr
    assert (files_of(here), files_of(tiny_detr)) == before


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("data", "split", *COPY), "out is not an empty folder; choose another one"),
        (("data", "convert", *COPY), "out is not an empty folder; choose another one"),
        ((*CALIBRATE, "--max-ms", "1000"), "out is not empty; choose a folder that does not exist yet"),
    ],
)
def test_a_folder_that_is_to_be_new_and_is_not_stays(
    detrkit_here: Run, tiny_detr: Path, here: Path, command: tuple[str, ...], reason: str
) -> None:
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("somebody's")
    before = files_of(here)
    done = detrkit_here(*(argument.format(model=tiny_detr) for argument in command))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert reason in done.stderr
    assert files_of(here) == before


def rows_of_the_page() -> list[tuple[str, list[str]]]:
    """Command and files of each row of the page; a line without a command belongs to the one above."""
    rows: list[tuple[str, list[str]]] = []
    for line in DOCS.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or set(cells[0]) == {"-"} or cells[0].startswith("command"):
            continue
        command = cells[0].partition(" and ")[0].strip("`") or rows[-1][0]
        rows += [(each.strip(" `"), re.findall(r"`([^`]+)`", cells[1])) for each in command.split("`, `")]
    return rows


@pytest.mark.parametrize(("command", "files"), rows_of_the_page())
def test_each_row_of_the_page_has_a_test(command: str, files: list[str]) -> None:
    name, *options = command.split()
    if options[:1] in (["split"], ["convert"]) or "--max-ms" in options:
        return  # into new folders only, as above
    tested = [file for given, file in ROWS if given[0] == name]
    assert tested, command
    for file in files:
        pattern = re.escape(file).replace(r"\*", ".*").replace("NAME", r"\w+")
        assert any(re.search(pattern + "$", other) for other in tested), (command, file)


def test_the_page_names_every_command_that_writes() -> None:
    commands = {command.split()[0] for command, _ in rows_of_the_page()}
    assert commands == {command[0] for command, _ in ROWS}


def test_own_results_are_replaced_and_keep_their_modes(
    detrkit_here: Run, tiny_detr: Path, here: Path
) -> None:
    command = [
        part.format(model=tiny_detr) for part in (*DETECT, "--json", "out.json", "--save-dir", "drawn")
    ]
    assert detrkit_here(*command).returncode == 0
    umask = os.umask(0)
    os.umask(umask)
    for path in (here / "out.json", here / "drawn" / "a.jpg"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask
        path.chmod(0o640)
    assert detrkit_here(*command).returncode == 0
    for path in (here / "out.json", here / "drawn" / "a.jpg"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_every_image_has_files_of_its_own_and_the_document_names_them(
    detrkit_here: Run, tiny_panoptic: Path, here: Path
) -> None:
    for number, name in enumerate(("x.jpg", "x.png", "X.PNG", "x.bmp")):
        make_picture(60, 40 + number).save(here / name)
    names = [here / name for name in ("x.jpg", "x.png", "X.PNG", "x.bmp")]
    done = detrkit_here("segment", *names, "--model", tiny_panoptic, "--save-dir", "out")
    assert done.returncode == 0, done.stderr
    document = read_json(here / "out" / "panoptic.json")
    pngs = [entry["file_name"] for entry in document["annotations"]]
    assert len({name.lower() for name in pngs}) == 4
    drawings = [image["drawing"] for image in document["images"]]
    assert len({name.lower() for name in drawings}) == 4
    for number, (png, drawing) in enumerate(zip(pngs, drawings)):
        for path in (here / "out" / "panoptic" / png, here / "out" / drawing):
            with Image.open(path) as image:
                assert image.size == (60, 40 + number)


def test_a_document_says_where_it_comes_from(detrkit_here: Run, tiny_detr: Path, here: Path) -> None:
    command = [*("detect", here / "shots", "--model", tiny_detr, "-t", 0.1, "--save-dir", "drawn")]
    assert detrkit_here(*command, "--json", "out.json").returncode == 0
    document = read_json(here / "out.json")
    info = document["info"]
    assert {
        "tool": "detrkit detect",
        "model": str(tiny_detr),
        "threshold": 0.1,
        "engine": "torch",
    }.items() <= (info.items())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", info["date"])
    assert info["weights"].startswith("sha256:")
    assert [image["drawing"] for image in document["images"]] == ["a.jpg", "b.png"]
    assert all((here / "drawn" / image["drawing"]).exists() for image in document["images"])


def finished(detrkit_here: Run, model: Path, *arguments: object) -> list[object]:
    command = ["detect", "--json", "out.json", "--model", model, *arguments]
    assert detrkit_here(*command).returncode == 0
    return [*command, "--resume"]


def test_a_finished_document_is_not_that_of_other_images_of_the_same_names(
    detrkit_here: Run, tiny_detr: Path, here: Path
) -> None:
    finished(detrkit_here, tiny_detr, "shots", "-t", 0)
    (here / "others").mkdir()
    make_picture(60, 40, seed=7).save(here / "others" / "a.jpg")
    done = detrkit_here("detect", "--json", "out.json", "--model", tiny_detr, "others", "-t", 0, "--resume")
    assert done.returncode == 0
    assert "Left out: the results of 2 images" in done.stderr
    found = read_json(here / "out.json")
    detrkit_here("detect", "--json", "fresh.json", "--model", tiny_detr, "others", "-t", 0)
    assert found == read_json(here / "fresh.json")


def change_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda model, options: options.update({"-t": 0.6}), "threshold"),
        (lambda model, options: change_weights(model), "weights"),
        (lambda model, options: options.update({"--engine": "compile"}), "engine"),
        (lambda model, options: options.update({"--exif-orientation": None}), "exif_orientation"),
    ],
)
def test_a_finished_document_is_not_that_of_other_settings(
    detrkit_here: Run, tiny_detr: Path, here: Path, change: Callable[[Path, dict], None], named: str
) -> None:
    shutil.copytree(tiny_detr, here / "model")
    options: dict[str, object] = {"-t": 0.5}
    finished(detrkit_here, here / "model", "shots", "-t", 0.5)
    before = (here / "out.json").read_bytes()
    change(here / "model", options)
    given = [part for item in options.items() for part in item if part is not None]
    done = detrkit_here(
        "detect", "--json", "out.json", "--model", here / "model", "shots", "--resume", *given
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert f"was made with {named}" in done.stderr
    assert (here / "out.json").read_bytes() == before


def test_an_image_that_changed_is_done_again(detrkit_here: Run, tiny_detr: Path, here: Path) -> None:
    resume = finished(detrkit_here, tiny_detr, "shots", "-t", 0)
    before = read_json(here / "out.json")["annotations"]
    make_picture(60, 40, seed=3).save(here / "shots" / "a.jpg")
    assert detrkit_here(*resume).returncode == 0
    assert read_json(here / "out.json")["annotations"] != before


def test_messages_can_be_lines_of_json(detrkit_here: Run, tiny_detr: Path, here: Path) -> None:
    (here / "shots" / "broken.png").write_bytes(b"no image")
    done = detrkit_here("detect", "shots", "--model", tiny_detr, "--log-format", "json", "--json", "out.json")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    assert any("broken.png" in line["message"] for line in lines)
    done = detrkit_here("detect", "nowhere.jpg", "--model", "nobody", "--log-format=json")
    assert done.returncode == 2
    assert json.loads(done.stderr.splitlines()[-1])["level"] == "error"
    done = detrkit_here("models", "--log-format", "xml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_log_gets_lines_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from detrkit.common import progress

    seconds = iter(range(0, 10_000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    assert list(progress.with_progress(range(40), 40, "Detecting")) == list(range(40))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Detecting: 3 of 40, 0.25 a second"
    assert len(lines) == 3


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_ends_a_run_as_an_interrupt_does(tiny_detr: Path, here: Path) -> None:
    from tests.conftest import wait_until

    for number in range(300):
        make_picture(120, 80, seed=number % 7).save(here / "shots" / f"{number}.png")
    out = here / "out.json"
    process = start_detrkit("detect", here / "shots", "--model", tiny_detr, "--json", out)
    journal = here / "out.json.unfinished.jsonl"
    wait_until(lambda: journal.exists() and journal.read_bytes().count(b"\n") > 5)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=300)
    assert process.returncode == 143, messages
    assert "Traceback" not in messages
    assert "Continue with --resume" in messages
    assert 5 <= len(read_json(out)["images"]) < 300


def test_control_characters_of_file_names_are_shown_as_escapes(
    detrkit_here: Run, tiny_detr: Path, here: Path
) -> None:
    for name in ("x\x1b]0;TITLE\x07.png", "y\u202egnp.png"):
        make_picture(60, 40).save(here / "shots" / name)
        (here / "shots" / f"broken{name}").write_bytes(b"no image")
    done = detrkit_here("detect", "shots", "--model", tiny_detr)
    assert "\\x1b]0;TITLE\\x07" in done.stdout
    assert "\\x1b]0;TITLE\\x07" in done.stderr
    assert "\\u202e" in done.stdout + done.stderr
    assert not {"\x1b", "\x07", "\u202e"} & set(done.stdout + done.stderr)


def test_a_warning_has_its_level_in_a_log_of_json(detrkit_here: Run, tiny_detr: Path, tmp_path: Path) -> None:
    (tmp_path / "shots" / "inner").mkdir(parents=True)
    (tmp_path / "shots" / "inner" / "a.jpg").touch()
    done = detrkit_here("detect", tmp_path / "shots", "--model", tiny_detr, "--log-format", "json")
    levels = [json.loads(line)["level"] for line in done.stderr.splitlines()]
    assert levels == ["warning", "info"]
