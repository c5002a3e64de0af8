"""Frames of videos: which there are, when they are shown, upright, and in spite of damage."""

from __future__ import annotations

import builtins
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from detrkit import Detector, ImageLimits
from detrkit.errors import DetrkitError, ImageError, MissingExtraError, SettingError
from detrkit.inference.batching import newest
from detrkit.inference.inputs import find_images
from detrkit.inference.video_names import is_camera, is_live, is_video
from tests.clips import FRAMES, damage_packet, frame_count, panned, set_display_matrix, write_clip
from tests.conftest import make_picture

pytest.importorskip("av")
from detrkit.inference.video import Video, read_video
from detrkit.inference.video_writer import VideoWriter

SIZE = (96, 64)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_clip(tmp_path / "clip.mp4", panned(make_picture(200, 64), SIZE))


def close(one: Image.Image, other: Image.Image) -> bool:
    """Whether two frames are the same but for what a codec loses."""
    difference = np.asarray(one, np.float32) - np.asarray(other, np.float32)
    return one.size == other.size and float(np.abs(difference).mean()) < 8


# Reading


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("b.avi", "mpeg4"), ("c.mkv", "libx264")])
def test_every_frame_comes_with_its_index_and_time(tmp_path: Path, name: str, codec: str) -> None:
    wanted = panned(make_picture(200, 64), SIZE)
    found = list(read_video(write_clip(tmp_path / name, wanted, codec=codec)))
    assert [frame.index for frame in found] == list(range(FRAMES))
    assert [frame.timestamp for frame in found] == pytest.approx([i / 10 for i in range(FRAMES)], abs=1e-3)
    assert all(close(frame.image, image) for frame, image in zip(found, wanted))


def test_times_are_those_of_the_file_where_the_rate_varies(tmp_path: Path) -> None:
    times = [0, 40, 300, 320, 900]
    path = write_clip(tmp_path / "a.mkv", panned(make_picture(200, 64), SIZE, frames=5), times=times)
    assert [frame.timestamp for frame in read_video(path)] == pytest.approx([t / 1000 for t in times])


def test_a_file_without_a_duration_is_read_to_its_end(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mjpeg", panned(make_picture(200, 64), SIZE), codec="mjpeg")
    assert len(list(read_video(path))) == FRAMES


def test_of_every_nth_frame_the_indices_stay_those_of_the_file(clip: Path) -> None:
    assert [frame.index for frame in read_video(clip, every=5)] == [0, 5, 10]
    for every in (0, 1.5, True):
        with pytest.raises(SettingError, match="every"):
            read_video(clip, every=every)


TURNS = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
}


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_of_a_turned_video_are_upright(clip: Path, matrix: tuple[int, ...]) -> None:
    stored = [frame.image for frame in read_video(clip)]
    set_display_matrix(clip, matrix, SIZE)
    for frame, image in zip(read_video(clip), stored, strict=True):
        np.testing.assert_array_equal(np.asarray(frame.image), np.asarray(image.transpose(TURNS[matrix])))


