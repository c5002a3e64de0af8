"""Drawings of what :mod:`detrkit.attention.maps` finds, after figures 3, 6 and 7 of the DETR paper.

Attention maps are drawn cell by cell, without smoothing, as the model knows nothing finer. Samples are dots
whose area and opacity grow with their weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from detrkit.attention.maps import Attention, AttentionMaps, AttentionSamples, QueryStatistics
from detrkit.common.errors import ImageError
from detrkit.results.drawing import Color, class_color, draw_boxes

# Shapes are drawn larger and then reduced, which rounds their edges, as far as that stays below these pixels.
_OVERSAMPLING = 3
_MOST_PIXELS = 8_000_000
_GAP = 8
_SQUARES_IN_A_LINE = 5
_MOST_BRIGHTNESS = 135


def draw_attention(
    image: Image.Image,
    attention: Attention,
    *,
    colors: Sequence[Color] | None = None,
    opacity: float = 0.85,
    line_width: int | None = None,
) -> Image.Image:
    """Draws all rows of an attention over one faded grey copy of the image, a colour for each.

    What attends is drawn too: the box and caption of a detection, a ring around a point. The strongest
    attention of each row gets its full colour, so that rows of wide and of narrow attention can both be seen;
    the samples of all rows are drawn to one scale.

    Args:
        image: The image that the attention is of, any mode.
        attention: N rows.
        colors: N colours, red, green and blue in [0, 255]; by default a colour for each place in the list.
        opacity: How much of a colour there is where attention is strongest, in [0, 1].
        line_width: Width of boxes and rings in pixels; by default it grows with the image.

    Returns:
        A new RGB image of the same size.

    Raises:
        ImageError: The image is not of the size that the attention refers to.
        ValueError: There are not as many colours as rows.
    """
    height, width = attention.image_size
    if image.size != (width, height):
        raise ImageError(
            f"the attention refers to an image of {width}x{height} pixels, but the image to draw on has "
            f"{image.width}x{image.height}"
        )
    if colors is None:
        colors = [row_color(place) for place in range(len(attention))]
    if len(colors) != len(attention):
        raise ValueError(f"{len(colors)} colors for {len(attention)} rows of attention")
    drawing = _faded(image)
    if isinstance(attention, AttentionMaps):
        drawing = _paint_maps(drawing, attention.maps, colors, opacity)
    elif isinstance(attention, AttentionSamples):
        drawing = _paint_samples(drawing, attention, colors, opacity)
    line_width = line_width or max(1, round(math.sqrt(width * height) / 250))
    found = attention.detections
    if found is None:
        return _paint_rings(drawing, attention.points, colors, line_width)
    captions = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores)]
    return draw_boxes(drawing, found.boxes, captions, colors, line_width=line_width)


def draw_panels(image: Image.Image, attention: Attention, *, columns: int | None = None) -> Image.Image:
    """Draws each row of an attention on a copy of its own, side by side.

    Args:
        image: The image that the attention is of, any mode.
        attention: N rows.
        columns: Panels in a row; by default as many as make the drawing about square.

    Returns:
        A new RGB image. The panels keep the image's size.

    Raises:
        ImageError: The image is not of the size that the attention refers to, or there is nothing to draw.
    """
    if len(attention) == 0:
        raise ImageError("no attention to draw: no object or point was chosen")
    rows = range(len(attention))
    panels = [draw_attention(image, attention[[row]], colors=[row_color(row)]) for row in rows]
    if columns is None:
        columns = max(1, round(math.sqrt(len(panels) * image.height / image.width)))
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    width, height = image.width + _GAP, image.height + _GAP
    whole = Image.new("RGB", (columns * width - _GAP, lines * height - _GAP), "white")
    for place, panel in enumerate(panels):
        line, column = divmod(place, columns)
        whole.paste(panel, (column * width, line * height))
    return whole


def draw_queries(
    statistics: QueryStatistics, queries: Sequence[int] | None = None, *, side: int = 160
) -> Image.Image:
    """Draws where queries fire: a square for each, a dot at the centre of each of its boxes.

    The squares are the images, whatever their shapes. A dot's colour is the box's size relative to the image:
    green for small boxes, red for wide ones, blue for tall ones, and so magenta for boxes as large as the
    image. Over a square stand the query's number and in how many images it gave a box.

    Args:
        statistics: From :func:`detrkit.attention.maps.query_statistics`.
        queries: Their numbers; by default the 20 that gave the most boxes, in the order of their numbers.
        side: Side of a square in pixels.

    Returns:
        A new RGB image.

    Raises:
        ImageError: There is no such query, or there are none to draw.
    """
    counts = statistics.counts
    if queries is None:
        queries = sorted(np.argsort(-counts, kind="stable")[:20].tolist())
    if not queries or not all(0 <= query < len(counts) for query in queries):
        raise ImageError(f"unknown queries: choose some from 0 to {len(counts) - 1}")
    font_size = max(8, side // 11)
    font, head = ImageFont.load_default(font_size), round(1.6 * font_size)
    columns = min(_SQUARES_IN_A_LINE, len(queries))
    lines = math.ceil(len(queries) / columns)
    size = (columns * (side + _GAP) + _GAP, lines * (side + head + _GAP))
    scale = _oversampling(*size)
    drawing = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    draw = ImageDraw.Draw(drawing)
    places = []
    radius = max(1.0, side / 90) * scale
    for place, query in enumerate(queries):
        line, column = divmod(place, columns)
        left, top = _GAP + column * (side + _GAP), line * (side + head + _GAP) + head
        places.append((left, top))
        corner, length = np.array([left, top]) * scale, side * scale
        draw.rectangle((*corner, *(corner + length - 1)), outline=(190, 190, 190), width=scale)
        for box in statistics.boxes[statistics.queries == query]:
            x, y = corner + box[:2] * length
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=size_color(box[2], box[3]))
    drawing = drawing.resize(size, Image.Resampling.BOX)
    draw = ImageDraw.Draw(drawing)
    for (left, top), query in zip(places, queries):
        text = f"query {query}: {counts[query]} of {statistics.image_count}"
        draw.text((left, top - head / 2), text, fill=(60, 60, 60), font=font, anchor="lm")
    return drawing


def row_color(place: int) -> Color:
    """The colour of a place in a list: far from its neighbours', and dark enough for a pale ground.

    Returns:
        Red, green and blue in [0, 255].
    """
    color = class_color(place)
    # Brightness as ITU-R BT.601 weighs it.
    brightness = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    scale = min(1.0, _MOST_BRIGHTNESS / brightness)
    red, green, blue = (round(part * scale) for part in color)
    return red, green, blue


def size_color(width: float, height: float) -> Color:
    """The colour of a box's size: green for small, red for wide, blue for tall, magenta for wide and tall.

    Args:
        width: Width relative to the image, in [0, 1].
        height: Height relative to the image, in [0, 1].

    Returns:
        Red, green and blue in [0, 255].
    """
    red, blue = (min(max(float(length), 0.0), 1.0) for length in (width, height))
    parts = (red, 1 - max(red, blue), blue)
    red, green, blue = (round(225 * part / max(parts)) for part in parts)
    return red, green, blue


def _faded(image: Image.Image) -> Image.Image:
    """A pale grey copy, on which colours stand out."""
    grey = image.convert("RGB").convert("L")
    return Image.blend(grey, Image.new("L", grey.size, 255), 0.35).convert("RGB")


def _paint_maps(
    drawing: Image.Image, maps: np.ndarray, colors: Sequence[Color], opacity: float
) -> Image.Image:
    """Colours each pixel by the maps (N, height, width) at its centre."""
    rows = ((np.arange(drawing.height) + 0.5) / drawing.height * maps.shape[1]).astype(np.intp)
    columns = ((np.arange(drawing.width) + 0.5) / drawing.width * maps.shape[2]).astype(np.intp)
    strongest = maps.max(axis=(1, 2), keepdims=True).clip(min=np.finfo(np.float32).tiny)
    strengths = maps / strongest
    total = strengths.sum(axis=0).clip(min=np.finfo(np.float32).tiny)
    inks = np.array(colors, dtype=np.float32).reshape(-1, 3)
    paint = np.einsum("nhw,nc->hwc", strengths, inks) / total[..., None]
    cover = (opacity * strengths.max(axis=0, initial=0))[..., None]
    paint, cover = (part[rows[:, None], columns] for part in (paint, cover))
    pixels = np.asarray(drawing, dtype=np.float32) * (1 - cover) + paint * cover
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _paint_samples(
    drawing: Image.Image, attention: AttentionSamples, colors: Sequence[Color], opacity: float
) -> Image.Image:
    """Draws each sample as a dot, the heaviest on top."""
    per_row = attention.weights[0].size if len(attention) else 0
    weights = attention.weights.reshape(-1)
    at = attention.locations.reshape(-1, 2)
    shares = weights / weights.max(initial=np.finfo(np.float32).tiny)
    scale = _oversampling(*drawing.size)
    layer = Image.new("RGBA", (drawing.width * scale, drawing.height * scale))
    draw = ImageDraw.Draw(layer)
    largest = max(3.0, math.sqrt(drawing.width * drawing.height) / 80) * scale
    for sample in np.argsort(shares, kind="stable"):
        x, y = at[sample].astype(float) * scale
        radius = largest * math.sqrt(shares[sample])
        if not (-radius <= x <= layer.width + radius and -radius <= y <= layer.height + radius):
            continue
        alpha = round(255 * opacity * (0.3 + 0.7 * float(shares[sample])))
        color = (*colors[sample // per_row], alpha)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    # Halved without its opacity in mind, a dot would get a dark rim.
    layer = layer.convert("RGBa").resize(drawing.size, Image.Resampling.BOX).convert("RGBA")
    return Image.alpha_composite(drawing.convert("RGBA"), layer).convert("RGB")


def _paint_rings(
    drawing: Image.Image, points: np.ndarray, colors: Sequence[Color], line_width: int
) -> Image.Image:
    """Draws a ring in white and colour around each point."""
    draw = ImageDraw.Draw(drawing)
    radius = max(5.0, math.sqrt(drawing.width * drawing.height) / 45)
    for (x, y), color in zip(points.tolist(), colors):
        for extra, ink in ((line_width, "white"), (0, color)):
            r = radius + extra
            draw.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=line_width + 2 * extra)
    return drawing


def _oversampling(width: int, height: int) -> int:
    return max(1, min(_OVERSAMPLING, math.isqrt(_MOST_PIXELS // max(1, width * height))))
