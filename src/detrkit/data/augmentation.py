"""Augmentation presets: transforms of an image and its target together, based on torchvision's v2.

A transform takes and returns an image (PIL, RGB) and a target whose boxes and masks are ``tv_tensors`` (see
:func:`wrap_target`). Torchvision's transforms can be used if they change neither the number of objects nor
the scale; the ones here update labels, areas and sizes, and resize with Pillow by the original's rule.

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
_MIN_VISIBLE = 0.1  # of a box's area; with less, an object cannot be distinguished from its neighbours


def augmentation(preset: str, size: Mapping[str, int]) -> Transform:
    """Creates the transform of a preset.

    Args:
        preset: ``"original"``: the recipe of DETR: a flip, then one of eleven sizes from 0.6 to 1 times the
            evaluation size, in half of the cases after cropping a random part.
            ``"light"``: a flip, a window of 0.75 to 1.15 times the image's sides, brightness and contrast.
            ``"strong"``: for images without an up direction, such as microscope and aerial images: flips and
            90-degree rotations, a window of 0.6 to 1.5 times the sides, brightness, contrast, saturation,
            sometimes hue.
            ``"none"``: resized as for evaluation.
        size: Evaluation size, as an image processor's ``size``. "light", "strong" and "none" return images at
            their evaluation size, so that images of one aspect ratio need no padding.

    Returns:
        A transform of an image and its target (wrapped).

    Raises:
        SettingError: ``preset`` is unknown.
    """
    if preset not in PRESETS:
        hint = did_you_mean(preset, PRESETS)
        raise SettingError(f"unknown augmentation {preset!r}; use one of: {', '.join(PRESETS)}{hint}")
    # Flipping rounds, and may move a box slightly outside the image.
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
    """A flip, slight scaling, and changes of brightness and contrast."""
    return v2.Compose(
        [
            RandomWindow(size, (0.75, 1.15)),
            v2.RandomHorizontalFlip(),  # after the window, which has fewer pixels
            v2.ColorJitter(brightness=0.2, contrast=0.2),
        ]
    )


def strong(size: dict[str, int]) -> Transform:
    """The eight flips and 90-degree rotations, scaling, and changes of colour."""
    return v2.Compose(
        [
            RandomTranspose(),
            RandomWindow(size, (0.6, 1.5)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.ColorJitter(brightness=0.25, contrast=0.25, saturation=0.25),
            v2.RandomApply([v2.ColorJitter(hue=0.03)], p=0.3),  # takes as long as all the others
        ]
    )


def none(size: dict[str, int]) -> Transform:
    """Only resizing to the evaluation size."""
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
    """Crops a random part with sides between two lengths, and removes objects outside it.

    Args:
        min_side: Minimum length of a side in pixels; the whole side if the image is shorter.
        max_side: Maximum length of a side in pixels.
    """

    def __init__(self, min_side: int, max_side: int) -> None:
        self.min_side, self.max_side = min_side, max_side

    def __call__(self, image: PIL.Image.Image, target: Target) -> Example:
        """Crops an image and its wrapped target."""
        width = _integer(min(self.min_side, image.width), min(self.max_side, image.width))
        height = _integer(min(self.min_side, image.height), min(self.max_side, image.height))
        top, left = _integer(0, image.height - height), _integer(0, image.width - width)
        return crop(image, target, top, left, height, width)


class RandomTranspose:
    """Transposes half of the images; with both flips, all 90-degree rotations are equally likely."""

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
    """Resizes a random window of the image to the evaluation size.

    The window has the sides of the original image times a random factor. A factor below 1 crops; above 1, the
    image shrinks and the rest is filled with ImageNet's mean colour. The window of a transposed image is not
    transposed, so that batches keep their shape. Objects with less than a tenth visible are removed.

    Args:
        size: The size to resize to, as an image processor's ``size``.
        factors: Minimum and maximum factor, sampled uniformly on a logarithmic scale.
    """

    def __init__(self, size: Mapping[str, int], factors: tuple[float, float]) -> None:
        self.size, self.factors = size, factors

    def __call__(self, image: PIL.Image.Image, target: Target) -> Example:
        """Returns the window of an image and its wrapped target."""
        low, high = map(math.log, self.factors)
        chosen, down, right = torch.rand(3).tolist()
        factor = math.exp(low + chosen * (high - low))
        height, width = target["orig_size"].tolist()
        out_height, out_width = size_for(height, width, self.size)
        top, bottom, above, rows = _span(image.height, height * factor, out_height, down)
        left, right_, before, columns = _span(image.width, width * factor, out_width, right)
        image, target = crop(image, target, top, left, bottom - top, right_ - left, _MIN_VISIBLE)
        image, target = resize(image, target, rows, columns)
        return pad(image, target, above, before, out_height, out_width)


def _span(length: int, window: float, out: int, position: float) -> tuple[int, int, int, int]:
    """Where a window of some pixels at a position in [0, 1] meets an image along one axis.

    Gives the first pixel of the image that is seen and the one after the last, then where these begin in the
    window after it was resized to ``out`` pixels, and their length there.
    """
    start = position * (length - window)
    first, after = max(0, round(start)), min(length, max(round(start + window), round(start) + 1))
    scale = out / window
    seen = min(out, max(1, round((after - first) * scale)))
    return first, after, min(out - seen, max(0, round(-start * scale))), seen


def wrap_target(target: Target) -> Target:
    """Wraps boxes and masks for torchvision's transforms, for an image of ``target["size"]``."""
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
    resized = resize_target(unwrap_target(target), height, width)
    return resize_image(image, height, width), wrap_target(resized)


def crop(
    image: PIL.Image.Image,
    target: Target,
    top: int,
    left: int,
    height: int,
    width: int,
    min_visible: float = 0.0,
) -> Example:
    """Crops an image and its wrapped target to some pixels.

    Boxes are clipped to the crop, and removed if less than ``min_visible`` of their area is left. The area of
    an object becomes that of its box, as in the original.
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
    """Pads an image to some pixels with ImageNet's mean colour; it begins at row ``top``, column ``left``."""
    if (height, width) == (image.height, image.width):
        return image, target
    canvas = PIL.Image.new("RGB", (width, height), _FILL)
    canvas.paste(image, (left, top))
    return canvas, wrap_target(_moved(target, top, left, height, width))


def stitch(examples: Sequence[Example]) -> Example:
    """Combines four images in a two-by-two mosaic, so that crops show objects in new surroundings.

    Args:
        examples: Four images with wrapped targets. Each cell is as large as the first image; the others are
            resized to fit it, keeping their aspect ratio.

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
    """Seeds torch's generator from these non-negative numbers within the block; restores it afterwards."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(state))
        yield


def _moved(target: Target, top: int, left: int, height: int, width: int) -> Target:
    """The unwrapped target of an image that was padded to a height and width."""
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


def _integer(low: int, high: int) -> int:
    """A random integer from ``low`` to ``high``, inclusive."""
    return int(torch.randint(low, high + 1, ()))


def _scaled(size: Mapping[str, int], factor: float) -> dict[str, int]:
    """A processor's size times a factor; does not scale a longest edge that limits a shortest one."""
    return {
        key: value if key == "longest_edge" and "shortest_edge" in size else max(1, round(value * factor))
        for key, value in size.items()
    }
