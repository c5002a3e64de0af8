from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detrkit.results import drawing
from detrkit.results.drawing import class_color, draw_boxes, draw_segments, segment_colors


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    """(height, width) True where the picture is not as before."""
    return (np.asarray(before.convert("RGB")) != np.asarray(after)).any(-1)


def test_the_outline_runs_along_the_box_and_leaves_its_inside_alone() -> None:
    picture = Image.new("RGB", (200, 100))
    drawn = draw_boxes(picture, [[20, 10, 80, 60]], colors=[(255, 0, 0)], line_width=2)
    red = changed(picture, drawn)
    assert red[10:60, 20:80].sum() == red.sum() > 0
    assert red[10:12, 20:80].all()
    assert red[58:60, 20:80].all()
    assert red[10:60, 20:22].all()
    assert red[10:60, 78:80].all()
    assert not red[12:58, 22:78].any()
    assert drawn.getpixel((20, 10)) == (255, 0, 0)


def test_the_given_picture_stays_as_it_is() -> None:
    for mode in ("RGB", "L", "RGBA", "P"):
        picture = Image.new(mode, (64, 48))
        before = picture.tobytes()
        drawn = draw_boxes(picture, [[5, 5, 40, 40]], ["cat"])
        assert picture.tobytes() == before
        assert (drawn.mode, drawn.size) == ("RGB", (64, 48))
        assert changed(picture, drawn).any()


@pytest.mark.parametrize(
    "box",
    [
        [-50, -50, -1, -1],
        [300, 10, 400, 20],
        [10, 200, 20, 300],
        [float("nan"), 0, 10, 10],
        [0, 0, float("inf"), 10],
        [50, 50, 40, 60],
    ],
)
def test_boxes_that_cannot_be_seen_are_left_out(box: list[float]) -> None:
    picture = Image.new("RGB", (200, 100))
    drawn = draw_boxes(picture, [box], ["cat"])
    assert not changed(picture, drawn).any()


def test_no_boxes_draw_nothing() -> None:
    picture = Image.new("RGB", (200, 100))
    assert not changed(picture, draw_boxes(picture, [], [])).any()
    assert not changed(picture, draw_boxes(picture, np.zeros((0, 4)))).any()


coordinate = st.floats(-500, 1500)


@settings(max_examples=60)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=8),
    st.text(max_size=20),
)
def test_any_box_and_caption_can_be_drawn_on_any_picture(
    width: int, height: int, boxes: list[tuple[float, ...]], caption: str
) -> None:
    drawn = draw_boxes(Image.new("RGB", (width, height)), boxes, [caption] * len(boxes))
    assert drawn.size == (width, height)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 30, 20),
        (170, 0, 200, 20),
        (0, 80, 30, 100),
        (170, 80, 200, 100),
        (0, 0, 200, 100),
        (-100, -100, 400, 400),
        (199, 99, 205, 110),
    ],
)
def test_captions_stay_whole_inside_the_picture(box: tuple[int, ...]) -> None:
    # A caption's area on a picture that is large enough never depends on where its box is.
    color = (0, 120, 255)

    def caption_area(size: tuple[int, int], box: tuple[int, ...]) -> int:
        picture = Image.new("RGB", size)
        plain = draw_boxes(picture, [box], colors=[color], line_width=1)
        labelled = draw_boxes(picture, [box], ["cat 0.99"], [color], line_width=1, font_size=14)
        return int(changed(plain, labelled).sum())

    free = caption_area((400, 400), (100, 100, 101, 101))
    assert caption_area((200, 100), box) >= 0.9 * free  # it may lie on part of its own outline


def test_captions_do_not_hide_each_other_where_there_is_room() -> None:
    picture = Image.new("RGB", (400, 300))
    boxes = [[100, 100, 200, 200], [104, 102, 198, 197], [108, 104, 195, 195]]
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]

    def background(wanted: list[int]) -> list[int]:
        drawn = np.asarray(
            draw_boxes(
                picture,
                [boxes[i] for i in wanted],
                ["giraffe 0.99"] * len(wanted),
                [colors[i] for i in wanted],
                line_width=1,
                font_size=14,
            )
        )
        return [int((drawn == colors[i]).all(-1).sum()) for i in wanted]

    alone = [background([i])[0] for i in range(3)]
    together = background([0, 1, 2])
    for one, with_others in zip(alone, together):
        assert with_others > 0.75 * one


def test_a_caption_too_long_for_the_picture_gets_a_smaller_font_or_none() -> None:
    long = "a very long name of a class"
    wide, narrow = (
        draw_boxes(Image.new("RGB", (width, 60)), [[2, 30, width - 2, 58]], [long], font_size=20)
        for width in (400, 20)
    )
    assert changed(Image.new("RGB", wide.size), wide)[:29].any()
    assert not changed(Image.new("RGB", narrow.size), narrow)[:29].any()


