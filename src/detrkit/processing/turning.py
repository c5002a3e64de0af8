"""Turning images upright, large ones without a second image of their size in memory."""

from __future__ import annotations

import tempfile

import PIL.Image

# How an image with an EXIF orientation is turned upright.
TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# Of these, rows become columns; and where the first row of pixels comes last.
_TO_COLUMNS, _BACKWARDS = (5, 6, 7, 8), (3, 4, 6, 7)

_LARGE = 100_000_000
_ROWS = 256


def turn(image: PIL.Image.Image, orientation: int, *, own: bool = False) -> PIL.Image.Image:
    """An image turned upright.

    Args:
        image: An image of any mode.
        orientation: Its EXIF orientation, from 2 to 8.
        own: Whether nobody else needs the image. A large one then goes through a file, and is closed.
    """
    if not own or image.mode != "RGB" or image.width * image.height < _LARGE:
        return image.transpose(TURNS[orientation])
    width, height = image.size
    bands = [(top, min(top + _ROWS, height)) for top in range(0, height, _ROWS)]
    info = image.info
    with tempfile.TemporaryFile() as file:
        for top, bottom in bands:
            file.write(image.crop((0, top, width, bottom)).tobytes())
        image.close()  # before there is the other one
        file.seek(0)
        turned = PIL.Image.new("RGB", (height, width) if orientation in _TO_COLUMNS else (width, height))
        for top, bottom in bands:
            size = (width, bottom - top)
            band = PIL.Image.frombytes("RGB", size, file.read(3 * size[0] * size[1]))
            place = height - bottom if orientation in _BACKWARDS else top
            corner = (place, 0) if orientation in _TO_COLUMNS else (0, place)
            turned.paste(band.transpose(TURNS[orientation]), corner)
    turned.info = dict(info)
    return turned
