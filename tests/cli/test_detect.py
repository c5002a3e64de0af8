from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import Detector
from tests.cli.conftest import Run, start_detrkit
from tests.conftest import make_picture, read_json, wait_until
from tests.hub.server import HubServer

QUERIES = 12


def assert_valid_coco(document: dict) -> None:
    """What every document must be, whatever was found."""
    assert set(document) == {"info", "images", "categories", "annotations"}
    images = {image["id"]: image for image in document["images"]}
    assert len(images) == len(document["images"])
    names = [image["file_name"] for image in document["images"]]
    assert len(set(names)) == len(names)
    categories = {category["id"] for category in document["categories"]}
    assert len(categories) == len(document["categories"])
    assert [entry["id"] for entry in document["annotations"]] == list(
        range(1, len(document["annotations"]) + 1)
    )
    for entry in document["annotations"]:
        assert entry["image_id"] in images
        assert entry["category_id"] in categories
        x, y, width, height = entry["bbox"]
        image = images[entry["image_id"]]
        assert -1 <= x <= x + width <= image["width"] * 1.5
        assert -1 <= y + height <= image["height"] * 1.5
        assert entry["area"] == pytest.approx(width * height, rel=1e-4)
        assert 0 < entry["score"] <= 1


# Output


def test_the_json_document_holds_the_detectors_results(
    detrkit: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "new-folder" / "boxes.json"
    done = detrkit(
        "detect", *pictures, "--model", tiny_detr, "--threshold", 0.2, "--json", out, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    document = read_json(out)
    assert_valid_coco(document)
    assert [i["file_name"] for i in document["images"]] == [path.name for path in pictures]
    assert [(i["width"], i["height"]) for i in document["images"]] == [
        (120, 80),
        (80, 120),
        (120, 80),
        (90, 90),
    ]
    assert [i["id"] for i in document["images"]] == [1, 2, 3, 4]
    assert {c["name"] for c in document["categories"]} >= {"cat", "remote", "couch"}
    wanted = Detector.from_pretrained(tiny_detr, device="cpu")(pictures, threshold=0.2)
    assert sum(map(len, wanted)) > 0
    for image, one in zip(document["images"], wanted):
        found = [entry for entry in document["annotations"] if entry["image_id"] == image["id"]]
        np.testing.assert_allclose([entry["score"] for entry in found], one.scores, atol=1e-4)
        np.testing.assert_array_equal([entry["category_id"] for entry in found], one.labels)
        boxes = np.array([entry["bbox"] for entry in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(boxes, one.boxes, atol=1e-2)


def test_files_named_by_number_keep_it_as_the_image_id(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    for name in ("000000000139.jpg", "000000000285.jpg"):
        make_picture(120, 80).save(tmp_path / name)
    done = detrkit_here("detect", tmp_path, "--model", tiny_detr, "-t", 0, "--json", "-")
    document = json.loads(done.stdout)
    assert_valid_coco(document)
    assert [(i["id"], i["file_name"]) for i in document["images"]] == [
        (139, "000000000139.jpg"),
        (285, "000000000285.jpg"),
    ]
    assert {entry["image_id"] for entry in document["annotations"]} == {139, 285}


def test_without_json_a_table_goes_to_stdout_and_a_summary_to_stderr(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path]
) -> None:
    done = detrkit_here("detect", pictures[0], pictures[1], "--model", tiny_detr, "--threshold", 0)
    assert done.returncode == 0
    rows = [line for line in done.stdout.splitlines() if ".jpg" in line]
    assert [
        str(path) in row for row, path in zip(rows, [pictures[0]] * QUERIES + [pictures[1]] * QUERIES)
    ] == [True] * len(rows)
    assert len(rows) == 2 * QUERIES
    counts = Counter(row.split()[1] for row in rows)
    said = ", ".join(f"{name} {number}" for name, number in counts.most_common())
    assert done.stderr == f"2 images, {2 * QUERIES} objects ({said}) at threshold 0.\n"


def test_max_objects_keeps_the_best_of_each_image(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    found = []
    for options in ([], ["--max-objects", 2]):
        out = tmp_path / f"{len(options)}.json"
        done = detrkit_here(
            *("detect", pictures[0], "--model", tiny_detr, "--threshold", 0, "--json", out), *options
        )
        assert done.returncode == 0, done.stderr
        found.append([entry["score"] for entry in read_json(out)["annotations"]])
    everything, best = found
    assert len(everything) == QUERIES
    assert best == sorted(everything, reverse=True)[:2]


def test_standard_input_is_not_sent_to_a_cluster(detrkit_here: Run, tiny_detr: Path) -> None:
    done = detrkit_here("detect", "-", "--model", tiny_detr, "--ray", "local")
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input" in done.stderr


def test_folders_of_a_folder_are_read_on_request(detrkit_here: Run, tiny_detr: Path, tmp_path: Path) -> None:
    for name in ("a/x.jpg", "b/x.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        make_picture(40, 30).save(tmp_path / "photos" / name)
    done = detrkit_here("detect", tmp_path / "photos", "-r", "--model", tiny_detr, "--json", "-")
    assert done.returncode == 0, done.stderr
    names = [image["file_name"] for image in json.loads(done.stdout)["images"]]
    assert [Path(name).parent.name for name in names] == ["a", "b"]


def test_an_image_without_objects_is_listed(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    done = detrkit_here("detect", pictures[0], "--model", tiny_detr, "--threshold", 1)
    assert done.returncode == 0
    assert "(nothing)" in done.stdout
    detrkit_here(
        "detect", pictures[0], "--model", tiny_detr, "--threshold", 1, "--json", tmp_path / "out.json"
    )
    document = read_json(tmp_path / "out.json")
    assert (len(document["images"]), document["annotations"]) == (1, [])


def test_drawn_pictures_keep_name_format_and_size(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    make_picture(70, 70).save(tmp_path / "other.webp")
    inputs = [*pictures, tmp_path / "other.webp"]
    done = detrkit_here("detect", *inputs, "--model", tiny_detr, "-t", 0, "--save-dir", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    names = [path.name for path in pictures] + ["other.png"]
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == sorted(names)
    for original, name in zip(inputs, names):
        with Image.open(tmp_path / "drawn" / name) as drawn, Image.open(original) as image:
            assert drawn.size == image.size
            assert drawn.format == ("JPEG" if name.endswith(".jpg") else "PNG")
            difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(image.convert("RGB"), dtype=int))
            assert difference.max() > 100


def test_images_of_the_same_name_do_not_overwrite_each_other(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    for folder, size in (("a", (120, 80)), ("b", (80, 120))):
        (tmp_path / folder).mkdir()
        make_picture(*size).save(tmp_path / folder / "same.jpg")
    done = detrkit_here(
        *("detect", tmp_path / "a", tmp_path / "b", "--model", tiny_detr, "-t", 0),
        *("--save-dir", tmp_path / "drawn", "--json", tmp_path / "out.json"),
    )
    assert done.returncode == 0, done.stderr
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "drawn").iterdir()}
    assert sizes == {"same.jpg": (120, 80), "same-2.jpg": (80, 120)}
    document = read_json(tmp_path / "out.json")
    assert_valid_coco(document)
    assert [i["file_name"] for i in document["images"]] == [str(tmp_path / f / "same.jpg") for f in "ab"]


def test_an_input_is_never_overwritten(detrkit_here: Run, tiny_detr: Path, pictures: list[Path]) -> None:
    before = pictures[0].read_bytes()
    done = detrkit_here("detect", pictures[0], "--model", tiny_detr, "--save-dir", pictures[0].parent)
    assert done.returncode == 2
    assert "overwrite" in done.stderr
    assert pictures[0].read_bytes() == before


def test_outputs_that_cannot_be_written_are_refused(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    for option, target in (
        ("--json", tmp_path),
        ("--save-dir", pictures[1]),
        ("--json", pictures[1] / "a.json"),
    ):
        done = detrkit_here("detect", pictures[0], "--model", tiny_detr, option, target)
        assert done.returncode == 2, option
        assert str(target) in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
def test_the_document_can_go_into_a_pipe_which_stays_one(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(
        [sys.executable, "-c", f"print(open({str(pipe)!r}).read())"], stdout=subprocess.PIPE
    )
    try:
        done = detrkit_here("detect", pictures[0], "--model", tiny_detr, "--json", pipe)
        output, _ = reader.communicate(timeout=300)
    finally:
        reader.kill()
    assert done.returncode == 0, done.stderr
    assert_valid_coco(json.loads(output))
    assert pipe.is_fifo()


def test_batches_change_nothing_in_the_document(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    mixed = [pictures[0], bad_images(tmp_path / "bad")[0], *pictures[1:]]
    documents = []
    for batch_size in (1, 2, 3):
        out = tmp_path / f"{batch_size}.json"
        done = detrkit_here(
            "detect", *mixed, "-m", tiny_detr, "-t", 0, "--batch-size", batch_size, "--json", out
        )
        assert done.returncode == 1
        documents.append(read_json(out))
    assert [image["file_name"] for image in documents[0]["images"]] == [path.name for path in pictures]
    for document in documents[1:]:
        assert document["images"] == documents[0]["images"]
        for one, other in zip(document["annotations"], documents[0]["annotations"]):
            assert one["image_id"] == other["image_id"]
            assert one["bbox"] == pytest.approx(other["bbox"], abs=1e-2)


# Input


def test_folders_patterns_and_addresses_are_images(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pictures[0].parent
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (folder / "notes.txt").write_text("no image, and not taken for one in a folder")
    (folder / "inside").mkdir()
    make_picture(50, 50).save(folder / "inside" / "deeper.jpg")
    with HubServer({"some/pictures": {"main": {"far.png": pictures[2]}}}) as server:
        address = f"{server.url}/some/pictures/resolve/main/far.png"
        done = detrkit_here(
            *("detect", folder, address, folder / "inside" / "*.jpg", folder / "wide.jpg"),
            *("--model", tiny_detr, "--json", "-", "--allow-private-addresses"),
        )
    assert done.returncode == 0, done.stderr
    names = [image["file_name"] for image in json.loads(done.stdout)["images"]]
    # wide.jpg was named twice, by its folder and by itself.
    assert names == ["square.jpg", "tall.jpg", "wide.jpg", "wide_too.png", "far.png", "deeper.jpg"]


def test_exif_orientation_turns_the_image_on_request(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(120, 80).save(tmp_path / "turned.jpg", exif=exif)
    sizes = []
    for option in ("--no-exif-orientation", "--exif-orientation"):
        out, drawn = tmp_path / f"{option}.json", tmp_path / option
        done = detrkit_here(
            *(
                "detect",
                tmp_path / "turned.jpg",
                "--model",
                tiny_detr,
                option,
                "--json",
                out,
                "--save-dir",
                drawn,
            )
        )
        assert done.returncode == 0, done.stderr
        image = read_json(out)["images"][0]
        sizes.append((image["width"], image["height"]))
        assert Image.open(drawn / "turned.jpg").size == sizes[-1]
    assert sizes == [(120, 80), (80, 120)]


def bad_images(folder: Path) -> list[Path]:
    """A text file, half a JPEG, an empty file and a file that is not there."""
    folder.mkdir()
    (folder / "text.jpg").write_text("this is not a picture")
    make_picture(300, 200).save(folder / "half.jpg")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:2000])
    (folder / "empty.png").write_bytes(b"")
    return [folder / name for name in ("text.jpg", "half.jpg", "empty.png", "missing.jpg")]


def test_bad_images_are_reported_and_the_others_done(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    bad = bad_images(tmp_path / "bad")
    one_pixel = tmp_path / "one_pixel.png"
    Image.new("RGB", (1, 1)).save(one_pixel)
    out = tmp_path / "out.json"
    done = detrkit_here(
        *("detect", bad[0], pictures[0], bad[1], bad[2], one_pixel, bad[3]),
        *("--model", tiny_detr, "-t", 0, "--json", out, "--save-dir", tmp_path / "drawn"),
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    for path in bad:
        assert sum(str(path) in line for line in lines) == 1
    assert lines[-1] == "4 of 6 inputs could not be read."
    assert "Traceback" not in done.stderr
    document = read_json(out)
    assert_valid_coco(document)
    assert [image["file_name"] for image in document["images"]] == ["wide.jpg", "one_pixel.png"]
    assert len(document["annotations"]) == 2 * QUERIES
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["one_pixel.png", "wide.jpg"]


@pytest.mark.parametrize("which", range(4))
def test_a_single_bad_image_gives_one_line_and_status_2(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, which: int
) -> None:
    bad = bad_images(tmp_path / "bad")[which]
    done = detrkit_here("detect", bad, "--model", tiny_detr, "--json", tmp_path / "out.json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(bad) in done.stderr
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("pattern", ["nothing/*.jpg", ".", "http://127.0.0.1:9/a.jpg"])
def test_arguments_without_images_are_named(
    detrkit_here: Run, tiny_detr: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    done = detrkit_here("detect", pattern, "--model", tiny_detr)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(pattern)


def test_a_file_name_may_hold_any_character(detrkit: Run, tiny_detr: Path, tmp_path: Path) -> None:
    names = ["[red] photo.jpg", "[bold].jpg", "smörgås 猫.jpg", os.fsdecode(b"byte\xff.jpg"), "new\nline.jpg"]
    for name in names:
        make_picture(60, 60).save(tmp_path / name)
    done = detrkit(
        *("detect", tmp_path, "--model", tiny_detr, "-t", 0, "--save-dir", tmp_path / "drawn"),
        environment={"PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "[red] photo.jpg" in done.stdout
    assert "[bold].jpg" in done.stdout
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == sorted(names)


# Models and failures


def test_a_damaged_model_gives_one_line_and_status_2(
    detrkit_here: Run, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{broken")
    done = detrkit_here("detect", pictures[0], "--model", tmp_path / "model")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(tmp_path / "model") in done.stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--engine", "onyx"), ("--device", "gpu7"), ("--dtype", "float8"), ("--threshold", "nan")],
)
def test_settings_that_cannot_be_had_give_one_line_and_status_2(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], option: str, value: str
) -> None:
    done = detrkit_here("detect", pictures[0], "--model", tiny_detr, option, value)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert option.strip("-") in done.stderr


def test_debug_shows_the_traceback(detrkit_here: Run, tiny_detr: Path, pictures: list[Path]) -> None:
    done = detrkit_here("detect", pictures[0], "--model", tiny_detr, "--engine", "onyx", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_an_interrupt_keeps_the_results_so_far(tiny_detr: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    first = folder / "0.jpg"
    make_picture(120, 80).save(first)
    for number in range(1, 3_000):
        (folder / f"{number}.jpg").hardlink_to(first)
    drawn, out = tmp_path / "drawn", tmp_path / "out.json"
    process = start_detrkit(
        *("detect", folder, "--model", tiny_detr, "-t", 0, "--save-dir", drawn, "--json", out)
    )
    try:
        wait_until(lambda: drawn.is_dir() and len(list(drawn.iterdir())) > 3)
        process.send_signal(signal.SIGINT)
        _, messages = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in messages
    document = read_json(out)
    assert_valid_coco(document)
    assert 0 < len(document["images"]) < 3_000
    assert f"Interrupted after {len(document['images'])} of 3,000 images." in messages
    # A picture may have been drawn whose result the interrupt kept out of the document, but never half a one.
    pictures = sorted(drawn.iterdir())
    assert len(pictures) - len(document["images"]) in (0, 1)
    for path in pictures:
        Image.open(path).load()