def test_lines_and_captions_grow_with_the_picture() -> None:
    def share(scale: int) -> float:
        picture = Image.new("RGB", (320 * scale, 240 * scale))
        box = np.array([[60, 60, 200, 180]]) * scale
        return float(changed(picture, draw_boxes(picture, box, ["cat 0.99"])).mean())

    assert share(8) == pytest.approx(share(2), rel=0.35)


def test_small_objects_of_a_large_image_stay_visible() -> None:
    picture = Image.new("RGB", (4000, 4000))
    boxes = [[x, y, x + 96, y + 96] for x in range(100, 3900, 400) for y in range(100, 3900, 400)]
    inside = draw_boxes(picture, boxes, colors=[(255, 0, 0)] * len(boxes)).crop((108, 108, 188, 188))
    assert np.asarray(inside).max() == 0
    captions = draw_boxes(picture, boxes, ["cell"] * len(boxes), [(255, 0, 0)] * len(boxes))
    assert 0 < changed(picture, captions).mean() < 0.03


def test_places_of_captions_are_compared_with_all_that_are_near() -> None:
    rng = np.random.default_rng(0)
    places = [(x, y, x + w, y + h) for x, y, w, h in rng.integers(1, 300, (60, 4)).tolist()]
    taken = drawing._Taken()
    for number, place in enumerate(places):
        assert taken.pixels_in(place) == sum(drawing._overlap(place, other) for other in places[:number])
        taken.add(place)


@pytest.mark.parametrize("what", ["captions", "colors"])
def test_as_many_captions_and_colours_as_boxes_are_needed(what: str) -> None:
    with pytest.raises(ValueError, match=what):
        draw_boxes(Image.new("RGB", (9, 9)), [[0, 0, 5, 5]], **{what: []})


def test_every_class_keeps_its_colour_and_neighbours_differ() -> None:
    colors = [class_color(label) for label in range(91)]
    assert colors == [class_color(label) for label in range(91)]
    assert len(set(colors)) == 91
    for a, b in itertools.pairwise(np.array(colors)):
        assert np.abs(a - b).sum() > 90


# Segments


def two_halves(width: int = 120, height: int = 80) -> np.ndarray:
    ids = np.full((height, width), 5)
    ids[:, : width // 2] = 9
    return ids


def test_segments_are_painted_in_their_colours_with_a_line_between_them() -> None:
    picture = Image.new("RGB", (120, 80), (100, 100, 100))
    drawn = np.asarray(
        draw_segments(picture, two_halves(), [9, 5], colors=[(200, 0, 0), (0, 200, 0)], opacity=0.5)
    )
    assert (drawn[10, 10] == (150, 50, 50)).all()
    assert (drawn[10, 110] == (50, 150, 50)).all()
    assert (drawn[:, 59] == 245).all()
    assert (np.asarray(picture) == 100).all()


def test_ids_that_are_not_named_keep_the_picture() -> None:
    picture = Image.new("RGB", (120, 80), (100, 100, 100))
    drawn = np.asarray(draw_segments(picture, two_halves(), [9]))
    assert (drawn[:, 65:] == 100).all()
    assert (drawn[:, :55] != 100).any()


def test_captions_of_segments_stand_inside_them() -> None:
    picture = Image.new("RGB", (400, 200))
    plain = draw_segments(picture, two_halves(400, 200), [9, 5])
    named = draw_segments(picture, two_halves(400, 200), [9, 5], ["cat", "dog"])
    rows, columns = changed(plain, named).nonzero()
    assert 60 < rows.min() <= rows.max() < 140
    assert set(columns < 198) == {True, False}
    assert not set(range(185, 215)) & set(columns.tolist())


def test_a_caption_that_would_hide_a_larger_segments_is_left_out() -> None:
    ids = np.zeros((100, 200), int)
    ids[40:60, 80:120] = 1
    ids[60:63, 95:105] = 2
    picture = Image.new("RGB", (200, 100))
    one, two = (
        draw_segments(picture, ids, [1, 2], ["everything", name], font_size=20) for name in ("dot", "speck")
    )
    assert not changed(one, two).any()
    assert changed(one, draw_segments(picture, ids, [1, 2])).any()


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (1, 500)])
def test_pictures_too_small_for_captions_are_painted_only(size: tuple[int, int]) -> None:
    drawn = draw_segments(Image.new("RGB", size), np.ones((size[1], size[0]), int), [1], ["a long name"])
    assert drawn.size == size


def test_segments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        draw_segments(Image.new("RGB", (10, 10)), np.zeros((10, 11)), [])
    with pytest.raises(ValueError, match="1 captions for 2 segments"):
        draw_segments(Image.new("RGB", (10, 10)), np.zeros((10, 10)), [1, 2], ["a"])


def test_segments_of_one_class_have_different_tones_of_its_colour() -> None:
    first, second, other, third = segment_colors([17, 17, 3, 17])
    assert first == class_color(17)
    assert other == class_color(3)
    assert len({first, second, third}) == 3