def test_a_video_at_an_odd_angle_is_left_as_stored_with_a_warning(
    clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_display_matrix(clip, (0.7, 0.7, -0.7, 0.7), SIZE)
    assert [frame.image.size for frame in read_video(clip)] == [SIZE] * FRAMES
    assert [record.message.count("odd angle") for record in caplog.records] == [1]


@pytest.mark.parametrize("number", [3, 5, 11])
def test_a_damaged_frame_is_left_out_and_named(
    clip: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    damage_packet(clip, number)
    found = list(read_video(clip))
    indices = [frame.index for frame in found]
    assert len(indices) == FRAMES - 1
    assert [frame.timestamp for frame in found] == pytest.approx([index / 10 for index in indices])
    [missing] = set(range(FRAMES)) - set(indices)
    [record] = (record for record in caplog.records if record.name == "detrkit")  # FFmpeg's may be there too
    assert f"frame {missing + 1} cannot be decoded" in record.message


def test_a_video_that_ends_early_gives_what_is_there_and_says_so(
    clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = clip.read_bytes()
    clip.write_bytes(content[:-600])
    found = list(read_video(clip))
    assert 0 < len(found) < FRAMES
    assert any("ends early" in record.message for record in caplog.records)


# What is refused


def test_what_is_no_video_is_one_clear_error(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    # A playlist would have us open what it names.
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n"
    (tmp_path / "playlist.mp4").write_text(playlist)
    for name in ("text.mp4", "playlist.mp4"):
        with pytest.raises(ImageError, match=rf"{name}: cannot be opened as a video"):
            list(read_video(tmp_path / name))
    with pytest.raises(ImageError, match="no such file"):
        list(read_video(tmp_path / "gone.mp4"))
    with pytest.raises(ImageError, match=r"no camera at|cameras|cannot be opened"):
        list(read_video("97"))


def test_frames_keep_to_the_limits(clip: Path) -> None:
    with pytest.raises(ImageError, match="96x64 exceeds 100 pixels"):
        list(read_video(clip, limits=ImageLimits(max_pixels=100)))


@pytest.mark.parametrize("size", [(32, 32), (640, 16), (16, 640)])
def test_frames_of_exactly_the_limit_are_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    path = write_clip(tmp_path / "a.mp4", [make_picture(*size)] * 2, codec="mpeg4")  # holds rows at its edges
    assert len(list(read_video(path, limits=ImageLimits(max_pixels=size[0] * size[1])))) == 2


@pytest.mark.parametrize(
    "address", ["rtsp://127.0.0.1/a", "rtsp://user:secret@[::1]:8554/a", "http://10.0.0.1/a.mp4"]
)
def test_private_addresses_are_refused_and_passwords_not_repeated(address: str) -> None:
    with pytest.raises(ImageError, match="not on the public internet") as error:
        list(read_video(address))
    assert "secret" not in str(error.value)


def test_without_pyav_the_error_names_the_extra(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        if name == "av":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"\.\[video\]"):
        list(read_video(clip))


# In a detector


def test_a_detector_streams_frames_and_its_results_know_them(clip: Path, tiny_detr: Path) -> None:
    detector = Detector.from_pretrained(tiny_detr, device="cpu")
    found = list(detector.stream(read_video(clip, every=4), 0, 2))
    assert [one.frame_index for one in found] == [0, 4, 8]
    assert [one.timestamp for one in found] == pytest.approx([0, 0.4, 0.8])
    assert {one.source for one in found} == {str(clip)}
    assert found[1][:2].frame_index == 4
    assert found[1].to_rows()[0]["frame_index"] == 4
    frames = list(read_video(clip, every=4))
    np.testing.assert_array_equal(found[2].boxes, detector(frames[2].image, 0).boxes)
    tiled = list(detector.stream(read_video(clip, every=4), 0, tiles=48))
    assert [(one.frame_index, one.source) for one in tiled] == [(n, str(clip)) for n in (0, 4, 8)]
    with pytest.raises(ImageError, match=r"draw\(\)"):
        found[0].draw()
    assert found[0].draw(frames[0]).size == SIZE


def test_frames_are_decoded_as_they_are_needed(tmp_path: Path, tiny_detr: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", panned(make_picture(500, 64), SIZE, step=2, frames=150))
    read = []

    def frames():
        for frame in read_video(path):
            read.append(frame.index)
            yield frame

    results = Detector.from_pretrained(tiny_detr, device="cpu").stream(frames(), 0, 2)
    next(results)
    assert len(read) < 40
    results.close()


def test_of_a_live_source_the_newest_item_is_given() -> None:
    more, made = threading.Event(), threading.Event()

    def items():
        yield 0
        assert more.wait(60)
        yield from range(1, 10)
        made.set()

    found = newest(items())
    assert next(found) == 0
    more.set()
    assert made.wait(60)
    assert list(found)[-1] == 9
    with pytest.raises(DetrkitError, match="cable"):
        list(newest(_broken()))


def _broken():
    yield 1
    raise DetrkitError("the cable is loose")


# Writing


def test_a_written_video_has_the_frames_times_and_sound_of_its_source(tmp_path: Path) -> None:
    import av

    frames = panned(make_picture(200, 64), SIZE)
    times = [70 * i + (30 if i % 2 else 0) for i in range(FRAMES)]
    source = write_clip(tmp_path / "a.mp4", frames, times=times, sound=True)
    writer = VideoWriter(tmp_path / "drawn.mp4", str(source), ImageLimits())
    for frame in read_video(source):
        image = frame.image.copy()
        ImageDraw.Draw(image).rectangle((0, 0, 20, 20), fill=(255, 0, 0))
        writer.write(image, frame.index, frame.timestamp)
    assert not (tmp_path / "drawn.mp4").exists()
    writer.finish(whole=True)
    found = list(read_video(tmp_path / "drawn.mp4"))
    assert [frame.timestamp for frame in found] == pytest.approx([time / 1000 for time in times], abs=1e-3)
    assert np.asarray(found[5].image)[5:15, 5:15, 0].mean() > 180
    sound = []
    for path in (source, tmp_path / "drawn.mp4"):
        with av.open(str(path)) as container:
            sound.append([bytes(p) for p in container.demux(audio=0) if p.size and p.pts >= 0])
    assert sound[0] == sound[1]
    assert len(sound[0]) > 5


@pytest.mark.parametrize("size", [(95, 64), (33, 31)])
def test_a_written_video_has_any_size(tmp_path: Path, clip: Path, size: tuple[int, int]) -> None:
    writer = VideoWriter(tmp_path / "drawn.mkv", str(clip), ImageLimits())
    for index in range(3):
        writer.write(make_picture(*size, seed=index), index, None)
    writer.finish(whole=True)
    assert [frame.image.size for frame in read_video(tmp_path / "drawn.mkv")] == [size] * 3


def test_a_discarded_video_leaves_nothing(tmp_path: Path, clip: Path) -> None:
    writer = VideoWriter(tmp_path / "out" / "drawn.mp4", str(clip), ImageLimits())
    writer.write(make_picture(*SIZE), 0, 0.0)
    writer.discard()
    assert list((tmp_path / "out").iterdir()) == []


# Names


def test_videos_are_known_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    videos = ["a.MP4", "dir/b.webm", "https://h/c.mov?x=1", "rtsp://h/d", "0"]
    assert [is_video(name) for name in videos] == [True] * 5
    assert [is_live(name) for name in videos] == [False, False, False, True, True]
    assert not any(map(is_video, ["a.jpg", "https://h/mp4", "video", "123", "-1"]))
    (tmp_path / "0").write_bytes(b"")
    assert not is_camera("0")


def test_videos_in_a_folder_are_left_out_with_a_warning(
    tmp_path: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_picture(20, 20).save(tmp_path / "a.png")
    found, mistakes = find_images(
        [str(tmp_path), str(clip), "rtsp://user:secret@h/stream?x=1", "5"], videos=True
    )
    assert ([item.video for item in found], mistakes) == ([False, True, True, True], [])
    assert [item.base_name for item in found] == ["a.png", "clip.mp4", "stream", "camera-5"]
    assert "clip.mp4" in caplog.records[0].message
    _, mistakes = find_images(["5"])
    assert mistakes == ["5: no such file or folder"]


def test_the_length_of_a_video_is_known_before_it_is_read(clip: Path) -> None:
    with Video(str(clip)) as video:
        assert (video.length, video.rate) == (FRAMES, 10)
    assert frame_count(clip) == FRAMES
