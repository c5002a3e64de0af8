"""Boxes and segments with captions on an image.

The outlines and captions are drawn with Pillow: torchvision's drawing needs a font file on disk to draw text
in a readable size, whereas Pillow carries a scalable font with it.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from detrkit.results.fonts import Font, font_for, legible
from detrkit.results.shapes import deepest_pixel, find_boxes

Color = tuple[int, int, int]
# x0, y0, x1, y1 in pixels, the last column and row not included.
_Place = tuple[int, int, int, int]

# One over the golden ratio: stepping the hue by it keeps the colours of neighbouring class ids far apart.
_HUE_STEP = 0.618033988749895
# (saturation, value) in turn, so that hues that come close after many classes still differ.
_TONES = ((0.85, 0.95), (0.60, 1.00), (0.95, 0.72))
_SMALLEST_READABLE_FONT = 8


def class_color(label: int) -> Color:
    """The colour of a class: always the same for the same id, far from its neighbours'.

    Args:
        label: Class id.

    Returns:
        Red, green and blue in [0, 255].
    """
    saturation, value = _TONES[label % len(_TONES)]
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * _HUE_STEP) % 1.0, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Image.Image,
    boxes: np.ndarray | Sequence[Sequence[float]],
    captions: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
    *,
    line_width: int | None = None,
    font_size: int | None = None,
) -> Image.Image:
    """Draws boxes and their captions on a copy of an image.

    Outlines are drawn from the last box to the first, so that the first (the most confident) is on top.
    A caption never leaves the image; it stands where it hides no other caption, if there is such a place.

    Args:
        image: The image, any mode.
        boxes: (N, 4) corners x0, y0, x1, y1 in pixels of ``image``. Parts outside the image are not
            drawn; boxes that are wholly outside or not finite are left out.
        captions: N texts; none are drawn when left out.
        colors: N colours, red, green and blue in [0, 255]; by default a colour for each place in the list.
        line_width: Width of the outlines in pixels; by default it grows with the image and the boxes.
        font_size: Height of the captions' font in pixels; by default it grows with the image and the boxes.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: ``captions`` or ``colors`` are not as many as the boxes.
    """
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    colors = _checked_colors(colors, captions, len(boxes), "boxes")
    drawing = image.convert("RGB")
    if drawing is image:
        drawing = image.copy()
    length = math.sqrt(drawing.width * drawing.height)  # one measure of size for wide and tall images alike
    typical = _typical_side(boxes)
    # Small objects of a large image would disappear under its wide lines and large letters.
    line_width = line_width or max(1, round(min(length / 200, max(3, typical / 16))))
    if not font_size:
        # Smaller in a crowd, whose captions would otherwise cover the image.
        crowd = max(1.0, math.sqrt(len(boxes) / 15))
        font_size = max(11, round(min(length / 36 / crowd, max(24, typical / 3))))

    draw = ImageDraw.Draw(drawing)
    inside = [(i, _clip(box, drawing.width, drawing.height)) for i, box in enumerate(boxes)]
    visible = [(i, box) for i, box in inside if box is not None]
    for i, box in reversed(visible):
        draw.rectangle(box, outline=colors[i], width=line_width)
    if captions is not None:
        texts = [(box, legible(captions[i]), colors[i]) for i, box in visible]
        _draw_captions(draw, drawing.size, texts, font_size)
    return drawing


def _typical_side(boxes: np.ndarray) -> float:
    """The median of the boxes' longer sides in pixels; infinite without boxes."""
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
    sides = sides[np.isfinite(sides)]
    return float(np.median(sides)) if len(sides) else math.inf


def segment_colors(labels: Sequence[int]) -> list[Color]:
    """Colours of segments: the class's own for its first segment, another tone of it for the next ones.

    Args:
        labels: The class id of each segment.
    """
    seen: dict[int, int] = {}
    colors = []
    for label in labels:
        number = seen[label] = seen.get(label, -1) + 1
        # 89 steps of the hue bring it back to nearly the same place, with the next tone.
        colors.append(class_color(label + 89 * number))
    return colors


