"""Drawings of attention: the right colours on the right pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from detrkit.attention.drawing import draw_attention, draw_panels, draw_queries, row_color, size_color
from detrkit.attention.maps import Attention, AttentionMaps, AttentionSamples, QueryStatistics
from detrkit.errors import ImageError
from detrkit.results.detections import Detections
from tests.conftest import make_picture

WIDTH, HEIGHT = 90, 60
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def picture() -> Image.Image:
    return make_picture(WIDTH, HEIGHT)


def maps_of(cells: np.ndarray, **about: Any) -> AttentionMaps:
    """Attention with maps (N, height, width) in one head; the rings are far outside."""
    points = np.full((len(cells), 2), -1e4)
    return AttentionMaps(
        weights=cells[:, None].astype(np.float32),
        **{"points": points, "image_size": (HEIGHT, WIDTH), "layer": 0, **about},
    )


def samples_of(*rows: list[tuple[float, float, float]]) -> AttentionSamples:
    """Attention of one head, level and as many points as each row has triples x, y, weight."""
    numbers = np.array(rows, dtype=np.float32)[:, None, None]
    return AttentionSamples(
        weights=numbers[..., 2],
        locations=numbers[..., :2],
        points=np.full((len(rows), 2), -1e4),
        image_size=(HEIGHT, WIDTH),
        layer=0,
    )


def colored(picture: Image.Image) -> np.ndarray:
    """(height, width): which pixels are not grey."""
    pixels = np.asarray(picture).astype(int)
    return np.ptp(pixels, axis=-1) > 2


def one_cell(row: int, column: int) -> np.ndarray:
    cells = np.zeros((4, 6))
    cells[row, column] = 1
    return cells


def test_no_rows_leave_the_faded_image(picture: Image.Image) -> None:
    for attention in (maps_of(np.ones((1, 4, 6))), samples_of([(1, 1, 1)])):
        assert not colored(draw_attention(picture, attention[[]])).any()


def test_a_cell_colours_its_pixels_and_no_others(picture: Image.Image) -> None:
    before = np.asarray(picture).copy()
    drawn = draw_attention(picture, maps_of(one_cell(2, 1)[None]), colors=[RED], opacity=1)
    assert (np.asarray(drawn)[30:45, 15:30] == RED).all()
    expected = np.zeros((HEIGHT, WIDTH), dtype=bool)
    expected[30:45, 15:30] = True
    np.testing.assert_array_equal(colored(drawn), expected)
    np.testing.assert_array_equal(np.asarray(picture), before)


def test_two_rows_have_their_own_colours(picture: Image.Image) -> None:
    cells = np.stack([one_cell(0, 0), 0.1 * one_cell(3, 5)])
    drawn = np.asarray(draw_attention(picture, maps_of(cells), colors=[RED, BLUE], opacity=1))
    assert (drawn[:15, :15] == RED).all()
    assert (drawn[45:, 75:] == BLUE).all()  # each row's strongest cell has its full colour


def test_less_attention_has_less_colour(picture: Image.Image) -> None:
    cells = one_cell(0, 0) + 0.5 * one_cell(0, 2)
    grey = Image.new("L", picture.size, 100)
    drawn = np.asarray(draw_attention(grey, maps_of(cells[None]), colors=[RED], opacity=1)).astype(int)
    nothing, half, full = drawn[5, 80], drawn[5, 35], drawn[5, 5]
    np.testing.assert_allclose(half, (nothing + full) / 2, atol=1)


def test_samples_are_dots_at_their_places(picture: Image.Image) -> None:
    drawn = draw_attention(
        picture, samples_of([(20, 40, 1.0)], [(70, 15, 1.0)]), colors=[RED, BLUE], opacity=1
    )
    pixels = np.asarray(drawn).astype(int)
    for color, (x, y) in ((0, (20, 40)), (2, (70, 15))):
        marked = colored(drawn) & (pixels[..., color] == pixels.max(-1))
        rows, columns = np.nonzero(marked)
        assert len(rows) > 9
        assert abs(columns.mean() + 0.5 - x) < 0.5
        assert abs(rows.mean() + 0.5 - y) < 0.5


def test_heavier_samples_are_larger_and_on_top(picture: Image.Image) -> None:
    apart = colored(draw_attention(picture, samples_of([(20, 40, 1.0), (70, 40, 0.2)]), colors=[RED]))
    assert apart[:, :45].sum() > apart[:, 45:].sum() > 0
    drawn = draw_attention(
        picture, samples_of([(45, 30, 0.9)], [(45, 30, 1.0)]), colors=[RED, BLUE], opacity=1
    )
    assert drawn.getpixel((45, 30)) == BLUE


def test_samples_outside_of_the_image_are_left_out(picture: Image.Image) -> None:
    attention = samples_of([(-500, 20, 0.5), (50, 1e6, 0.5)])
    assert not colored(draw_attention(picture, attention, colors=[RED])).any()


def test_detections_are_drawn_with_their_boxes(picture: Image.Image) -> None:
    found = Detections(
        boxes=np.array([[20, 20, 60, 50]], dtype=np.float32),
        scores=np.array([0.9], dtype=np.float32),
        labels=np.array([1]),
        names=["cat"],
        image_size=(HEIGHT, WIDTH),
    )
    attention = maps_of(np.zeros((1, 4, 6)), detections=found, queries=np.array([3]))
    drawn = draw_attention(picture, attention, colors=[RED], line_width=1)
    assert drawn.getpixel((20, 40)) == drawn.getpixel((40, 49)) == RED
    assert not colored(drawn)[30:45, 25:55].any()


def test_points_are_ringed(picture: Image.Image) -> None:
    attention = maps_of(np.zeros((1, 4, 6)), points=np.array([[30.0, 25.0]]))
    rows, columns = np.nonzero(colored(draw_attention(picture, attention, colors=[RED])))
    assert abs(columns.mean() + 0.5 - 30) < 1
    assert abs(rows.mean() + 0.5 - 25) < 1


def test_panels_stand_side_by_side(picture: Image.Image) -> None:
    attention = maps_of(np.stack([one_cell(row, 0) for row in range(3)]))
    panels = draw_panels(picture, attention, columns=2)
    assert panels.size == (2 * WIDTH + 8, 2 * HEIGHT + 8)
    for place, (left, top) in enumerate([(0, 0), (WIDTH + 8, 0), (0, HEIGHT + 8)]):
        alone = draw_attention(picture, attention[[place]], colors=[row_color(place)])
        np.testing.assert_array_equal(panels.crop((left, top, left + WIDTH, top + HEIGHT)), alone)
    assert draw_panels(picture, attention[:1]).size == picture.size


def test_rows_have_different_colours_that_show_on_a_pale_ground() -> None:
    colors = [row_color(place) for place in range(12)]
    assert len(set(colors)) == 12
    for red, green, blue in colors:
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 137
        assert max(red, green, blue) - min(red, green, blue) > 60


@pytest.mark.parametrize("draw", [draw_attention, draw_panels])
def test_another_picture_is_refused(draw: Any) -> None:
    with pytest.raises(ImageError, match="image of 90x60 pixels, but the image to draw on has 60x90"):
        draw(make_picture(60, 90), maps_of(one_cell(0, 0)[None]))


def test_mistakes_are_named(picture: Image.Image) -> None:
    attention: Attention = maps_of(one_cell(0, 0)[None])
    with pytest.raises(ValueError, match="2 colors for 1 row"):
        draw_attention(picture, attention, colors=[RED, BLUE])
    with pytest.raises(ImageError, match="no object or point was chosen"):
        draw_panels(picture, attention[[]])


def statistics_of(rows: list[tuple[int, tuple[float, ...]]], queries: int = 30) -> QueryStatistics:
    count = len(rows)
    return QueryStatistics(
        queries=np.array([query for query, _ in rows], dtype=np.int64),
        boxes=np.array([box for _, box in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.ones(count, dtype=np.float32),
        labels=np.zeros(count, dtype=np.int64),
        images=np.arange(count),
        image_count=count,
        query_count=queries,
        ranked=False,
    )


def test_queries_are_drawn_where_they_fire() -> None:
    statistics = statistics_of([(4, (0.25, 0.75, 0.05, 0.05)), (7, (0.5, 0.5, 1.0, 0.1))])
    drawn = draw_queries(statistics, [4, 7], side=100)
    side, gap = 100, 8
    head = drawn.height - side - gap
    assert drawn.width == 2 * side + 3 * gap
    for place, (x, y), strongest in ((0, (0.25, 0.75), 1), (1, (0.5, 0.5), 0)):
        left = gap + place * (side + gap)
        square = drawn.crop((left, head, left + side, head + side))
        rows, columns = np.nonzero(colored(square))
        assert abs((columns.mean() + 0.5) / side - x) < 0.02
        assert abs((rows.mean() + 0.5) / side - y) < 0.02
        assert np.argmax(square.getpixel((int(x * side), int(y * side)))) == strongest


def test_by_default_the_busiest_queries_are_drawn() -> None:
    rows = [(query, (0.5, 0.5, 0.1, 0.1)) for query in range(5, 30) for _ in range(query)]
    statistics = statistics_of(rows)
    np.testing.assert_array_equal(
        np.asarray(draw_queries(statistics)), np.asarray(draw_queries(statistics, range(10, 30)))
    )


@pytest.mark.parametrize("queries", [[], [30], [-1]])
def test_queries_that_are_not_there_are_refused(queries: list[int]) -> None:
    with pytest.raises(ImageError, match="from 0 to 29"):
        draw_queries(statistics_of([(0, (0.5, 0.5, 0.1, 0.1))]), queries)


def test_colours_tell_the_size() -> None:
    assert size_color(0, 0) == (0, 225, 0)
    assert size_color(1, 0.0) == (225, 0, 0)
    assert size_color(0.0, 1) == (0, 0, 225)
    assert size_color(1.2, 1) == (225, 0, 225)
    red, green, blue = size_color(0.6, 0.2)
    assert red > green > blue
