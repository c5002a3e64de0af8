"""A sheet of annotated images, to see at a glance whether boxes and classes are right."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from detrkit.common.errors import ImageError
from detrkit.data.coco import DetectionDataset
from detrkit.results.drawing import class_color, draw_boxes

_TILE = 400  # pixels; the longer side of an image on the sheet
_GAP = 8


def contact_sheet(dataset: DetectionDataset, count: int = 16) -> Image.Image:
    """Draws images of a checked data set with their boxes and classes, evenly spaced over the data set.

    Args:
        dataset: The data set.
        count: Maximum number of images.

    Returns:
        An RGB image of rows of drawings.

    Raises:
        ImageError: None of the images can be read.
    """
    names = dataset.id2label
    tiles = []
    for place in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist():
        try:
            image, target = dataset[place]
        except ImageError as error:
            failure = error
            continue
        scale = _TILE / max(image.size)
        small = image.resize([max(1, round(side * scale)) for side in image.size])
        labels = target["class_labels"].tolist()
        tiles.append(
            draw_boxes(
                small,
                target["boxes"].numpy() * scale,
                [names[label] for label in labels],
                [class_color(label) for label in labels],
            )
        )
    if not tiles:
        raise failure
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    size = (columns * (_TILE + _GAP) - _GAP, sum(heights) + _GAP * (len(rows) - 1))
    sheet = Image.new("RGB", size, "white")
    top = 0
    for row, height in zip(rows, heights):
        for column, tile in enumerate(row):
            sheet.paste(tile, (column * (_TILE + _GAP), top))
        top += height + _GAP
    return sheet
