"""A batch of images as one array: pixels and their mask, with padding."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image

from detrkit.common.errors import ImageError
from detrkit.common.without_torch import thread_count
from detrkit.processing.images import Raster
from detrkit.processing.options import Settings
from detrkit.processing.pixels import write_pixels
from detrkit.processing.resize import MAX_RESIZED_PIXELS, Box, Size, independent_parts

if TYPE_CHECKING:
    import torch


def make_pixel_mask(sizes: Sequence[Size], padded: Size) -> np.ndarray:
    """Mask of a batch: int64 (batch, height, width), 1 for image and 0 for padding.

    Args:
        sizes: (height, width) of each image in pixels.
        padded: (height, width) of the batch in pixels.
    """
    mask = np.empty((len(sizes), *padded), dtype=np.int64)
    for image_mask, (height, width) in zip(mask, sizes):
        image_mask[:height, :width] = 1
        fill_padding(image_mask, height, width, 0)
    return mask


def make_pixels(
    rasters: Sequence[Raster],
    sizes: Sequence[Size],
    padded: Size | None,
    settings: Settings,
) -> np.ndarray | list[np.ndarray]:
    """Pixels of a batch as one array, or a list where sizes differ and nothing is padded."""
    is_bytes = settings.scaling is None and all(isinstance(raster, PIL.Image.Image) for raster in rasters)
    dtype = np.uint8 if is_bytes else np.float32
    batch: np.ndarray | list[np.ndarray]
    if padded is None and len(set(sizes)) > 1:
        batch = [np.empty((settings.channels, *size), dtype) for size in sizes]
    else:
        # One allocation that every image writes into: nothing is copied to be stacked or padded. It is
        # NumPy's, as that asks Linux for huge pages where torch does not, and a large batch is written in
        # half the time.
        batch = np.empty((len(sizes), settings.channels, *(padded or sizes[0])), dtype)

    jobs = []
    threads = _threads.get() or thread_count()
    for out, raster, size in zip(batch, rasters, sizes):
        inside = out[:, : size[0], : size[1]]
        fill_padding(out, *size, 0)
        parts: list[Box | None] = [None]
        if isinstance(raster, PIL.Image.Image):
            # A few images are split among the threads; of many each thread takes whole ones.
            parts = [*independent_parts(raster, *size, threads // len(rasters), settings.resample)]
        for part in parts:
            how = (part, settings.resample, settings.scaling)
            jobs.append(partial(write_pixels, raster, size, inside, *how))
    _run_all(jobs, threads)
    return batch


_helpers: dict[int, ThreadPoolExecutor] = {}

# How many threads share the images of a call; None for as many as PyTorch uses.
_threads: ContextVar[int | None] = ContextVar("threads", default=None)


@contextmanager
def image_threads(count: int | None) -> Iterator[None]:
    """Inside this block calls of processors use so many threads: one where many images are read at once."""
    token = _threads.set(count)
    try:
        yield
    finally:
        _threads.reset(token)


def _helper_threads() -> ThreadPoolExecutor:
    """Threads of this process: one that was forked has none of its parent's, so each makes its own."""
    process = os.getpid()
    if process not in _helpers:
        _helpers.clear()
        _helpers[process] = ThreadPoolExecutor(max((os.cpu_count() or 1) - 1, 1))
    return _helpers[process]


def _run_all(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Runs jobs in this thread and its helpers; Pillow and NumPy let go of the interpreter meanwhile."""
    # Taking the next item of an iterator is one step for the interpreter, so no job is taken twice.
    todo = iter(jobs)

    def work() -> None:
        for job in todo:
            job()

    helpers = min(threads, len(jobs)) - 1
    waiting = [_helper_threads().submit(work) for _ in range(helpers)]
    try:
        work()
    finally:
        for future in waiting:
            future.result()


def fill_padding(image: np.ndarray | torch.Tensor, height: int, width: int, value: float) -> None:
    """Fills what is below ``height`` and right of ``width`` of an image (..., height, width)."""
    image[..., height:, :] = value
    image[..., :height, width:] = value


def padded_size(sizes: Sequence[Size], pad_size: Size | None) -> Size:
    """(height, width) of a batch with padding: ``pad_size``, or else that of the largest image.

    Raises:
        ValueError: An image is larger than ``pad_size``.
        ImageError: ``pad_size`` has too many pixels.
    """
    largest = max(height for height, _ in sizes), max(width for _, width in sizes)
    if pad_size is None:
        return largest
    if pad_size[0] * pad_size[1] > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"pad_size (height {pad_size[0]}, width {pad_size[1]}) is more than {MAX_RESIZED_PIXELS} pixels"
        )
    if pad_size[0] < largest[0] or pad_size[1] < largest[1]:
        raise ValueError(
            f"pad_size (height {pad_size[0]}, width {pad_size[1]}) is smaller than an image of the batch "
            f"(up to height {largest[0]}, width {largest[1]})"
        )
    return pad_size
