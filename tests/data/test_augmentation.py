import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from detrkit.data import augmentation as aug
from detrkit.errors import SettingError
from detrkit.processing.annotations import boxes_of_masks
from detrkit.processing.resize import resize_image, resized_size

SIZE = {"shortest_edge": 48, "longest_edge": 80}
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def example(height, width, boxes):
    """Rectangles of one colour each on black, with their masks; later ones do not cover earlier ones."""
    pixels = np.zeros((height, width, 3), np.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        masks[i, y0:y1, x0:x1] = True
        pixels[y0:y1, x0:x1] = COLOURS[i % 3]
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = {
        "image_id": torch.tensor([4]),
        "class_labels": torch.arange(len(boxes)),
        "boxes": corners,
        "area": (corners[:, 2:] - corners[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor([height, width]),
        "masks": masks,
    }
    return PIL.Image.fromarray(pixels), aug.wrap_target(target)


@st.composite
def examples(draw, most=3):
    height, width = draw(st.integers(30, 90)), draw(st.integers(30, 90))
    boxes = []
    for _ in range(draw(st.integers(0, most))):
        x0, y0 = draw(st.integers(0, width - 2)), draw(st.integers(0, height - 2))
        boxes.append((x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))))
    return example(height, width, boxes)


def mosaic(size):
    window = aug.RandomWindow(size, (0.6, 1.5))
    return lambda image, target: window(*aug.stitch([(image, target)] * 4))


# A mask is resized to the nearest pixel: its edge then lies up to one new pixel off that of the box. The
# original's crop lies between two resizings, of which the second enlarges up to 1 / 0.48 times.
TRANSFORMS = {name: (lambda size, n=name: aug.augmentation(n, size), 1.0) for name in aug.PRESETS}
TRANSFORMS["original"] = (TRANSFORMS["original"][0], 1 + 1 / 0.48)
TRANSFORMS["mosaic"] = (mosaic, 1.0)


@pytest.mark.parametrize("name", TRANSFORMS)
@given(data=examples(), seed=st.integers(0, 2**32))
def test_boxes_masks_and_sizes_stay_together(name, data, seed):
    make, reach = TRANSFORMS[name]
    image, target = data
    with aug.random_state(seed):
        image, target = make(SIZE)(image, target)
    target = aug.unwrap_target(target)
    height, width = target["size"].tolist()
    assert (image.height, image.width) == (height, width)
    assert target["masks"].shape[1:] == (height, width)
    assert len({len(target[key]) for key in aug.PER_OBJECT}) == 1
    assert target["image_id"].tolist() == [4]
    boxes = target["boxes"]
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height]) + 1e-4).all()
    assert torch.allclose(target["area"], (boxes[:, 2:] - boxes[:, :2]).prod(1), rtol=1e-3)
    visible = target["masks"].flatten(1).any(1)
    # A box of a pixel and more in both directions has at least one pixel of its mask.
    assert visible[((boxes[:, 2:] - boxes[:, :2]) > reach).all(1)].all()
    around = boxes_of_masks(target["masks"]) + torch.tensor([0, 0, 1, 1])
    assert ((around - boxes)[visible].abs() <= reach + 1e-3).all()


@pytest.mark.parametrize("transform", ["original", "window", "mosaic"])
@given(seed=st.integers(0, 2**32), transposed=st.booleans())
def test_boxes_lie_where_the_objects_are_in_the_picture(transform, seed, transposed):
    image, target = example(60, 90, [(20, 15, 50, 40)])
    make = {
        "original": lambda: aug.augmentation("original", SIZE),
        "window": lambda: aug.RandomWindow(SIZE, (0.6, 1.5)),
        "mosaic": lambda: mosaic(SIZE),
    }[transform]
    steps = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), make()]
    if transposed:
        steps.insert(0, aug.RandomTranspose())
    with aug.random_state(seed):
        image, target = v2.Compose(steps)(image, target)
    pixels = np.asarray(image).astype(int)
    # Resizing blurs an outline over a pixel or two. The original enlarges its crop up to 1 / 0.48 times after
    # a first resizing, and the blur with it.
    blur = 5 if transform == "original" else 2
    for x0, y0, x1, y1 in target["boxes"].tolist():
        rows = slice(int(y0) + blur + 1, max(0, int(y1) - blur))
        columns = slice(int(x0) + blur + 1, max(0, int(x1) - blur))
        inside = pixels[rows, columns]
        assert (inside == [255, 0, 0]).all()
    red = (pixels[..., 0] > 200) & (pixels[..., 1] < 40)
    for y, x in zip(*red.nonzero()):
        distances = [
            max(x0 - x - 1, x - x1, y0 - y - 1, y - y1) for x0, y0, x1, y1 in target["boxes"].tolist()
        ]
        slivers = transform != "original"  # an object of which a tenth or less shows has no box any more
        assert slivers or min(distances) <= 1


def test_the_original_recipe_has_the_original_sizes():
    recipe = aug.original({"shortest_edge": 800, "longest_edge": 1333})
    choice = recipe.transforms[1]
    plain, cropped = choice.transforms
    scales = [{"shortest_edge": edge, "longest_edge": 1333} for edge in range(480, 801, 32)]
    assert plain.sizes == scales
    first, crop, last = cropped.transforms
    assert first.sizes == [{"shortest_edge": edge} for edge in (400, 500, 600)]
    assert (crop.min_side, crop.max_side) == (384, 600)
    assert last.sizes == scales


