"""Names in any script on drawings."""

import logging

import numpy as np
import pytest
from PIL import Image

from detrkit.results import drawing, fonts

NAMES = [
    ("Объект", "Яблоко"),
    ("细胞", "血液"),
    ("łoś", "ńoź"),
    ("خلية", "كرية"),
    ("a\nb", "a\tb"),
    ("\ud800", "\ud801"),
]


def drawn(name):
    picture = Image.new("RGB", (500, 200))
    return np.asarray(drawing.draw_boxes(picture, [[20, 80, 480, 180]], [name], font_size=24))


@pytest.fixture
def no_fonts(monkeypatch):
    """A computer without fonts of its own."""
    monkeypatch.setattr(fonts, "_system_fonts", tuple)
    fonts.font_file.cache_clear()
    fonts._warn.cache_clear()
    yield
    fonts.font_file.cache_clear()
    fonts._warn.cache_clear()


@pytest.mark.parametrize(("first", "second"), NAMES)
def test_different_names_look_different(first, second):
    assert (drawn(first) != drawn(second)).any()


@pytest.mark.parametrize(("first", "second"), NAMES)
def test_names_that_no_font_has_look_different_and_are_told_of(first, second, no_fonts, caplog):
    with caplog.at_level(logging.WARNING, "detrkit"):
        assert (drawn(first) != drawn(second)).any()
    assert len(caplog.records) == len({r.getMessage() for r in caplog.records}) > 0


def test_the_warning_names_the_script(no_fonts, caplog):
    with caplog.at_level(logging.WARNING, "detrkit"):
        assert fonts.legible("Объ-1") == "\\u041e\\u0431\\u044a-1"
    assert "Cyrillic" in caplog.text


def test_a_font_that_has_the_letters_is_found(monkeypatch, tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    asked = []

    def has(path, letter):
        asked.append(path)
        return path == "good.ttf"

    monkeypatch.setattr(fonts, "_has", has)
    monkeypatch.setattr(
        fonts, "_system_fonts", lambda: (str(tmp_path / "broken.ttf"), "good.ttf", "later.ttf")
    )
    fonts.font_file.cache_clear()
    assert fonts.font_file("细") == "good.ttf"
    assert "later.ttf" not in asked
    fonts.font_file.cache_clear()


def test_files_that_are_no_fonts_have_no_letters(tmp_path):
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert not fonts._has(str(tmp_path / "broken.ttf"), "a")


def test_latin_names_need_no_font_of_the_system(monkeypatch):
    monkeypatch.setattr(fonts, "_system_fonts", lambda: pytest.fail("looked for fonts"))
    assert fonts.font_file("Traffic light 0.99") is None
    assert fonts.legible("Traffic light 0.99") == "Traffic light 0.99"