def draw_segments(
    image: Image.Image,
    ids: np.ndarray,
    segments: Sequence[int],
    captions: Sequence[str] | None = None,
    colors: Sequence[Color] | None = None,
    *,
    opacity: float = 0.55,
    font_size: int | None = None,
) -> Image.Image:
    """Draws segments and their captions over a copy of an image, with a light line around each.

    A caption stands inside its segment, as far from its border as can be; captions that would hide another
    of a larger segment are left out.

    Args:
        image: The image, any mode.
        ids: (height, width) integers, the segment that each pixel belongs to.
        segments: N ids; pixels with any other id stay as they are.
        captions: N texts; none are drawn when left out.
        colors: N colours, red, green and blue in [0, 255]; by default a colour for each place in the list.
        opacity: How much of a segment's colour there is in the drawing, in [0, 1].
        font_size: Height of the captions' font in pixels; by default it grows with the image.

    Returns:
        A new RGB image of the same size.

    Raises:
        ValueError: ``captions`` or ``colors`` are not as many as the segments, or ``ids`` is not of the
            image's size.
    """
    if ids.shape != (image.height, image.width):
        raise ValueError(f"ids of {ids.shape} do not fit an image of {(image.height, image.width)}")
    colors = _checked_colors(colors, captions, len(segments), "segments")
    places = _places(ids, segments)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    paint = np.array([(0, 0, 0), *colors], dtype=np.float32)
    strength = np.array([0.0] + [opacity] * len(segments), dtype=np.float32)[places][..., None]
    pixels = pixels * (1 - strength) + paint[places] * strength
    length = math.sqrt(image.width * image.height)
    pixels[_borders(places, max(1, round(length / 500)))] = 245
    drawing = Image.fromarray(pixels.round().astype(np.uint8))
    if captions is not None:
        font_size = font_size or max(11, round(length / 40))
        _draw_segment_captions(drawing, places, [*map(legible, captions)], colors, font_size)
    return drawing


def _checked_colors(
    colors: Sequence[Color] | None, captions: Sequence[str] | None, number: int, nouns: str
) -> Sequence[Color]:
    """The colours, by default one for each place; a ValueError unless they and the captions are so many."""
    for name, given in (("captions", captions), ("colors", colors)):
        if given is not None and len(given) != number:
            raise ValueError(f"{len(given)} {name} for {number} {nouns}")
    return [class_color(place) for place in range(number)] if colors is None else colors


def _places(ids: np.ndarray, segments: Sequence[int]) -> np.ndarray:
    """(height, width): 1 + the position in ``segments`` of each pixel's id, 0 for ids that are not there."""
    found, compact = np.unique(ids, return_inverse=True)
    position = {number: place for place, number in enumerate(segments, start=1)}
    table = np.array([position.get(number, 0) for number in found.tolist()], dtype=np.intp)
    return table[compact.reshape(ids.shape)]


def _borders(places: np.ndarray, width: int) -> np.ndarray:
    """(height, width) bool: pixels within ``width`` of another segment to their right or below."""
    borders = np.zeros(places.shape, dtype=bool)
    for step in range(1, width + 1):
        borders[:-step] |= places[:-step] != places[step:]
        borders[:, :-step] |= places[:, :-step] != places[:, step:]
    return borders


