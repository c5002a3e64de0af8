"""Augmentation presets: transforms of an image and its target together, on torchvision's transforms v2.

A transform takes and gives an image (PIL, RGB) and a target whose boxes and masks are ``tv_tensors`` (see
:func:`wrap_target`). Torchvision's own transforms that leave the number of objects and the scale alone fit
in; those here keep labels, areas and sizes in step, and resize with Pillow by the original's rule.

Every transform draws from torch's global generator only, so that :func:`random_state` makes it repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from detrkit.common.errors import SettingError
from detrkit.common.schema import Target
from detrkit.common.text import did_you_mean
from detrkit.processing.annotations import PER_OBJECT, only_objects, resize_target
from detrkit.processing.pixels import IMAGENET_MEAN
from detrkit.processing.resize import resize_image, size_for

Example: TypeAlias = tuple[PIL.Image.Image, Target]
Transform: TypeAlias = Callable[[PIL.Image.Image, Target], Example]

_FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # about 0 after normalisation
_MIN_VISIBLE = 0.1  # of a box's area; less of an object cannot be told from its neighbours


def augmentation(preset: str, size: Mapping[str, int]) -> Transform:
    """Makes one of the presets.

    Args:
        preset: ``"original"``: the recipe of DETR: a flip, then the size one of eleven from 0.6 times the
            evaluation size up to it, half of the time after cropping a random part.
            ``"light"``: a flip, a window of 0.75 to 1.15 times the image's sides, brightness and contrast.
            ``"strong"``: for pictures without an up direction, as from a microscope or from above: flips and
            quarter turns, a window of 0.6 to 1.5 times the sides, brightness, contrast, saturation, sometimes
            hue.
            ``"none"``: resized as for evaluation.
        size: Evaluation size, as an image processor's ``size``. With "light", "strong" and "none" images come
            out at their evaluation size, so that those of one aspect ratio need no padding.

    Returns:
        A transform of an image and its target (wrapped).

    Raises:
        SettingError: There is no such preset.
    """
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise SettingError(f"unknown augmentation {preset!r}; use one of: {', '.join(PRESETS)}{hint}")
    # Flipping a box rounds, and may leave it a hair outside.
    return v2.Compose([PRESETS[preset](dict(size)), v2.ClampBoundingBoxes()])


def original(size: dict[str, int]) -> Transform:
    """The original's recipe, relative to the evaluation size (800, at most 1333, there).

    Source: ``make_coco_transforms`` of ``datasets/coco.py`` in facebookresearch/detr.
    """
    resize = ResizeToOneOf([_scaled(size, 0.6 + 0.04 * step) for step in range(11)])
    unlimited = {k: v for k, v in size.items() if k != "longest_edge" or "shortest_edge" not in size}
    base = size.get("shortest_edge") or min(size.values())
    crop = v2.Compose(
        [
            ResizeToOneOf([_scaled(unlimited, factor) for factor in (0.5, 0.625, 0.75)]),
            RandomSizeCrop(round(0.48 * base), round(0.75 * base)),
            resize,
        ]
    )
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, crop])])


def light(size: dict[str, int]) -> Transform:
    """A flip, a little larger or smaller, and brightness and contrast."""
    return v2.Compose(
        [
            RandomWindow(size, (0.75, 1.15)),
            v2.RandomHorizontalFlip(),  # of fewer pixels than before the window
            v2.ColorJitter(brightness=0.2, contrast=0.2),
        ]
    )


def strong(size: dict[str, int]) -> Transform:
    """All eight ways to lay down a picture, larger and smaller, and its colours changed."""
    return v2.Compose(
        [
            RandomTranspose(),
            RandomWindow(size, (0.6, 1.5)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
            v2.RandomApply([v2.ColorJitter(hue=0.03)], p=0.3),  # takes as long as all the rest
        ]
    )


def none(size: dict[str, int]) -> Transform:
    """The evaluation size and nothing else."""
    return ResizeToOneOf([size])


PRESETS: dict[str, Callable[[dict[str, int]], Transform]] = {
    "original": original,
    "light": light,
    "strong": strong,
    "none": none,
}


class ResizeToOneOf:
    """Resizes to one of several sizes.

    Args:
        sizes: Sizes as an image processor takes them, to choose from at random.
    """

    def __init__(self, sizes: Sequence[Mapping[str, int]]) -> None:
        self.sizes = sizes

    def __call__(self, image: PIL.Image.Image, target: Target) -> Example:
        """Resizes an image and its wrapped target."""
        size = self.sizes[_integer(0, len(self.sizes) - 1)] if len(self.sizes) > 1 else self.sizes[0]
        return resize(image, target, *size_for(image.height, image.width, size))


class RandomSizeCrop:
    """Cuts out a part with sides between two lengths; objects of which nothing is left go.

    Args:
        least: Least length of a side in pixels; where the image is shorter, its whole side.
        most: Greatest length of a side in pixels.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most

    def __call__(self, image: PIL.Image.Image, target: Target) -> Example:
        """Crops an image and its wrapped target."""
        width = _integer(min(self.least, image.width), min(self.most, image.width))
        height = _integer(min(self.least, image.height), min(self.most, image.height))
        top, left = _integer(0, image.height - height), _integer(0, image.width - width)
        return crop(image, target, top, left, height, width)


