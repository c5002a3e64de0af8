import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detrkit.processing.resize import (
    independent_parts,
    normalize_size,
    pillow_filter,
    resize_image,
    resize_part,
    resize_real,
    resized_size,
    size_for,
)

edges = st.integers(1, 5000)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((283, 640), (589, 1332)),  # Transformers: 589 x 1333
        ((800, 1000), (800, 1000)),
        ((500, 500), (800, 800)),
        ((1, 1), (800, 800)),
    ],
)
def test_the_originals_sizes(old, new):
    assert resized_size(*old, 800, 1333) == new


@given(edges, edges, st.integers(1, 1500), st.integers(1, 2000))
def test_a_resized_image_has_at_least_one_pixel_each_way(height, width, shortest, longest):
    assert min(resized_size(height, width, shortest, longest)) >= 1


@given(edges, edges, st.integers(1, 1500))
def test_without_a_limit_the_shorter_edge_is_met(height, width, shortest):
    assert min(resized_size(height, width, shortest)) == shortest


@given(edges, edges)
def test_turning_the_image_turns_the_size(height, width):
    assert resized_size(width, height, 800, 1333) == resized_size(height, width, 800, 1333)[::-1]


@given(st.integers(32, 5000), st.integers(32, 5000))
def test_the_limit_is_exceeded_by_the_rounding_of_the_shorter_edge_only(height, width):
    short, long = sorted(resized_size(height, width, 800, 1333))
    assert short <= 800
    assert long <= 1333 + 0.5 * max(height, width) / min(height, width) + 1


def test_an_image_too_long_for_the_rule_keeps_one_pixel():
    assert resized_size(1, 10000, 800, 1333) == (1, 1333)
    assert resized_size(10000, 1, 800, 1333) == (1333, 1)


@pytest.mark.parametrize(
    ("given_size", "max_size", "expected"),
    [
        (None, None, {"shortest_edge": 800, "longest_edge": 1333}),
        (None, 1000, {"shortest_edge": 800, "longest_edge": 1000}),
        (600, None, {"shortest_edge": 600, "longest_edge": 1333}),
        (600, 900, {"shortest_edge": 600, "longest_edge": 900}),
        ({"shortest_edge": 600}, None, {"shortest_edge": 600}),
        ({"shortest_edge": 600}, 900, {"shortest_edge": 600, "longest_edge": 900}),
        ((480, 640), None, {"height": 480, "width": 640}),
        ({"height": 480, "width": 640, "longest_edge": None}, None, {"height": 480, "width": 640}),
        ({"max_height": 480, "max_width": 640}, None, {"max_height": 480, "max_width": 640}),
    ],
)
def test_every_form_of_the_size(given_size, max_size, expected):
    assert normalize_size(given_size, max_size) == expected


@pytest.mark.parametrize(
    "size", ["800", {"height": 3}, {"shortest": 800}, {}, (1, 2, 3), 0, {"shortest_edge": -1}]
)
def test_a_size_that_is_not_understood_is_named(size):
    with pytest.raises(ValueError, match=r"size="):
        normalize_size(size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"max_height": 100, "max_width": 100}, (100, 50)),
        ({"max_height": 300, "max_width": 100}, (200, 100)),
        ({"height": 7, "width": 9}, (7, 9)),
        ({"longest_edge": 100}, (100, 50)),
        ({"shortest_edge": 50}, (100, 50)),
    ],
)
def test_sizes_for_an_image_of_200_by_100(size, expected):
    assert size_for(200, 100, size) == expected


@pytest.mark.parametrize(
    ("old", "new"), [((1066, 800), (800, 600)), ((333, 500), (533, 800)), ((9, 7), (800, 622))]
)
def test_a_longest_edge_alone_is_met_and_the_other_edge_rounded_as_table_transformer_does(old, new):
    assert size_for(*old, {"longest_edge": 800}) == new


@pytest.mark.parametrize(
    "size",
    [
        {"longest_edge": 10},
        {"shortest_edge": 1, "longest_edge": 10},
        {"max_height": 10, "max_width": 10},
    ],
)
def test_every_form_of_the_size_leaves_a_thin_image_one_pixel(size):
    assert size_for(1, 1000, size) == (1, 10)
    assert size_for(1000, 1, size) == (10, 1)


def test_filters_by_number_and_by_torchvisions_name():
    assert pillow_filter(3) is PIL.Image.Resampling.BICUBIC
    assert pillow_filter("bilinear") is PIL.Image.Resampling.BILINEAR
    assert pillow_filter("nearest-exact") is PIL.Image.Resampling.NEAREST
    with pytest.raises(ValueError, match="resample=77"):
        pillow_filter(77)


@pytest.mark.parametrize("resample", [2, 3, 1])
@pytest.mark.parametrize("size", [(40, 50), (11, 13)])
def test_real_numbers_are_resized_as_bytes_are_up_to_rounding(size, resample):
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 180, (3, 23, 31)).astype(np.float32)
    image = PIL.Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))
    expected = np.asarray(resize_image(image, *size, resample)).transpose(2, 0, 1)
    difference = resize_real(pixels, *size, resample) - expected
    assert np.abs(difference).max() < 1.5
    assert abs(difference.mean()) < 0.1


def noise(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


@settings(max_examples=150)
@given(*(st.integers(1, 300) for _ in range(4)), st.integers(1, 9))
def test_parts_resized_on_their_own_are_those_of_the_whole(height, width, new_height, new_width, count):
    image = noise(height, width)
    expected = np.asarray(image.resize((new_width, new_height), PIL.Image.Resampling.BILINEAR))
    found = np.full_like(expected, 77)
    covered = np.zeros(expected.shape[:2], dtype=int)
    for part in independent_parts(image, new_height, new_width, count):
        top, left, bottom, right = part
        found[top:bottom, left:right] = np.asarray(resize_part(image, new_height, new_width, part))
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("old", "new", "count", "expected"),
    [
        ((480, 640), (800, 1066), 2, [(0, 0, 400, 1066), (400, 0, 800, 1066)]),
        ((480, 640), (800, 1066), 1, [(0, 0, 800, 1066)]),
        ((640, 427), (1199, 800), 3, [(0, 0, 1199, 400), (0, 400, 1199, 800)]),
        ((30, 30), (45, 45), 2, [(0, 0, 45, 45)]),  # odd numbers have no exact middle
        ((480, 640), (480, 640), 2, [(0, 0, 480, 640)]),
        ((480, 640), (400, 800), 2, [(0, 0, 400, 800)]),  # Pillow may go along the columns first
    ],
)
def test_where_an_image_can_be_split(old, new, count, expected):
    assert independent_parts(noise(*old), *new, count) == expected


def test_other_filters_are_not_split():
    assert independent_parts(noise(20, 20), 40, 40, 2, resample=3) == [(0, 0, 40, 40)]


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(22, 335, (88, 1333)), (335, 22, (1333, 88)), (480, 640, (800, 1066))]
)
def test_a_thin_image_fits_a_fixed_padding_of_its_longest_edge(height, width, expected):
    size = {"shortest_edge": 800, "longest_edge": 1333}
    assert size_for(height, width, size, (1333, 1333)) == expected
    assert size_for(22, 335, size) == (88, 1340), "the original's rule without padding"
    assert size_for(22, 335, size, (1000, 1000)) == (88, 1340), "a padding that is too small stays an error"
