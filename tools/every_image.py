"""Every image gets an answer: aspects from 1:1 to 100:1, every mode of Pillow, every engine, in one process.

``python -m tools.every_image --images 2000 --engine onnx`` prints the most memory that was held in
each hundred of the images: of a process that keeps nothing of them, no hundred has more than the others. It
ends with status 1 at anything but a result or an ImageError of one line.
"""

from __future__ import annotations

import argparse
import collections
import io
import logging
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detrkit import Detector
from detrkit.errors import ImageError

MODES = (
    *("1", "L", "La", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK"),
    *("YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B"),
)
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP")


def make_image(number: int, chance: random.Random) -> Image.Image:
    """An image of an aspect, orientation and mode that its number says."""
    aspect = 100 ** ((number % 97) / 96)
    short = chance.randint(1, max(1, int(600 / aspect**0.5)))
    size = (max(1, round(short * aspect)), short)
    mode = MODES[number % len(MODES)]
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    if number % 2:
        image = image.transpose(Image.Transpose.ROTATE_90)
    if mode in ("La", "RGBa"):
        return image.convert(mode.replace("a", "A")).convert(mode)
    if mode.startswith("I;16"):
        return Image.new(mode, image.size, number)
    return Image.new(mode, image.size) if mode == "LAB" else image.convert(mode)


def as_source(image: Image.Image, number: int, chance: random.Random) -> Any:
    """The image as a caller may have it: as it is, an array, a view of one, or the bytes of a file."""
    kind = number % 4
    if kind == 1 and image.mode in ("RGB", "L", "RGBA"):
        return np.asarray(image)[:, ::-1]
    if kind == 2 and image.mode == "RGB":
        return np.asarray(image, dtype=np.float32) / 255
    if kind == 3:
        file = io.BytesIO()
        try:
            image.save(file, chance.choice(FORMATS))
        except (OSError, KeyError, ValueError):  # a mode that the format does not have
            return image
        return file.getvalue()
    return image


def megabytes() -> float:
    """What this process holds, but for pages of files, which the system takes back when it likes."""
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - of_files) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--model", default="blood-cells")
    parser.add_argument("--engine", default="torch")
    parser.add_argument("--batch-size", type=int, default=2)
    args = parser.parse_args()
    logging.getLogger("detrkit").setLevel(logging.ERROR)
    chance = random.Random(0)
    detector = Detector.from_pretrained(args.model, engine=args.engine)
    outcomes: collections.Counter[str] = collections.Counter()
    held, highest, started = [], 0.0, time.monotonic()
    for number in range(args.images):
        image = make_image(number, chance)
        others = [image] * (args.batch_size - 1)
        try:
            for result in detector([as_source(image, number, chance), *others], 0.3, args.batch_size):
                assert np.isfinite(result.boxes).all()
            outcomes["results"] += 1
        except ImageError as error:
            outcomes["long errors" if "\n" in str(error) else "errors"] += 1
        except Exception:
            print(f"image {number}: {image.size[0]}x{image.size[1]} {image.mode}", flush=True)
            traceback.print_exc()
            sys.exit(1)
        highest = max(highest, megabytes())
        if (number + 1) % 100 == 0:
            held.append(f"{highest:.0f}")
            print(f"{args.engine}: {number + 1} images, at most {held[-1]} MB", flush=True)
            highest = 0.0
    seconds = time.monotonic() - started
    print(f"{args.engine}: {dict(outcomes)} in {seconds:.0f} s; at most {', '.join(held)} MB")


if __name__ == "__main__":
    main()
