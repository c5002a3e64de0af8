from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import Detector, PanopticSegmentation, rgb_to_id
from tests.cli.conftest import Run, start_detrkit
from tests.closeness import assert_same_documents
from tests.conftest import make_picture, read_json, wait_until
from tests.golden import PANOPTIC

THRESHOLD = 0.5


def folder_of(path: Path) -> dict[str, bytes]:
    """Every file below a folder and what is in it."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def assert_consistent(folder: Path) -> dict:
    """The document, checked against the PNG files beside it."""
    document = read_json(folder / "panoptic.json")
    categories = {entry["id"]: entry for entry in document["categories"]}
    assert categories == {
        1: {"id": 1, "name": "cat", "isthing": 1},
        2: {"id": 2, "name": "remote", "isthing": 1},
        3: {"id": 3, "name": "couch", "isthing": 0},
    }
    assert [entry["image_id"] for entry in document["annotations"]] == [i["id"] for i in document["images"]]
    for image, entry in zip(document["images"], document["annotations"]):
        with Image.open(folder / "panoptic" / entry["file_name"]) as png:
            ids = rgb_to_id(np.asarray(png))
        assert ids.shape == (image["height"], image["width"])
        areas = dict(zip(*np.unique(ids[ids > 0], return_counts=True)))
        assert areas == {segment["id"]: segment["area"] for segment in entry["segments_info"]}
        for segment in entry["segments_info"]:
            assert segment["isthing"] == categories[segment["category_id"]]["isthing"]
    return document


def test_the_files_hold_the_detectors_segments(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = detrkit_here(
        "segment", *pictures, "--model", tiny_panoptic, "-t", THRESHOLD, "--save-dir", out, "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    document = assert_consistent(out)
    assert [image["file_name"] for image in document["images"]] == [path.name for path in pictures]
    wanted = Detector.from_pretrained(tiny_panoptic, device="cpu").segment(pictures, threshold=THRESHOLD)
    assert sum(map(len, wanted)) >= 4
    for entry, one in zip(document["annotations"], wanted):
        with Image.open(out / "panoptic" / entry["file_name"]) as png:
            np.testing.assert_array_equal(rgb_to_id(np.asarray(png)), one.ids)
        assert entry == one.to_coco(entry["image_id"], entry["file_name"])
    assert f"{sum(map(len, wanted))} segments in 4 images" in done.stderr
    for path in pictures:
        with Image.open(out / "pictures" / path.name) as drawn, Image.open(path) as image:
            assert drawn.size == image.size
    assert sorted(path.name for path in out.iterdir()) == ["panoptic", "panoptic.json", "pictures"]


def test_without_a_folder_a_table_goes_to_stdout(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path]
) -> None:
    done = detrkit_here("segment", *pictures, "--model", tiny_panoptic, "-t", THRESHOLD)
    assert done.returncode == 0, done.stderr
    assert "thing" in done.stdout
    assert str(pictures[0]) in done.stdout
    assert "segments in 4 images." in done.stderr


def test_an_image_without_segments_is_listed_and_written(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    assert "(nothing)" in detrkit_here("segment", pictures[0], "--model", tiny_panoptic, "-t", 1).stdout
    detrkit_here("segment", pictures[0], "--model", tiny_panoptic, "-t", 1, "--save-dir", tmp_path / "out")
    document = assert_consistent(tmp_path / "out")
    assert document["annotations"][0]["segments_info"] == []


def test_a_finished_run_is_resumed_with_more_images(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    command = ["segment", "--model", tiny_panoptic, "-t", THRESHOLD, "--save-dir"]
    detrkit_here(*command, tmp_path / "whole", *pictures)
    detrkit_here(*command, tmp_path / "parts", *pictures[:2])
    kept = (tmp_path / "parts" / "pictures" / pictures[0].name).stat().st_mtime_ns
    (tmp_path / "parts" / "pictures" / pictures[1].name).unlink()  # it is drawn again
    # The ids of images that are named by words are their places, which more images behind them leave alone.
    done = detrkit_here(*command, tmp_path / "parts", *pictures, "--resume")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "parts" / "pictures" / pictures[0].name).stat().st_mtime_ns == kept
    assert folder_of(tmp_path / "parts") == folder_of(tmp_path / "whole")


def test_other_settings_cannot_be_resumed(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    command = ["segment", pictures[0], "--model", tiny_panoptic, "--save-dir", tmp_path / "out"]
    detrkit_here(*command, "-t", 0.5)
    before = folder_of(tmp_path / "out")
    done = detrkit_here(*command, "-t", 0.4, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "made with threshold 0.5, not 0.4" in done.stderr
    assert folder_of(tmp_path / "out") == before


def test_resuming_needs_a_folder(detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path]) -> None:
    done = detrkit_here("segment", pictures[0], "--model", tiny_panoptic, "--resume")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--save-dir" in done.stderr


def test_images_that_cannot_be_read_are_left_out(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(pictures[0].read_bytes()[:200])
    done = detrkit_here(
        "segment", broken, *pictures, "--model", tiny_panoptic, "--save-dir", tmp_path / "out"
    )
    assert done.returncode == 1
    assert "broken.jpg" in done.stderr
    assert len(assert_consistent(tmp_path / "out")["images"]) == 4
    done = detrkit_here("segment", broken, "--model", tiny_panoptic)
    assert done.returncode == 2


def test_a_run_without_any_readable_image_leaves_no_file(
    detrkit_here: Run, tiny_panoptic: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    done = detrkit_here(
        "segment", tmp_path / "a.png", "--model", tiny_panoptic, "--save-dir", tmp_path / "out"
    )
    assert done.returncode == 2
    assert folder_of(tmp_path / "out") == {}


def test_results_of_images_that_the_resumed_run_does_not_name_are_reported_and_kept(
    detrkit_here: Run, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    command = ["segment", "--model", tiny_panoptic, "-t", THRESHOLD, "--save-dir", tmp_path / "out"]
    detrkit_here(*command, *pictures)
    whole = folder_of(tmp_path / "out")
    done = detrkit_here(*command, *pictures[:3], "--resume")
    assert done.returncode == 0
    assert "Left out: the results of 1 image of the earlier run" in done.stderr
    assert len(assert_consistent(tmp_path / "out")["images"]) == 3
    assert "unfinished.jsonl" in folder_of(tmp_path / "out")
    assert detrkit_here(*command, *pictures, "--resume").returncode == 0
    assert folder_of(tmp_path / "out") == whole


def test_a_model_without_masks_is_refused_in_one_line(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path]
) -> None:
    done = detrkit_here("segment", pictures[0], "--model", tiny_detr)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "panoptic model" in done.stderr


def test_drawings_never_overwrite_the_inputs(detrkit_here: Run, tiny_panoptic: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    make_picture(120, 80).save(tmp_path / "pictures" / "a.jpg")
    done = detrkit_here("segment", tmp_path / "pictures", "--model", tiny_panoptic, "--save-dir", tmp_path)
    assert done.returncode == 2
    assert f"would overwrite the input {tmp_path / 'pictures' / 'a.jpg'}" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_is_finished_as_if_it_had_not_been(
    detrkit_here: Run, tiny_panoptic: Path, tmp_path: Path, kind: signal.Signals
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(30):
        make_picture(120, 80, seed=number).save(images / f"{number}.png")
    command = ["segment", images, "--model", tiny_panoptic, "-t", THRESHOLD, "--save-dir"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert detrkit_here(*command, whole).returncode == 0
    process = start_detrkit(*command, out)
    wait_until(lambda: len(list(out.glob("panoptic/*.png"))) >= 5)
    process.send_signal(kind)
    _, messages = process.communicate(timeout=300)
    assert not (out / "panoptic.json").exists()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "Continue with --resume" in messages
        assert "Traceback" not in messages
    for path in out.glob("p*/*.png"):
        if not path.name.startswith("."):
            Image.open(path).load()
    assert detrkit_here(*command, out, "--resume").returncode == 0
    assert_same_documents(out / "panoptic.json", whole / "panoptic.json")
    found, expected = (
        {n: d for n, d in folder_of(f).items() if not n.endswith("json")} for f in (out, whole)
    )
    assert {name: data for name, data in found.items() if "/." not in name} == expected


class Recorded:
    """Stands for a detector that gives recorded segmentations, one for each image in turn."""

    def __init__(self, folder: Path, predictions: dict, categories: list[dict]) -> None:
        self.folder, self.predictions = folder, predictions["annotations"]
        self.names = {entry["id"]: entry["name"] for entry in categories}
        self.things = {entry["id"]: entry["isthing"] for entry in categories}

    def stream_segments(self, images: Iterator[Image.Image], **_: object) -> Iterator[PanopticSegmentation]:
        for image, entry in zip(images, self.predictions):
            with Image.open(self.folder / entry["file_name"]) as png:
                ids = rgb_to_id(np.asarray(png.convert("RGB")))
            assert ids.shape == (image.height, image.width)
            segments = [
                {
                    **segment,
                    "isthing": bool(self.things[segment["category_id"]]),
                    "area": int((ids == segment["id"]).sum()),
                    "score": 1.0,
                }
                for segment in entry["segments_info"]
            ]
            names = [self.names[segment["category_id"]] for segment in segments]
            yield PanopticSegmentation(ids.astype(np.int32), segments, names, ids.shape)

    def categories(self, found: set[int]) -> list[dict]:
        return [{"id": i, "name": name, "isthing": self.things[i]} for i, name in self.names.items()]


def test_the_files_are_evaluated_to_the_recorded_numbers(
    detrkit_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, recorded = PANOPTIC / "panoptic_val2017.json", PANOPTIC / "panoptic_predictions"
    predictions = read_json(recorded.with_suffix(".json"))
    detector = Recorded(recorded, predictions, read_json(truth)["categories"])
    monkeypatch.setattr("detrkit.cli.options.load_detector", lambda *_, **__: detector)
    sizes = {image["id"]: (image["width"], image["height"]) for image in read_json(truth)["images"]}
    images = []
    for entry in predictions["annotations"]:
        images.append(tmp_path / f"{entry['image_id']:012}.png")
        Image.new("RGB", sizes[entry["image_id"]]).save(images[-1])
    done = detrkit_here("segment", *images, "--save-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    numbers = tmp_path / "numbers.json"
    done = detrkit_here(
        *("evaluate", "--annotations", truth, "--panoptic-dir", truth.with_suffix("")),
        *("--predictions", tmp_path / "out" / "panoptic.json", "--json", numbers),
    )
    assert done.returncode == 0, done.stderr
    wanted = read_json(PANOPTIC / "panoptic_quality.json")["All"]
    found = read_json(numbers)["panoptic"]["All"]
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-9)
