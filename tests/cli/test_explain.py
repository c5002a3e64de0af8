"""``detrkit explain``: which pictures are written, and what is said when there is nothing to draw."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import Detector
from detrkit.attention.drawing import draw_attention, draw_panels
from detrkit.attention.maps import decoder_attention, encoder_attention
from detrkit.inference.prepared import read_image
from tests.cli.conftest import Run


@pytest.mark.parametrize("model", ["tiny_detr", "tiny_deformable_detr"])
def test_it_draws_what_python_draws(
    detrkit_here: Run, model: str, pictures: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, out = request.getfixturevalue(model), tmp_path / "new" / "out"
    done = detrkit_here(
        "explain",
        pictures[0],
        "-m",
        folder,
        "-t",
        0.3,
        "--detections",
        3,
        "--save-dir",
        out,
        "--device",
        "cpu",
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"2 drawings: {out}/wide_decoder.png, {out}/wide_encoder.png.\n"
    assert sorted(path.name for path in out.iterdir()) == ["wide_decoder.png", "wide_encoder.png"]
    detector, picture = Detector.from_pretrained(folder, device="cpu"), read_image(pictures[0])
    attention = decoder_attention(detector, picture, 0.3)[:3]
    expected = {
        "decoder": draw_attention(picture, attention),
        "encoder": draw_panels(picture, encoder_attention(detector, picture, attention.points)),
    }
    for part, drawing in expected.items():
        with Image.open(out / f"wide_{part}.png") as written:
            np.testing.assert_allclose(np.asarray(written), np.asarray(drawing), atol=2)  # of 255


def test_points_and_queries_are_drawn_without_any_object(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (pictures[0].parent / "broken.jpg").write_bytes(b"no image")
    done = detrkit_here(
        *("explain", pictures[0], "-m", tiny_detr, "-t", 1, "--save-dir", out),
        *("--point", "3,4", "--point", "60.5,20", "--queries", pictures[0].parent, "--batch-size", 2),
    )
    assert done.returncode == 1
    assert sorted(path.name for path in out.iterdir()) == ["wide_encoder.png", "wide_queries.png"]
    assert Image.open(out / "wide_encoder.png").size in {(248, 80), (120, 168)}
    lines = done.stderr.splitlines()
    assert lines[0].startswith("no object scores above 1: the best score is 0.")
    assert "broken.jpg" in lines[1]
    assert lines[2:] == [
        f"2 drawings: {out}/wide_encoder.png, {out}/wide_queries.png.",
        "1 of 5 images of --queries could not be read.",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--point", "3;4"], "--point must be X,Y in pixels"),
        (["--point", "130,4"], "the point 130,4 is outside the image, which is 120 pixels wide"),
        (["--threshold", "1"], "lower the threshold"),
        (["--layer", "5"], "decoder layer 5 does not exist"),
        (["--queries", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "detr-resnet-5O"], "detr-resnet-50"),
    ],
)
def test_a_mistake_gives_one_line_and_status_2(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "out"
    done = detrkit_here("explain", pictures[0], "--model", tiny_detr, "--save-dir", out, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not out.exists()


def test_the_image_and_the_place_for_pictures_are_checked(
    detrkit_here: Run, tiny_detr: Path, pictures: list[Path], tmp_path: Path
) -> None:
    done = detrkit_here("explain", "nowhere.jpg", "--model", tiny_detr, "--save-dir", tmp_path)
    assert done.returncode == 2
    assert "nowhere.jpg" in done.stderr
    done = detrkit_here("explain", pictures[0], "--model", tiny_detr, "--save-dir", pictures[1])
    assert done.returncode == 2
    assert "--save-dir must be a folder" in done.stderr


def test_a_dash_reads_the_image_from_standard_input(
    detrkit_here: Run, tmp_path: Path, tiny_detr: Path, pictures: list[Path]
) -> None:
    before = os.dup(0)
    with pictures[0].open("rb") as file:
        os.dup2(file.fileno(), 0)
    try:
        done = detrkit_here(
            "explain", "-", "--model", tiny_detr, "--save-dir", tmp_path / "out", "--point", "5,5"
        )
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert done.returncode == 0, done.stderr
    assert "stdin_encoder.png" in [path.name for path in (tmp_path / "out").iterdir()]