class RandomTranspose:
    """Swaps rows and columns half of the time; with both flips every quarter turn is as likely."""

    def __call__(self, image: PIL.Image.Image, target: Target) -> Example:
        """Transposes an image and its wrapped target, or not."""
        if torch.rand(()) < 0.5:
            return image, target
        turned = unwrap_target(target)
        turned["boxes"] = turned["boxes"][:, [1, 0, 3, 2]]
        turned["size"] = target["size"].flip(0)
        if "masks" in turned:
            turned["masks"] = turned["masks"].transpose(1, 2)
        return image.transpose(PIL.Image.Transpose.TRANSPOSE), wrap_target(turned)


class RandomWindow:
    """Looks at the image through a window of another size, and resizes what is seen to the evaluation size.

    The window has the sides of the image as it was read times one random factor: below 1 it is a crop, above
    1 the image shrinks and the rest is filled with ImageNet's mean colour. A transposed image is seen through
    a window that is not, so that batches keep their shape. Objects that show less than a tenth go.

    Args:
        size: The size to resize to, as an image processor's.
        factors: Least and greatest factor; all ratios between are equally likely.
    """

    def __init__(self, size: Mapping[str, int], factors: tuple[float, float]) -> None:
        self.size, self.factors = size, factors

    def __call__(self, image: PIL.Image.Image, target: Target) -> Example:
        """Gives what is seen of an image and its wrapped target."""
        least, greatest = map(math.log, self.factors)
        chosen, down, right = torch.rand(3).tolist()
        factor = math.exp(least + chosen * (greatest - least))
        height, width = target["orig_size"].tolist()
        out_height, out_width = size_for(height, width, self.size)
        top, bottom, above, rows = _span(image.height, height * factor, out_height, down)
        left, right_, before, columns = _span(image.width, width * factor, out_width, right)
        image, target = crop(image, target, top, left, bottom - top, right_ - left, _MIN_VISIBLE)
        image, target = resize(image, target, rows, columns)
        return pad(image, target, above, before, out_height, out_width)


def _span(length: int, window: float, out: int, position: float) -> tuple[int, int, int, int]:
    """Where a window meets an image along one axis.

    Args:
        length: Of the image in pixels.
        window: Length of the window in pixels; may be more.
        out: Length in pixels that the window is resized to.
        position: In 0..1, where the window lies in the image, or the image in the window.

    Returns:
        First pixel of the image that is seen and the one after the last, then where these begin in the
        resized window and their length there.
    """
    start = position * (length - window)
    first, after = max(0, round(start)), min(length, max(round(start + window), round(start) + 1))
    scale = out / window
    seen = min(out, max(1, round((after - first) * scale)))
    return first, after, min(out - seen, max(0, round(-start * scale))), seen


def wrap_target(target: Target) -> Target:
    """Makes boxes and masks known to torchvision's transforms, as those of an image of ``target["size"]``."""
    height, width = target["size"].tolist()
    wrapped = target.copy()
    wrapped["boxes"] = tv_tensors.BoundingBoxes(
        target["boxes"], format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=(height, width)
    )
    if "masks" in target:
        wrapped["masks"] = tv_tensors.Mask(target["masks"])
    return wrapped


def unwrap_target(target: Target) -> Target:
    """A target of plain tensors."""
    unwrapped = target.copy()
    unwrapped["boxes"] = target["boxes"].as_subclass(torch.Tensor)
    if "masks" in target:
        unwrapped["masks"] = target["masks"].as_subclass(torch.Tensor)
    return unwrapped


def resize(image: PIL.Image.Image, target: Target, height: int, width: int) -> Example:
    """Resizes an image with Pillow, and its target."""
    return resize_image(image, height, width), wrap_target(
        resize_target(unwrap_target(target), height, width)
    )


