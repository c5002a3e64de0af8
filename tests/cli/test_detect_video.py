"""``detrkit detect`` with videos and animations: a result, a drawing and a row for each frame."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.clips import FRAMES, damage_packet, frame_count, panned, set_display_matrix, write_clip
from tests.conftest import make_picture, read_json
from tests.docs.blocks import ROOT

pytest.importorskip("av")
from detrkit.inference import video
from detrkit.inference.inputs import ImageInput
from detrkit.inference.video import read_video

SIZE = (96, 64)
QUERIES = 12
CELLS = ROOT / "examples" / "BloodImage_00000.jpg"


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", panned(make_picture(200, 64), SIZE), sound=True)


@pytest.fixture
def animation(tmp_path: Path) -> Path:
    frames = panned(make_picture(200, 64), SIZE, frames=4)
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    return tmp_path / "a.gif"


def test_cells_that_move_through_a_clip_are_found_drawn_and_followed(
    detrkit_here: Run, tmp_path: Path
) -> None:
    pytest.importorskip("trackers")
    with Image.open(CELLS) as image:
        whole = image.convert("RGB").crop((0, 90, 640, 390))
    clip = write_clip(tmp_path / "cells.mp4", panned(whole, (400, 300), step=10))
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    outputs = ["--json", out, "--csv", table, "--save-dir", tmp_path / "drawn", "--track"]
    done = detrkit_here("detect", clip, "--model", "blood-cells", "--device", "cpu", *outputs)
    assert done.returncode == 0, done.stderr
    assert "12 images, " in done.stderr
    document = read_json(out)
    assert [image["frame_index"] for image in document["images"]] == list(range(FRAMES))
    assert frame_count(tmp_path / "drawn" / "cells.mp4") == FRAMES
    paths = defaultdict(list)
    for found in document["annotations"]:
        if "track_id" in found:
            paths[found["track_id"]].append((found["image_id"], found["bbox"][0], found["category_id"]))
    assert sum(len(path) == FRAMES for path in paths.values()) >= 2
    (white,) = (category["id"] for category in document["categories"] if category["name"] == "WBC")
    (longest,) = (path for path in paths.values() if path[0][2] == white)
    assert len(longest) == FRAMES
    assert len({label for _, _, label in longest}) == 1
    # The window moves to the right by 10 pixels a frame.
    lefts = [x for _, x, _ in longest]  # of a box that may be off in one frame
    assert np.median(np.diff(lefts)) == pytest.approx(-10, abs=2)
    assert lefts[-1] - lefts[0] == pytest.approx(-10 * (FRAMES - 1), abs=10)
    rows = Counter(row["track_id"] for row in read_csv(table) if row["track_id"])
    assert {int(track): number for track, number in rows.items()} == {t: len(p) for t, p in paths.items()}


def test_every_output_knows_the_frame_and_its_time(
    detrkit_here: Run, tiny_detr: Path, clip: Path, pictures: list[Path], tmp_path: Path
) -> None:
    files = {name: tmp_path / name for name in ("a.json", "a.csv", "counts.csv")}
    options = ["--json", files["a.json"], "--csv", files["a.csv"], "--counts", files["counts.csv"]]
    inputs = [pictures[0], clip, pictures[1]]
    done = detrkit_here(
        "detect", *inputs, "--model", tiny_detr, "-t", 0, "--save-dir", tmp_path / "d", *options
    )
    assert done.returncode == 0, done.stderr
    document = read_json(files["a.json"])
    assert document["videos"] == [{"id": 1, "file_name": "clip.mp4"}]
    names = [image["file_name"] for image in document["images"]]
    assert names == ["wide.jpg", *(f"clip.mp4#frame={n + 1}" for n in range(FRAMES)), "tall.jpg"]
    assert [image["id"] for image in document["images"]] == list(range(1, FRAMES + 3))
    frame = document["images"][4]
    assert (frame["video_id"], frame["frame_index"], frame["drawing"]) == (1, 3, "clip.mp4")
    assert frame["timestamp"] == pytest.approx(0.3, abs=1e-3)
    assert "video_id" not in document["images"][0]
    rows = read_csv(files["a.csv"])
    assert len(rows) == QUERIES * (FRAMES + 2)
    assert (rows[0]["file_name"], rows[0]["frame_index"]) == ("wide.jpg", "")
    row = rows[QUERIES * 4]
    assert (row["file_name"], row["frame_index"]) == ("clip.mp4", "3")
    assert float(row["timestamp"]) == pytest.approx(0.3, abs=1e-3)
    counts = read_csv(files["counts.csv"])
    assert [row["total"] for row in counts] == [str(QUERIES)] * (FRAMES + 2)
    assert [row["frame_index"] for row in counts][-3:] == ["10", "11", ""]
    drawn = list(read_video(tmp_path / "d" / "clip.mp4"))
    for one, other in zip(drawn, read_video(clip), strict=True):
        assert one.timestamp == pytest.approx(other.timestamp, abs=1e-3)
        assert one.image.size == SIZE
        difference = np.asarray(one.image, np.float32) - np.asarray(other.image, np.float32)
        assert np.abs(difference).max() > 60
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["clip.mp4", "tall.jpg", "wide.jpg"]


def test_lines_of_json_and_the_table_name_frames(
    detrkit_here: Run, tiny_detr: Path, clip: Path, tmp_path: Path
) -> None:
    command = ["detect", clip, "--model", tiny_detr, "-t", 0, "--every", 5]
    assert detrkit_here(*command, "--json", tmp_path / "a.jsonl").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["frame_index"] for line in lines] == [0, 5, 10]
    done = detrkit_here(*command)
    assert re.findall(r"clip\.mp4#frame=(\d+)", done.stdout) == ["1"] * 12 + ["6"] * 12 + ["11"] * 12


@pytest.mark.parametrize("track", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_run_goes_on_in_the_middle_of_a_video(
    detrkit_here: Run,
    tiny_detr: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    drawn: bool,
    track: bool,
) -> None:
    from detrkit import Detector
    from detrkit.results.record import Record

    if track:
        pytest.importorskip("trackers")
    command = ["detect", clip, "--model", tiny_detr, "-t", 0.1, *(["--track"] if track else [])]

    def outputs(name: str) -> list[object]:
        folder = ["--save-dir", tmp_path / name / "drawn"] if drawn else []
        return ["--json", tmp_path / name / "a.json", "--csv", tmp_path / name / "a.csv", *folder]

    assert detrkit_here(*command, *outputs("whole")).returncode == 0
    add = Record.add

    def add_five(record: Record, position: int, detections: object) -> None:
        if len(record.done) == 5:
            raise KeyboardInterrupt
        add(record, position, detections)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", add_five)
        done = detrkit_here(*command, *outputs("parts"))
    assert done.returncode == 130
    assert "Interrupted after 5 images. Continue with --resume." in done.stderr
    run = []
    stream = Detector.stream

    def watched(self: Detector, images, *arguments: object, **options: object):
        def noted():
            for image in images:
                run.append(image.index)
                yield image

        return stream(self, noted(), *arguments, **options)

    monkeypatch.setattr(Detector, "stream", watched)
    done = detrkit_here(*command, *outputs("parts"), "--resume")
    assert done.returncode == 0, done.stderr
    assert run == list(range(5, FRAMES))
    assert detrkit_here(*command, *outputs("parts"), "--resume").returncode == 0  # nothing is left
    assert run == list(range(5, FRAMES))
    for name in ("a.json", "a.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    if drawn:
        one, other = (list(read_video(tmp_path / name / "drawn" / "clip.mp4")) for name in ("parts", "whole"))
        assert len(one) == len(other) == FRAMES
        for frame, wanted in zip(one, other):
            # Not exactly: what the encoder makes of the same frames varies.
            difference = np.asarray(frame.image, np.float32) - np.asarray(wanted.image, np.float32)
            assert np.abs(difference).mean() < 8
    assert not list((tmp_path / "parts").glob("*.unfinished.jsonl"))


def test_a_damaged_frame_is_reported_and_the_others_are_done(
    detrkit_here: Run, tiny_detr: Path, clip: Path, tmp_path: Path
) -> None:
    damage_packet(clip, 5)
    done = detrkit_here("detect", clip, "--model", tiny_detr, "--json", tmp_path / "a.json")
    assert done.returncode == 1
    assert len(read_json(tmp_path / "a.json")["images"]) == FRAMES - 1
    lines = done.stderr.splitlines()
    assert "cannot be decoded" in lines[0]
    assert lines[-2] == "1 part of the inputs could not be read:"
    assert lines[-1].strip() == lines[0]


def test_boxes_and_drawings_of_a_turned_video_are_upright(
    detrkit_here: Run, tiny_detr: Path, clip: Path, tmp_path: Path
) -> None:
    set_display_matrix(clip, (0, 1, -1, 0), SIZE)
    options = ["--json", tmp_path / "a.json", "--save-dir", tmp_path / "drawn"]
    assert detrkit_here("detect", clip, "--model", tiny_detr, *options).returncode == 0
    image = read_json(tmp_path / "a.json")["images"][0]
    assert (image["width"], image["height"]) == SIZE[::-1]
    assert next(read_video(tmp_path / "drawn" / "clip.mp4")).image.size == SIZE[::-1]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_animations_come_out_like_videos(
    detrkit_here: Run, tiny_detr: Path, tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("trackers")
    frames = panned(make_picture(200, 64), SIZE, frames=4)
    path = tmp_path / f"a{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 250, 100, 100])
    out, counts = tmp_path / "a.json", tmp_path / "counts.csv"
    command = ["detect", path, "--model", tiny_detr, "-t", 0.1, "--frames", "all", "--track"]
    done = detrkit_here(*command, "--json", out, "--counts", counts)
    assert done.returncode == 0, done.stderr
    document = read_json(out)
    assert document["videos"] == [{"id": 1, "file_name": path.name}]
    images = document["images"]
    assert [image["video_id"] for image in images] == [1] * 4
    assert [image["frame_index"] for image in images] == [0, 1, 2, 3]
    assert [image["timestamp"] for image in images] == pytest.approx([0, 0.1, 0.35, 0.45])
    assert all("track_id" in found for found in document["annotations"] if found["image_id"] == 1)
    assert [row["frame_index"] for row in read_csv(counts)] == ["0", "1", "2", "3"]


def test_an_animation_is_followed_on_when_its_run_is_resumed(
    detrkit_here: Run, tiny_detr: Path, animation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackers")
    from detrkit.results.record import Record

    command = ["detect", animation, "--model", tiny_detr, "-t", 0.1, "--frames", "all", "--track", "--json"]
    assert detrkit_here(*command, tmp_path / "whole.json").returncode == 0
    add = Record.add

    def add_two(record: Record, position: int, detections: object) -> None:
        if len(record.done) == 2:
            raise KeyboardInterrupt
        add(record, position, detections)

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", add_two)
        assert detrkit_here(*command, tmp_path / "parts.json").returncode == 130
    assert detrkit_here(*command, tmp_path / "parts.json", "--resume").returncode == 0
    assert (tmp_path / "parts.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_camera_ends_with_ctrl_c_and_its_results_are_complete(
    detrkit_here: Run, tiny_detr: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = video.open_container

    def camera(source: str, limits: object):
        return opened(str(clip) if source == "7" else source, limits)

    def two(frames):
        for number, frame in enumerate(frames):
            if number == 2:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(video, "open_container", camera)
    monkeypatch.setattr(video, "newest", two)
    out = tmp_path / "a.json"
    done = detrkit_here("detect", "7", "--model", tiny_detr, "--json", out, "--save-dir", tmp_path / "drawn")
    assert done.returncode == 0, done.stderr
    assert "Stopped after" in done.stderr
    names = [image["file_name"] for image in read_json(out)["images"]]
    assert names[0] == "camera-7#frame=1"
    assert frame_count(tmp_path / "drawn" / "camera-7.mkv") == len(names)
    assert not list(tmp_path.glob("*.unfinished.jsonl"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{photo}", "--track"], "--track follows objects through a video"),
        (["{photo}", "--every", "2"], "--every is for videos"),
        (["{clip}", "--ray"], "--ray reads images only"),
        (["5", "{clip}"], "does not end"),
        (["{text}"], "cannot be opened as a video"),
        (["rtsp://user:secret@127.0.0.1/a"], "not on the public internet"),
        (["{clip}", "--save-dir", "{folder}"], "overwrite the input"),
        (["{clip}", "--max-pixels", "100"], "exceeds 100 pixels"),
    ],
)
def test_mistakes_are_one_line(
    detrkit_here: Run,
    tiny_detr: Path,
    clip: Path,
    pictures: list[Path],
    arguments: list[str],
    said: str,
) -> None:
    text = clip.with_name("text.mp4")
    text.write_text("no video")
    names = {"photo": pictures[0], "clip": clip, "text": text, "folder": clip.parent}
    done = detrkit_here("detect", *(part.format(**names) for part in arguments), "--model", tiny_detr)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert said in done.stderr
    assert "secret" not in done.stderr


def test_drawn_videos_are_replaced_only_if_detrkit_wrote_them(
    detrkit_here: Run, tiny_detr: Path, clip: Path, tmp_path: Path
) -> None:
    command = ["detect", clip, "--model", tiny_detr, "--save-dir", tmp_path / "drawn"]
    for _ in range(2):
        assert detrkit_here(*command).returncode == 0
    (tmp_path / "drawn" / "clip.mp4").write_bytes(clip.read_bytes())
    done = detrkit_here(*command)
    assert done.returncode == 2
    assert "clip.mp4, which detrkit did not write" in done.stderr


def test_names_of_drawn_videos_take_any_sound() -> None:
    from detrkit.cli.output import drawing_names

    inputs = [ImageInput(name, video=True) for name in ("a.MOV", "a.avi", "b.webm", "rtsp://h/s")]
    assert drawing_names(inputs) == ["a.MOV", "a.mkv", "b.mkv", "s.mkv"]