def _draw_segment_captions(
    drawing: Image.Image,
    places: np.ndarray,
    captions: Sequence[str],
    colors: Sequence[Color],
    font_size: int,
) -> None:
    """Writes the captions of the largest segments first, each at its segment's deepest point."""
    draw = ImageDraw.Draw(drawing)
    areas = np.bincount(places.ravel(), minlength=len(captions) + 1)[1:]
    boxes = find_boxes(places, len(captions))
    placed: list[_Place] = []
    for i in np.argsort(-areas, kind="stable"):
        font = _fitting_font(captions[i], font_size, drawing.size)
        box = boxes[i]
        if box is None or font is None:
            continue
        x, y = _deepest_point(places, int(i) + 1, box)
        width, height = _tag_size(captions[i], font)
        place = _inside((x - width // 2, y - height // 2), (width, height), drawing.size)
        if not any(_overlap(place, other) for other in placed):
            placed.append(place)
            _draw_tag(draw, place, captions[i], font, colors[i])


def _deepest_point(places: np.ndarray, place: int, box: tuple[slice, slice]) -> tuple[int, int]:
    """Column and row of the pixel of a segment that is farthest from its border."""
    step = max(1, (box[0].stop - box[0].start) // 200, (box[1].stop - box[1].start) // 200)
    row, column = deepest_pixel(places[box][::step, ::step] == place)
    return int(box[1].start + column * step), int(box[0].start + row * step)


def _clip(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int] | None:
    """The part of a box inside the image as whole pixels, corners included; None if the box is outside."""
    if not np.isfinite(box).all():
        return None
    x0, y0, x1, y1 = box
    if x1 < x0 or y1 < y0 or x1 < 0 or y1 < 0 or x0 >= width or y0 >= height:
        return None
    left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
    return left, top, max(left, min(width, math.ceil(x1)) - 1), max(top, min(height, math.ceil(y1)) - 1)


def _draw_captions(
    draw: ImageDraw.ImageDraw,
    image_size: tuple[int, int],
    captions: list[tuple[tuple[int, int, int, int], str, Color]],
    font_size: int,
) -> None:
    """Chooses a place for every caption in order of the list, then draws them with the first on top."""
    placed = _Taken()
    drawings = []
    for box, text, color in captions:
        font = _fitting_font(text, font_size, image_size)
        if font is None:
            continue
        place = _place(box, _tag_size(text, font), image_size, placed)
        placed.add(place)
        drawings.append((place, text, font, color))
    for place, text, font, color in reversed(drawings):
        _draw_tag(draw, place, text, font, color)


def _draw_tag(draw: ImageDraw.ImageDraw, place: _Place, text: str, font: Font, color: Color) -> None:
    """Writes a caption in the middle of a filled place."""
    draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
    middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
    # Black or white, whichever is easier to read on the colour (ITU-R BT.601 luma).
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    draw.text(middle, text, fill=(0, 0, 0) if light else (255, 255, 255), font=font, anchor="mm")


def _fitting_font(text: str, font_size: int, image_size: tuple[int, int]) -> Font | None:
    """The font in the wanted size, else smaller so that the caption fits; None where none is readable."""
    for size in range(font_size, _SMALLEST_READABLE_FONT - 1, -1):
        font = font_for(text, size)
        width, height = _tag_size(text, font)
        if width <= image_size[0] and height <= image_size[1]:
            return font
    return None


def _tag_size(text: str, font: Font) -> tuple[int, int]:
    """Width and height in pixels of a caption with its margin; the height is the same for every text."""
    left, top, right, bottom = font.getbbox("Ag")
    line = bottom - top
    left, _, right, _ = font.getbbox(text)
    margin = max(2, round(line / 4))
    return math.ceil(right - left) + 2 * margin, math.ceil(line) + margin


def _place(
    box: tuple[int, int, int, int], size: tuple[int, int], image_size: tuple[int, int], placed: _Taken
) -> _Place:
    """The best place for a caption, inside the image: on top of its box, else inside, below or beside."""
    width, height = size
    left, top, right, bottom = box
    wishes = [
        (left, top - height),
        (left, top),
        (right + 1 - width, top - height),
        (right + 1 - width, top),
        (left, bottom + 1 - height),
        (left, bottom + 1),
        (right + 1 - width, bottom + 1 - height),
        (right + 1, top),
        (left - width, top),
    ]
    places = (_inside(wish, size, image_size) for wish in wishes)
    return min(places, key=placed.pixels_in)


class _Taken:
    """The places of captions so far, by parts of the image: of thousands only the near ones are looked at."""

    _PART = 128  # pixels

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int], set[int]] = {}
        self._places: list[_Place] = []

    def add(self, place: _Place) -> None:
        """Takes another place."""
        for part in self._parts_of(place):
            self._parts.setdefault(part, set()).add(len(self._places))
        self._places.append(place)

    def pixels_in(self, place: _Place) -> int:
        """How many pixels of a place are taken, counted for each caption there."""
        near = set().union(*(self._parts.get(part, ()) for part in self._parts_of(place)))
        return sum(_overlap(place, self._places[number]) for number in near)

    def _parts_of(self, place: _Place) -> Iterator[tuple[int, int]]:
        left, top, right, bottom = (edge // self._PART for edge in place)
        return itertools.product(range(left, right + 1), range(top, bottom + 1))


def _inside(corner: tuple[int, int], size: tuple[int, int], image_size: tuple[int, int]) -> _Place:
    """The place of this size with this upper left corner, moved into the image."""
    x, y = (min(max(0, at), whole - part) for at, part, whole in zip(corner, size, image_size))
    return x, y, x + size[0], y + size[1]


def _overlap(a: _Place, b: _Place) -> int:
    """Pixels that two places share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