def crop(
    image: PIL.Image.Image,
    target: Target,
    top: int,
    left: int,
    height: int,
    width: int,
    min_visible: float = 0.0,
) -> Example:
    """Cuts a part out of an image; boxes are clipped to it, and those of which too little is left removed.

    The area of an object is that of its box afterwards, as in the original.

    Args:
        image: The image.
        target: Its target, wrapped.
        top: First row.
        left: First column.
        height: Number of rows.
        width: Number of columns.
        min_visible: Least part of a box's area that must be left.
    """
    if (top, left, height, width) == (0, 0, image.height, image.width):
        return image, target
    cropped = unwrap_target(target)
    boxes = cropped["boxes"]
    clipped = F.crop(target["boxes"], top, left, height, width).as_subclass(torch.Tensor)
    before, after = _areas(boxes), _areas(clipped)
    keep = (clipped[:, 2:] > clipped[:, :2]).all(1) & (after >= min_visible * before)
    cropped["boxes"] = clipped
    cropped["area"] = after
    cropped["size"] = torch.tensor([height, width])
    if "masks" in cropped:
        cropped["masks"] = cropped["masks"][:, top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height)), wrap_target(only_objects(cropped, keep))


def pad(image: PIL.Image.Image, target: Target, top: int, left: int, height: int, width: int) -> Example:
    """Puts an image on a canvas of ImageNet's mean colour.

    Args:
        image: The image.
        target: Its target, wrapped.
        top: Row of the canvas where the image begins.
        left: Column of the canvas where the image begins.
        height: Height of the canvas in pixels.
        width: Width of the canvas in pixels.
    """
    if (height, width) == (image.height, image.width):
        return image, target
    canvas = PIL.Image.new("RGB", (width, height), _FILL)
    canvas.paste(image, (left, top))
    return canvas, wrap_target(_moved(target, top, left, height, width))


def stitch(examples: Sequence[Example]) -> Example:
    """Four images in one, two by two: a mosaic, in which a crop shows objects among others than their own.

    Args:
        examples: Four images with wrapped targets. Each cell is as large as the first image, and the others
            are resized, with their aspect ratio, to fit into it.

    Returns:
        The mosaic and its target; ``image_id`` and ``orig_size`` are those of the first.
    """
    (first, first_target), *_ = examples
    height, width = first.height, first.width
    canvas = PIL.Image.new("RGB", (2 * width, 2 * height), _FILL)
    targets = []
    for cell, (image, target) in enumerate(examples):
        ratio = min(height / image.height, width / image.width)
        if ratio != 1:
            fitting = max(1, int(image.height * ratio)), max(1, int(image.width * ratio))
            image, target = resize(image, target, *fitting)
        top, left = cell // 2 * height, cell % 2 * width
        canvas.paste(image, (left, top))
        targets.append(_moved(target, top, left, 2 * height, 2 * width))
    joined = first_target.copy()
    joined["size"] = targets[0]["size"]
    for name in PER_OBJECT:
        if name in first_target:
            joined[name] = torch.cat([target[name] for target in targets])
    return canvas, wrap_target(joined)


@contextmanager
def random_state(*numbers: int) -> Iterator[None]:
    """Lets torch's generator draw, within the block, what belongs to these numbers; others do not notice.

    Args:
        numbers: Such as seed, epoch and index; non-negative.
    """
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state))
        yield


def _moved(target: Target, top: int, left: int, height: int, width: int) -> Target:
    """A target, unwrapped, of an image that was put on a canvas of that height and width."""
    moved = unwrap_target(target)
    old_height, old_width = target["size"].tolist()
    moved["boxes"] = moved["boxes"] + torch.tensor([left, top, left, top])
    moved["size"] = torch.tensor([height, width])
    if "masks" in moved:
        borders = [left, width - left - old_width, top, height - top - old_height]
        moved["masks"] = nn.functional.pad(moved["masks"], borders)
    return moved


def _areas(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def _integer(least: int, greatest: int) -> int:
    """A random integer from ``least`` to ``greatest``, both included."""
    return int(torch.randint(least, greatest + 1, ()))


def _scaled(size: Mapping[str, int], factor: float) -> dict[str, int]:
    """A processor's size times a factor; the limit of the longest edge beside a shortest one stays."""
    return {
        key: value if key == "longest_edge" and "shortest_edge" in size else max(1, round(value * factor))
        for key, value in size.items()
    }
