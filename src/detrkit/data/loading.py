"""From a data set to a model's inputs: prepared examples, batches of similar shapes, and their order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as F

from detrkit.common.errors import ImageError
from detrkit.common.log import logger
from detrkit.common.schema import Target
from detrkit.data.augmentation import Example, Transform, random_state, stitch, unwrap_target, wrap_target
from detrkit.data.augmentation import augmentation as preset
from detrkit.data.coco import DetectionDataset
from detrkit.processing.annotations import normalize_boxes
from detrkit.processing.image_processor import DetrImageProcessorBase

_BIN = 0.25  # width of a bin of aspect ratios, in powers of two: at most 19 % of padding within one


ExampleKey: TypeAlias = tuple[int, int]
"""Epoch and index of an example. The epoch is passed with the index, so that persistent worker processes
know it."""


class PreparedExample(TypedDict):
    """One image and its objects."""

    pixel_values: torch.Tensor  # float32 (3, height, width)
    labels: Target  # with boxes cxcywh, normalised


class Batch(TypedDict, total=False):
    """What a model takes in training."""

    pixel_values: torch.Tensor  # (batch, 3, height, width)
    labels: list[Target]  # one for each image, masks padded as the images
    pixel_mask: torch.Tensor  # int64 (batch, height, width), if any: a model is faster without


class PreparedDataset(Dataset):
    """Augmented examples as a model's inputs, for a ``DataLoader``.

    The augmentation of an image depends only on ``seed``, the epoch and its index, not on the number of
    workers or processes or on the images loaded before. A resumed run therefore sees the same images.

    Args:
        dataset: Images and targets.
        processor: The model's image processor: its ``size`` is the evaluation size, and its means and
            deviations scale the pixels.
        augmentation: The name of a preset (:func:`detrkit.data.augmentation.augmentation`), or a transform of
            an image and its wrapped target.
        seed: Any non-negative number.
        mosaic: Probability of combining an image with three others before augmentation.
        strict: Raise an error for an image that cannot be read, instead of taking the next one with a
            warning.
        copies: Indices of images that occur again, after all of them; see
            :func:`detrkit.data.splitting.repeated_images`.

    Raises:
        SettingError: The preset is unknown.
        ValueError: ``mosaic`` is not a probability.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        processor: DetrImageProcessorBase,
        augmentation: str | Transform = "none",
        *,
        seed: int = 0,
        mosaic: float = 0.0,
        strict: bool = False,
        copies: Sequence[int] = (),
    ) -> None:
        if not 0 <= mosaic <= 1:
            raise ValueError(f"mosaic must be a probability from 0 to 1, not {mosaic}")
        self.dataset, self.processor = dataset, processor
        self.transform = (
            preset(augmentation, processor.size) if isinstance(augmentation, str) else augmentation
        )
        self.seed, self.mosaic, self.strict = seed, mosaic, strict
        self._images = [*range(len(dataset)), *copies]
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of the images in pixels, copies included."""
        sizes = self.dataset.sizes
        return [sizes[place] for place in self._images]

    def __getitem__(self, key: ExampleKey | int) -> PreparedExample:
        """One example.

        Args:
            key: Epoch and index, as from :class:`AspectRatioBatchSampler`, or an index in epoch 0.

        Raises:
            ImageError: No image can be read, or ``strict`` is set and this one cannot.
            AnnotationError: An annotation is invalid.
        """
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with random_state(self.seed, epoch, index):
            image, target = self.transform(*self._read(self._images[index]))
        target["size"] = torch.tensor(F.get_size(image))
        pixels = self.processor(images=[image], do_resize=False, do_pad=False, return_tensors="pt")
        return {
            "pixel_values": pixels["pixel_values"][0],
            "labels": normalize_boxes(unwrap_target(target)),
        }

    def _read(self, index: int) -> Example:
        indices = [index]
        if self.mosaic and torch.rand(()) < self.mosaic:
            indices += torch.randint(len(self.dataset), (3,)).tolist()
        examples = []
        for i in indices:
            image, target = self._readable(i)
            target.pop("keypoints", None)  # no transform here moves them
            examples.append((image, wrap_target(target)))
        return examples[0] if len(examples) == 1 else stitch(examples)

    def _readable(self, index: int) -> Example:
        """An image and its target; those of the next image that can be read, if this one cannot."""
        count = len(self.dataset)
        for step in range(count):
            place = (index + step) % count
            try:
                return self.dataset[place]
            except ImageError as error:
                if self.strict or step + 1 == count:
                    raise
                if place not in self._reported:
                    self._reported.add(place)
                    logger.warning("left out of training, the next image takes its place: %s", error)
        raise AssertionError("a data set has images")


class DetectionCollator:
    """Collates examples into a batch, padded at the bottom and right to the largest.

    Args:
        processor: The model's image processor; its ``pad_size``, if it has one, is the size to pad to.
    """

    def __init__(self, processor: DetrImageProcessorBase) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[PreparedExample]) -> Batch:
        """Makes a batch."""
        padded = self.processor.pad(
            [example["pixel_values"] for example in examples],
            annotations=[example["labels"] for example in examples],
            return_tensors="pt",
        )
        pixels = padded["pixel_values"]
        batch: Batch = {"pixel_values": pixels, "labels": [target.data for target in padded["labels"]]}
        if any(example["pixel_values"].shape[-2:] != pixels.shape[-2:] for example in examples):
            batch["pixel_mask"] = padded["pixel_mask"]
        return batch


class AspectRatioBatchSampler(Sampler[list[ExampleKey]]):
    """Batches of images with similar aspect ratios, so that there is little padding.

    Every image occurs once per epoch. The order depends only on ``seed`` and the epoch. With several
    processes, each takes every ``world_size``-th batch, and all get the same number; some batches occur twice
    if they cannot be distributed evenly. (A ``DataLoader`` prepared by accelerate distributes batches in the
    same way; its sampler must be made without ``rank`` and ``world_size``.)

    Args:
        sizes: (height, width) of the images in pixels (``DetectionDataset.sizes``).
        batch_size: Images in a batch of one process.
        shuffle: Whether to change the order of images and batches in each epoch.
        seed: Any non-negative number.
        drop_last: Whether to leave out the batch that may be smaller than the others.
        rank: Number of this process.
        world_size: Number of processes.

    Attributes:
        epoch: The epoch of the next iteration.

    Raises:
        ValueError: There are too few images for a batch, or a number is out of range.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(
                "batch_size must be at least 1 and rank a number below world_size, "
                f"not {batch_size}, {rank} and {world_size}"
            )
        if len(sizes) < (batch_size if drop_last else 1):
            raise ValueError(
                f"{len(sizes)} images are too few for a batch of {batch_size}; use a smaller batch_size, or "
                "drop_last=False"
            )
        heights, widths = np.asarray(sizes, dtype=np.float64).T
        self._bins = np.round(np.log2(widths / heights) / _BIN).astype(int)
        self.batch_size, self.shuffle, self.seed, self.drop_last = batch_size, shuffle, seed, drop_last
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the next iterations."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches of one process in an epoch."""
        images = len(self._bins)
        batches = images // self.batch_size if self.drop_last else math.ceil(images / self.batch_size)
        return math.ceil(batches / self.world_size)

    def __iter__(self) -> Iterator[list[ExampleKey]]:
        batches = self._batches()
        for place in range(self.rank, len(self) * self.world_size, self.world_size):
            yield [(self.epoch, index) for index in batches[place % len(batches)]]

    def _batches(self) -> list[list[int]]:
        """The batches of all processes in this epoch."""
        generator = np.random.default_rng((self.seed, self.epoch))
        count, size = len(self._bins), self.batch_size
        order = generator.permutation(count) if self.shuffle else np.arange(count)
        order = order[np.argsort(self._bins[order], kind="stable")]
        full: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for members in np.split(order, np.flatnonzero(np.diff(self._bins[order])) + 1):
            whole = len(members) // size * size
            full += _chunks(members[:whole], size)
            rest.append(members[whole:])
        # The rest of the bins, in the order of their aspect ratios. One of these batches may be smaller; its
        # position is random, otherwise drop_last would always leave out the widest images.
        left = np.concatenate(rest)
        short = len(left) % size
        where = int(generator.integers(len(left) // size + 1)) * size if self.shuffle else len(left) - short
        full += _chunks(left[:where], size) + _chunks(left[where + short :], size)
        if short and not self.drop_last:
            full.append(left[where : where + short])
        places = generator.permutation(len(full)) if self.shuffle else np.arange(len(full))
        return [full[place].tolist() for place in places]


def _chunks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]
