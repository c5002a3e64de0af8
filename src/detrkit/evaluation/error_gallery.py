"""The worst mistakes of a detector, each cut out of its image with what was found and what is true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from detrkit.data.coco import DetectionDataset
from detrkit.evaluation.error_analysis import ErrorAnalysis, Mistake
from detrkit.processing.images import load_image
from detrkit.results.drawing import Color, class_color
from detrkit.results.fonts import font_for, legible

_COLUMNS = 6
_WIDTH, _HEIGHT = 240, 180  # pixels of a crop on the sheet
_GAP = 12
_LETTERS, _LARGE_LETTERS = 14, 18  # pixels
_LINE = 19
_LINES = 4
_LEAST_MARGIN = 12  # pixels of the image around the boxes
_MARGIN = 0.5  # of the boxes' longer side
_MOST_ENLARGED = 6
_DASH = 6
_SECTIONS = (
    ("False detections, the most confident first", "solid: detection; dashed: annotation; colours: classes"),
    ("Missed objects, the largest first", "dashed: annotation"),
)


def error_gallery(errors: ErrorAnalysis, dataset: DetectionDataset) -> Image.Image:
    """Draws the worst false detections and missed objects, with captions below that cover nothing.

    Args:
        errors: The analysis of boxes.
        dataset: The data set that was evaluated.

    Returns:
        An RGB sheet, whatever the number of mistakes.

    Raises:
        ImageError: An image cannot be read any more.
    """
    places = {image["id"]: place for place, image in enumerate(dataset.document["images"])}
    sections = []
    for (title, legend), mistakes in zip(_SECTIONS, (errors.false, errors.missed)):
        tiles = [_tile(mistake, dataset, places[mistake.image_id]) for mistake in mistakes]
        sections.append(_section(f"{title} ({legend})" if tiles else f"{title}: none", tiles))
    sheet = Image.new("RGB", (sections[0].width, sum(part.height for part in sections)), "white")
    top = 0
    for part in sections:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def _section(title: str, tiles: Sequence[Image.Image]) -> Image.Image:
    """Tiles of one size in rows below a title."""
    heading = _LARGE_LETTERS + 2 * _GAP
    wide, tall = _WIDTH + _GAP, _HEIGHT + _LINES * _LINE + _GAP
    rows = -(-len(tiles) // _COLUMNS)
    part = Image.new("RGB", (_COLUMNS * wide + _GAP, heading + rows * tall), "white")
    ImageDraw.Draw(part).text((_GAP, _GAP), title, "black", font_for(title, _LARGE_LETTERS))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, _COLUMNS)
        part.paste(tile, (_GAP + column * wide, heading + row * tall))
    return part


def _tile(mistake: Mistake, dataset: DetectionDataset, place: int) -> Image.Image:
    """A mistake's part of its image, and its caption below."""
    path = dataset.path(place)
    image = load_image(path, exif_orientation=dataset.upright).convert("RGB")
    tile = Image.new("RGB", (_WIDTH, _HEIGHT + _LINES * _LINE), "white")
    crop = _crop(image, mistake)
    tile.paste(crop, ((_WIDTH - crop.width) // 2, (_HEIGHT - crop.height) // 2))
    draw = ImageDraw.Draw(tile)
    for line, text in enumerate(_caption(mistake, dataset, path)):
        color = "dimgrey" if line == _LINES - 1 else "black"
        top = _HEIGHT + line * _LINE + 2
        fitting = _fitting(legible(text))
        draw.text((0, top), fitting, color, font_for(fitting, _LETTERS))
    return tile


def _caption(mistake: Mistake, dataset: DetectionDataset, path: Path) -> tuple[str, str, str, str]:
    """Kind, detection, annotation and file name."""
    names = dataset.category_names
    found = "found nothing"
    if mistake.found is not None:
        found = f"found {mistake.found['score']:.2f} {names[mistake.found['category_id']]}"
    true = "no object near"
    if mistake.true is not None:
        overlap = f"IoU {mistake.iou:.2f} with " if mistake.found is not None else ""
        true = f"true: {overlap}{names[mistake.true['category_id']]}"
    return mistake.kind, found, true, path.name


def _fitting(text: str) -> str:
    """A text, shortened to the width of a tile."""
    font = font_for(text, _LETTERS)
    if font.getlength(text) <= _WIDTH:
        return text
    while text and font.getlength(text + "...") > _WIDTH:
        text = text[:-1]
    return text + "..."


def _crop(image: Image.Image, mistake: Mistake) -> Image.Image:
    """The part of an image around the boxes of a mistake, with these drawn."""
    boxes = [
        (_corners(entry["bbox"]), class_color(entry["category_id"]), dashed)
        for entry, dashed in ((mistake.true, True), (mistake.found, False))
        if entry is not None
    ]
    left, top = (min(box[i] for box, _, _ in boxes) for i in (0, 1))
    right, bottom = (max(box[i] for box, _, _ in boxes) for i in (2, 3))
    margin = max(_LEAST_MARGIN, _MARGIN * max(right - left, bottom - top))
    # As wide for its height as the tile, as far as the image goes.
    wide, tall = right - left + 2 * margin, bottom - top + 2 * margin
    wide, tall = max(wide, tall * _WIDTH / _HEIGHT), max(tall, wide * _HEIGHT / _WIDTH)
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    area = (
        max(0, int(middle_x - wide / 2)),
        max(0, int(middle_y - tall / 2)),
        min(image.width, int(middle_x + wide / 2) + 1),
        min(image.height, int(middle_y + tall / 2) + 1),
    )
    part = image.crop(area)
    scale = min(_WIDTH / part.width, _HEIGHT / part.height, _MOST_ENLARGED)
    size = max(1, round(part.width * scale)), max(1, round(part.height * scale))
    part = part.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(part)
    for box, color, dashed in boxes:
        shifted = [(side - area[i % 2]) * scale for i, side in enumerate(box)]
        _outline(draw, shifted, part.size, color, dashed)
    return part


def _corners(box: Sequence[float]) -> tuple[float, float, float, float]:
    x, y, width, height = box
    return x, y, x + width, y + height


def _outline(
    draw: ImageDraw.ImageDraw, box: Sequence[float], size: tuple[int, int], color: Color, dashed: bool
) -> None:
    """A box, two pixels wide, inside the crop; black between its dashes, so that it shows on any ground."""
    x0, x1 = (min(max(round(box[i]), 0), size[0] - 1) for i in (0, 2))
    y0, y1 = (min(max(round(box[i]), 0), size[1] - 1) for i in (1, 3))
    draw.rectangle((x0, y0, x1, y1), outline="black" if dashed else color, width=2)
    if not dashed:
        return
    for start in range(x0, x1 + 1, 2 * _DASH):
        for y in (y0, y1 - 1):
            draw.rectangle((start, y, min(start + _DASH - 1, x1), y + 1), fill=color)
    for start in range(y0, y1 + 1, 2 * _DASH):
        for x in (x0, x1 - 1):
            draw.rectangle((x, start, x + 1, min(start + _DASH - 1, y1)), fill=color)
