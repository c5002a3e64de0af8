"""Animations and pages on the command line, and images that a model does not take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit.cli.reading import ImageReader
from detrkit.errors import ImageError
from detrkit.inference.inputs import ImageInput, every_frame, file_names
from tests.cli.conftest import Run
from tests.conftest import make_picture, read_json


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    pages = [make_picture(60 + 10 * seed, 40, seed) for seed in range(3)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    make_picture(50, 50).save(tmp_path / "photo.png")
    return tmp_path / "stack.tif"


def test_all_pages_are_images_of_their_own(
    detrkit_here: Run, tiny_detr: Path, stack: Path, tmp_path: Path
) -> None:
    out, drawings = tmp_path / "out.json", tmp_path / "drawings"
    named = [stack, stack.with_name("photo.png"), "--model", tiny_detr, "--json", out]
    done = detrkit_here("detect", *named, "--frames", "all", "--save-dir", drawings)
    assert done.returncode == 0, done.stderr
    images = read_json(out)["images"]
    wanted = [f"stack.tif#frame={number}" for number in (1, 2, 3)]
    assert [image["file_name"] for image in images] == [*wanted, "photo.png"]
    assert [image["width"] for image in images] == [60, 70, 80, 50]
    assert sorted(Image.open(path).width for path in drawings.iterdir()) == [50, 60, 70, 80]
    assert "frames" not in done.stderr


def test_otherwise_the_others_are_told_of(
    detrkit_here: Run, tiny_detr: Path, stack: Path, tmp_path: Path
) -> None:
    done = detrkit_here("detect", stack, "--model", tiny_detr, "--json", tmp_path / "out.json")
    assert done.returncode == 0
    assert [image["file_name"] for image in read_json(tmp_path / "out.json")["images"]] == ["stack.tif"]


def test_frames_are_named_apart_and_what_cannot_be_read_stays_one(stack: Path) -> None:
    found = every_frame([ImageInput(str(stack)), ImageInput("gone.gif")])
    assert [item.frame for item in found] == [0, 1, 2, None]
    assert len(set(file_names(found))) == 4


def test_an_image_that_the_model_does_not_take_is_one_line_and_the_others_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, width in enumerate((10, 20, 30, 40, 50)):
        Image.new("RGB", (width, 9)).save(tmp_path / f"{number}.png")
    reader = ImageReader([ImageInput(str(tmp_path / f"{number}.png")) for number in range(5)])

    class Found:
        def __init__(self, width: int) -> None:
            self.width, self.source = width, None

    def stream(images):
        ahead = []
        for image in images:
            ahead.append(image)
            if len(ahead) == 2:  # as a batch that was read ahead
                yield from map(run, ahead)
                ahead = []
        yield from map(run, ahead)

    def run(image):
        if image.width in (20, 50):
            raise ImageError("too strange")
        return Found(image.width)

    found = [(position, result.width) for position, _, result in reader.results(stream, "Detecting")]
    assert found == [(0, 10), (2, 30), (3, 40)]
    assert [Path(line.split(":")[0]).name for line in reader.failures] == ["1.png", "4.png"]
    assert capsys.readouterr().err.count("too strange") == 2


def test_pages_are_read_as_they_are_stored(stack: Path) -> None:
    reader = ImageReader(every_frame([ImageInput(str(stack))]))
    reader.todo = [0, 2]
    for (position, page), seed in zip(reader, (0, 2)):
        assert (position, page.index, page.timestamp) == (seed, seed, None)
        np.testing.assert_array_equal(
            np.asarray(page.image), np.asarray(make_picture(60 + 10 * seed, 40, seed))
        )
