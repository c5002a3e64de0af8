"""``detrkit detect --csv``, ``--counts`` and ``--json FILE.jsonl``: tables of what was found."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from detrkit import Detector
from detrkit.inference import prepared
from tests.cli.conftest import Run
from tests.conftest import make_picture, read_json

QUERIES = 12


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        make_picture(120, 80, seed=number).save(folder / f"{number}.png")
    return folder


def journal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.unfinished.jsonl")


def stop_after_two(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    from detrkit.results.record import Record

    add = Record.add

    def add_two(record: Record, position: int, detections: object) -> None:
        if len(record.done) == 2:
            raise KeyboardInterrupt
        add(record, position, detections)

    monkeypatch.setattr(Record, "add", add_two)
    return monkeypatch


def test_every_output_holds_the_same_objects(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    command = ["detect", *pictures, "--model", tiny_detr, "-t", 0.15]
    files = {"--json": tmp_path / "a.json", "--csv": tmp_path / "a.csv", "--counts": tmp_path / "counts.csv"}
    done = detrkit_here(*command, *(part for item in files.items() for part in item))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert detrkit_here(*command, "--json", tmp_path / "a.jsonl").returncode == 0
    document = read_json(tmp_path / "a.json")
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    files_of = {entry["id"]: entry["file_name"] for entry in document["images"]}
    wanted = [
        (files_of[found["image_id"]], names[found["category_id"]], found["score"])
        for found in document["annotations"]
    ]
    assert wanted
    rows = read_csv(tmp_path / "a.csv")
    assert [(row["file_name"], row["name"], float(row["score"])) for row in rows] == wanted
    python = [row for found in Detector.from_pretrained(tiny_detr)(pictures, 0.15) for row in found.to_rows()]
    assert len(rows) == len(python)
    for row, other in zip(rows, python):
        for column in ("label", "name", "width", "height"):
            assert row[column] == str(other[column])
        for column in ("score", "x0", "y0", "x1", "y1"):
            assert float(row[column]) == pytest.approx(other[column], abs=1e-3)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["file_name"] for line in lines] == [path.name for path in pictures]
    assert [(li["file_name"], o["name"], o["score"]) for li in lines for o in li["objects"]] == wanted
    counts = read_csv(tmp_path / "counts.csv")
    assert [row["file_name"] for row in counts] == [path.name for path in pictures]
    for row in counts:
        found = Counter(name for file, name, _ in wanted if file == row["file_name"])
        assert int(row["total"]) == found.total()
        assert {name: int(row[name]) for name in found} == found
    said = Counter(name for _, name, _ in wanted).most_common(1)[0]
    assert f"4 images, {len(wanted)} objects ({said[0]} {said[1]}" in done.stderr
    assert "at threshold 0.15; results in" in done.stderr


def test_an_image_without_objects_has_zeros(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    files = ["--csv", tmp_path / "a.csv", "--counts", "-"]
    done = detrkit_here("detect", pictures[0], "--model", tiny_detr, "-t", 1, *files)
    assert done.returncode == 0, done.stderr
    [row] = csv.DictReader(done.stdout.splitlines())
    assert row.pop("file_name") == pictures[0].name
    assert {"total", "cat", "remote", "couch"} <= set(row)
    assert set(row.values()) == {"0"}
    assert read_csv(tmp_path / "a.csv") == []
    assert "1 image, 0 objects at threshold 1" in done.stderr


def test_names_that_a_spreadsheet_would_run_are_text(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    make_picture(60, 60).save(tmp_path / "=cmd.png")
    options = ["--csv", tmp_path / "a.csv", "--counts", tmp_path / "b.csv"]
    done = detrkit_here("detect", tmp_path / "=cmd.png", "--model", tiny_detr, "-t", 0, *options)
    assert done.returncode == 0, done.stderr
    for name in ("a.csv", "b.csv"):
        assert {row["file_name"] for row in read_csv(tmp_path / name)} == {"'=cmd.png"}


def test_two_documents_do_not_share_stdout(detrkit_here: Run, tiny_detr: Path, pictures: list[Path]) -> None:
    done = detrkit_here("detect", pictures[0], "--model", tiny_detr, "--json", "-", "--csv", "-")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "--json and --csv" in done.stderr


@pytest.mark.parametrize("option", ["--csv", "--counts", "--json"])
def test_a_run_with_any_output_goes_on_where_another_ended(
    detrkit_here: Run,
    tiny_detr: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    option: str,
) -> None:
    command = ["detect", images, "--model", tiny_detr, "-t", 0.1]
    suffix = ".jsonl" if option == "--json" else ".csv"
    whole, parts = tmp_path / f"whole{suffix}", tmp_path / f"parts{suffix}"
    assert detrkit_here(*command, option, whole).returncode == 0
    assert not journal_of(whole).exists()
    with monkeypatch.context() as patch:
        stop_after_two(patch)
        assert detrkit_here(*command, option, parts).returncode == 130
    assert 0 < len(parts.read_bytes()) < len(whole.read_bytes())
    assert journal_of(parts).exists()
    done = detrkit_here(*command, option, parts, "--resume")
    assert done.returncode == 0, done.stderr
    assert parts.read_bytes() == whole.read_bytes()
    assert not journal_of(parts).exists()
    other = detrkit_here("detect", images, "--model", tiny_detr, "-t", 0.1, option, parts, "--resume")
    assert "has no journal to continue from; all images are processed again" in other.stderr
    assert parts.read_bytes() == whole.read_bytes()


def test_tables_are_made_from_a_document_that_is_complete(
    detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["detect", images, "--model", tiny_detr, "-t", 0.1, "--json", tmp_path / "a.json"]
    detrkit_here(*command, "--csv", tmp_path / "whole.csv")
    before = (tmp_path / "a.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "read_image", lambda *_, **__: pytest.fail("an image is read again"))
        done = detrkit_here(*command, "--csv", tmp_path / "late.csv", "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "late.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == before


def test_own_tables_are_replaced(detrkit_here: Run, tiny_detr: Path, images: Path, tmp_path: Path) -> None:
    files = ["--csv", tmp_path / "a.csv", "--counts", tmp_path / "b.csv", "--json", tmp_path / "c.ndjson"]
    for threshold in (0, 1):
        done = detrkit_here("detect", images, "--model", tiny_detr, "-t", threshold, *files)
        assert done.returncode == 0, done.stderr
    assert read_csv(tmp_path / "a.csv") == []
