"""Which images the arguments of a command mean, and what tells a later run that they are the same."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from detrkit.common.limits import ImageLimits
from detrkit.inference.inputs import Fingerprints, ImageInput, find_images, image_ids


def test_images_in_folders_inside_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.jpg", "deeper/b.jpg", "texts/c.txt", ".hidden/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with caplog.at_level(logging.WARNING, "detrkit"):
        images, mistakes = find_images([str(tmp_path)])
    assert ([image.base_name for image in images], mistakes) == (["a.jpg"], [])
    assert [("deeper" in line, "texts" in line) for line in caplog.messages] == [(True, False)]


def test_images_at_any_depth_are_reported_when_they_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "b.jpg").touch()
    with caplog.at_level(logging.WARNING, "detrkit"):
        images, mistakes = find_images([str(tmp_path)])
    assert (images, mistakes) == ([], [f"{tmp_path}: no images in this folder"])
    assert ["deep/er/b.jpg" in line and "--recursive" in line for line in caplog.messages] == [True]


def test_recursive_reads_folders_inside_but_neither_hidden_ones_nor_links(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("b.jpg", "a.jpg", "deep/er/b.jpg", "deep/x.png", ".hidden/d.jpg", "texts/c.txt")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "again").symlink_to(tmp_path)  # followed, it would never end
    with caplog.at_level(logging.WARNING, "detrkit"):
        images, mistakes = find_images([str(tmp_path)], recursive=True)
    found = [str(Path(image.source).relative_to(tmp_path)) for image in images]
    assert found == ["a.jpg", "b.jpg", "deep/x.png", "deep/er/b.jpg"]
    assert (mistakes, caplog.messages) == ([], [])


def test_a_folder_inside_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jpg").touch()
    scan = os.scandir

    def scan_unless_closed(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_unless_closed)
    images, mistakes = find_images([str(tmp_path)], recursive=True)
    assert [image.base_name for image in images] == ["a.jpg"]
    assert mistakes == [f"{tmp_path / 'closed'}: cannot be read: Permission denied"]
    assert find_images([str(tmp_path)])[1] == []


def test_a_dash_is_standard_input() -> None:
    images, mistakes = find_images(["-"], videos=True)
    assert ([image.source for image in images], mistakes) == (["/dev/stdin"], [])


def test_an_image_is_known_by_its_content_or_its_address(tmp_path: Path) -> None:
    for folder, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jpg").write_bytes(content)
    sources = [*(str(tmp_path / folder / "x.jpg") for folder in "abc"), (tmp_path / "a" / "x.jpg").as_uri()]
    sources += [
        "http://example.com/x.jpg",
        "http://example.com/y/x.jpg",
        "/dev/stdin",
        str(tmp_path / "no.jpg"),
    ]
    known = Fingerprints([ImageInput(source) for source in sources], ImageLimits())
    found = [known(position) for position in range(len(sources))]
    assert found[0] == found[2] == found[3] != found[1]
    assert found[4] != found[5]
    assert None not in found[:6]
    assert found[6:] == [None, None]


def test_a_file_that_is_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(2**40)
    assert Fingerprints([ImageInput(str(tmp_path / "x.png"))], ImageLimits())(0) is None


def test_names_of_many_digits_are_no_ids() -> None:
    assert image_ids([ImageInput("000000000139.jpg"), ImageInput("7.jpg")]) == [139, 7]
    assert image_ids([ImageInput(f"{'9' * 5000}.jpg"), ImageInput("7.jpg")]) == [1, 2]