def test_the_original_recipe_takes_both_ways_and_all_sizes():
    image, target = example(80, 120, [(10, 10, 60, 60)])
    recipe = aug.augmentation("original", {"shortest_edge": 50, "longest_edge": 200})
    sizes = set()
    for seed in range(200):
        with aug.random_state(seed):
            sizes.add(recipe(image, target)[0].size)
    whole = {resized_size(80, 120, edge, 200)[::-1] for edge in range(30, 51, 2)}
    assert whole < sizes
    assert {min(size) for size in sizes} == set(range(30, 51, 2))


@pytest.mark.parametrize("preset", ["light", "strong", "none"])
@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (33, 200)])
def test_images_come_out_at_their_evaluation_size(preset, height, width):
    image, target = example(height, width, [(1, 1, 20, 20)])
    for seed in range(10):
        with aug.random_state(seed):
            out, _ = aug.augmentation(preset, SIZE)(image, target)
        assert (out.height, out.width) == resized_size(height, width, 48, 80)


@pytest.mark.parametrize(
    "size", [{"height": 40, "width": 50}, {"max_height": 40, "max_width": 50}, {"longest_edge": 60}]
)
@pytest.mark.parametrize("preset", aug.PRESETS)
def test_every_form_of_a_size_works(preset, size):
    image, target = example(60, 90, [(1, 1, 80, 50)])
    for seed in range(10):
        with aug.random_state(seed):
            out, resized = aug.augmentation(preset, size)(image, target)
        assert max(out.size) <= 60
        assert resized["size"].tolist() == [out.height, out.width]


def test_without_augmentation_pixels_are_those_of_the_original_resize():
    image, target = example(61, 93, [(1, 1, 20, 20)])
    out, resized = aug.augmentation("none", SIZE)(image, target)
    assert np.array_equal(np.asarray(out), np.asarray(resize_image(image, *resized_size(61, 93, 48, 80))))
    assert resized["orig_size"].tolist() == [61, 93]


def test_strong_lays_a_picture_down_in_all_eight_ways():
    corner = (0, 0, 30, 10)  # along the upper edge, at its left end
    image, target = example(60, 60, [corner])
    turn = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), aug.RandomTranspose()])
    seen = set()
    for seed in range(100):
        with aug.random_state(seed):
            seen.add(tuple(turn(image, target)[1]["boxes"][0].tolist()))
    assert len(seen) == 8


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_a_window_lies_anywhere(factor):
    image, target = example(60, 60, [(28, 28, 32, 32)])
    window = aug.RandomWindow({"height": 60, "width": 60}, (factor, factor))
    middles = []
    for seed in range(200):
        with aug.random_state(seed):
            boxes = window(image, target)[1]["boxes"]
        middles.append((boxes[0, :2] + boxes[0, 2:]) / 2)
    reach = 60 * abs(1 - 1 / factor) / 2  # how far an object can get from the middle, on each side
    lowest, highest = torch.stack(middles).amin(0), torch.stack(middles).amax(0)
    assert lowest.tolist() == pytest.approx([30 - reach] * 2, abs=2)
    assert highest.tolist() == pytest.approx([30 + reach] * 2, abs=2)


def test_objects_of_which_little_shows_are_left_out():
    image, target = example(40, 100, [(0, 0, 100, 40), (0, 0, 52, 40), (0, 0, 30, 40)])
    _, kept = aug.crop(image, target, 0, 50, 40, 50, min_visible=0.1)
    assert kept["class_labels"].tolist() == [0]
    _, kept = aug.crop(image, target, 0, 50, 40, 50)
    assert kept["class_labels"].tolist() == [0, 1]
    assert kept["area"].tolist() == [2000, 80]
    assert len(kept["masks"]) == 2


def test_a_mosaic_has_the_objects_of_four_images():
    first, second = example(40, 60, [(1, 2, 11, 12)]), example(80, 60, [(0, 0, 60, 80)])
    image, target = aug.stitch([first, second, first, second])
    assert image.size == (120, 80)
    # The second image is halved to fit into a cell of 60x40.
    expected = [[1, 2, 11, 12], [60, 0, 90, 40], [1, 42, 11, 52], [60, 40, 90, 80]]
    assert target["boxes"].tolist() == expected
    assert target["masks"].shape == (4, 80, 120)
    assert target["orig_size"].tolist() == [40, 60]


def test_what_is_drawn_depends_on_the_numbers_alone():
    def draw(*numbers):
        with aug.random_state(*numbers):
            return torch.rand(4).tolist()

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(3, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert draw(3, 0, 1) == first
    assert first not in [draw(3, 1, 0), draw(0, 3, 1), draw(3, 0, 2), draw(3, 1, 1)]


def test_a_misspelt_preset_is_recognised():
    with pytest.raises(
        SettingError, match=r"unknown augmentation 'lihgt'; use one of: .*did you mean 'light'"
    ):
        aug.augmentation("lihgt", SIZE)
