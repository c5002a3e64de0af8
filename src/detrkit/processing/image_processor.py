"""The image processor of the three families: images and annotations in, the network's input out."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from detrkit.common.errors import AnnotationError, ImageError
from detrkit.common.files import atomic_file
from detrkit.common.text import did_you_mean
from detrkit.processing.annotations import (
    COCO_DETECTION,
    COCO_PANOPTIC,
    Target,
    check_annotations,
    normalize_boxes,
    pad_masks,
    prepare_detection,
    prepare_panoptic,
    resize_target,
)
from detrkit.processing.images import CHANNELS_FIRST, CHANNELS_LAST, Raster, flatten_images, to_raster
from detrkit.processing.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelScaling, write_pixels
from detrkit.processing.post_processing import Candidates, TargetSizes, select_detections, softmax_detections
from detrkit.processing.resize import (
    MAX_RESIZED_PIXELS,
    Box,
    independent_parts,
    normalize_size,
    pillow_filter,
    size_for,
)
from detrkit.processing.segmentation import IsThingMap, normalize_is_thing_map
from detrkit.processing.segmentation_processor import SegmentationPostProcessing

logger = logging.getLogger("detrkit")

# Options that a processor keeps, writes to its JSON file, and takes again in each call.
_OPTIONS = (
    "format",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_annotations",
    "do_pad",
    "pad_size",
    "exif_orientation",
    "is_thing_map",
)
# Names that a call takes besides: old ones, and those that only mean something to other processors.
_OTHER_OPTIONS = ("max_size", "pad_and_return_pixel_mask", *ImagesKwargs.__annotations__)


class DetrImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options beyond those that every image processor of Transformers takes."""

    format: str
    do_convert_annotations: bool
    exif_orientation: bool


@dataclass(frozen=True)
class _Settings:
    """The options of one call, checked and in one form."""

    format: str
    size: dict[str, int] | None  # None: images keep their size
    resample: Any
    scaling: PixelScaling | None
    do_convert_annotations: bool
    do_pad: bool
    pad_size: tuple[int, int] | None
    exif_orientation: bool


class DetrImageProcessorBase(SegmentationPostProcessing, BaseImageProcessor):
    """Turns images into the network's input and its outputs into detections, with the original's numbers.

    Every option can be given once here and again in a call, where it holds for that call only.

    Args:
        format: Format of annotations, ``"coco_detection"`` or ``"coco_panoptic"``.
        do_resize: Whether to resize.
        size: Size after resizing, in pixels: ``{"shortest_edge": 800, "longest_edge": 1333}`` (the default),
            an int for the shorter edge, ``{"shortest_edge": ...}`` without a limit for the longer one,
            ``{"height": ..., "width": ...}``, or ``{"max_height": ..., "max_width": ...}``.
        resample: Filter of the resizing, as Pillow numbers them; bilinear by default.
        do_rescale: Whether to multiply pixels by ``rescale_factor``.
        rescale_factor: The factor.
        do_normalize: Whether to subtract ``image_mean`` and divide by ``image_std``.
        image_mean: Means of the channels after rescaling; ImageNet's by default.
        image_std: Standard deviations of the channels after rescaling; ImageNet's by default.
        do_convert_annotations: Whether boxes of targets become cxcywh, normalised to the unpadded image,
            instead of xyxy in pixels. As ``do_normalize`` by default.
        do_pad: Whether to pad the images of a batch at the bottom and right to one size and give a pixel
            mask.
        pad_size: Size to pad to, ``{"height": ..., "width": ...}``; the largest of the batch when None.
        exif_orientation: Whether to turn images upright as their EXIF orientation says. Off by default: the
            original and COCO's boxes refer to the pixels as stored.
        is_thing_map: Whether a class is a thing (True) or stuff (False), by label, for panoptic segmentation
            of another data set than COCO. COCO's category ids up to 90 are things by default.
        **kwargs: ``max_size`` (the old name for the longest edge), ``pad_and_return_pixel_mask`` (the old
            name for ``do_pad``), and anything else that a JSON file holds, which is kept.

    Raises:
        ValueError: A size or map that is not understood.
    """

    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - a list in Transformers too
    valid_kwargs = DetrImageProcessorKwargs
    default_to_square = False

    # The class name that preprocessor_config.json carries, whichever alias wrote it: every version of
    # Transformers finds a class by it.
    _json_class_name = "DetrImageProcessor"

    def __init__(
        self,
        format: str | None = COCO_DETECTION,
        do_resize: bool | None = True,
        size: Any = None,
        resample: Any = None,
        do_rescale: bool | None = True,
        rescale_factor: float | None = 1 / 255,
        do_normalize: bool | None = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_annotations: bool | None = None,
        do_pad: bool | None = None,
        pad_size: Any = None,
        exif_orientation: bool | None = False,
        is_thing_map: IsThingMap | None = None,
        **kwargs: Any,
    ) -> None:
        old_do_pad = kwargs.pop("pad_and_return_pixel_mask", None)
        self.format = _annotation_format(format) or COCO_DETECTION
        self.do_resize = _or(do_resize, True)
        self.size = normalize_size(size, kwargs.pop("max_size", None))
        self.resample = PIL.Image.Resampling.BILINEAR if resample is None else resample
        self.do_rescale = _or(do_rescale, True)
        self.rescale_factor = _or(rescale_factor, 1 / 255)
        self.do_normalize = _or(do_normalize, True)
        self.image_mean = _or(image_mean, list(IMAGENET_MEAN))
        self.image_std = _or(image_std, list(IMAGENET_STD))
        self.do_convert_annotations = _or(do_convert_annotations, self.do_normalize)
        self.do_pad = _or(do_pad, _or(old_do_pad, True))
        self.pad_size = None if pad_size is None else _pad_size_dict(pad_size)
        self.exif_orientation = bool(exif_orientation)
        self.is_thing_map = None if is_thing_map is None else normalize_is_thing_map(is_thing_map)
        # What else a file holds: kept where it says something and hides no method.
        for name in ("image_processor_type", "feature_extractor_type", "processor_class"):
            kwargs.pop(name, None)
        super().__init__(
            **{
                k: v
                for k, v in kwargs.items()
                if v is not None and not callable(getattr(type(self), k, None))
            }
        )

    def preprocess(
        self,
        images: Any,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | Path | None = None,
        *,
        return_tensors: Any = None,
        data_format: Any = None,
        input_data_format: Any = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Makes the network's input, and targets from annotations; what calling the processor does.

        Args:
            images: One image or a list: paths, URLs, PIL images, arrays or tensors, gray, RGB or RGBA,
                channels first or last. Bytes are resized as the original does; arrays of real numbers are
                resized without rounding, and rescaled as bytes are unless ``do_rescale=False``.
            annotations: For each image a dictionary with ``image_id`` and ``annotations`` (COCO detection) or
                with ``image_id``, ``file_name`` and ``segments_info`` (COCO panoptic).
            return_segmentation_masks: Whether targets have masks; by default those of panoptic annotations
                do.
            masks_path: Folder of the PNG files of panoptic annotations.
            return_tensors: ``"pt"`` for tensors, ``"np"`` for arrays, None for lists of arrays.
            data_format: ``"channels_first"`` (the default) or ``"channels_last"`` for ``pixel_values``.
            input_data_format: Where arrays have their channels; found from the shape when None.
            device: Where tensors go; when None, to where the images' tensors are.
            **options: Options of the constructor, for this call.

        Returns:
            ``pixel_values`` (batch, 3, height, width), ``pixel_mask`` int64 (batch, height, width) with 1 for
            image and 0 for padding unless ``do_pad=False``, and with annotations ``labels``: for each image
            ``image_id``, ``class_labels``, ``boxes`` (normalised to the image without its padding), ``area``,
            ``iscrowd``, ``orig_size`` and ``size`` (height, width; without padding), and on request ``masks``
            (padded as the images).

        Raises:
            ImageError: An image cannot be read or used.
            AnnotationError: Annotations do not fit their format or image.
            ValueError: Options that are not understood; images of different sizes without padding.
            TypeError: A misspelt option.
        """
        settings = self._settings(options)
        kind = _tensor_kind(return_tensors)
        sources = flatten_images(images)
        rasters = [
            to_raster(source, input_data_format=input_data_format, exif_orientation=settings.exif_orientation)
            for source in sources
        ]
        if device is None and isinstance(sources[0], torch.Tensor):
            device = sources[0].device

        old_sizes = [_size_of(raster) for raster in rasters]
        sizes = [size if settings.size is None else size_for(*size, settings.size) for size in old_sizes]
        padded = _padded_size(sizes, settings.pad_size) if settings.do_pad else None

        targets = None
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
            targets = _make_targets(
                annotations, old_sizes, sizes, padded, settings, return_segmentation_masks, masks_path
            )

        data: dict[str, Any] = {"pixel_values": _make_pixels(rasters, sizes, padded, settings)}
        if padded is not None:
            data["pixel_mask"] = make_pixel_mask(sizes, padded)
        encoded = _pack(data, kind, device, data_format)
        if targets is not None:
            encoded["labels"] = [_pack(target, kind or "np", device) for target in targets]
        return encoded

    def pad(
        self,
        images: Sequence[Any],
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        constant_values: float = 0,
        return_pixel_mask: bool = True,
        return_tensors: Any = None,
        data_format: Any = None,
        input_data_format: Any = None,
        pad_size: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pads prepared images at the bottom and right to one size, as a collator does.

        Args:
            images: ``pixel_values`` of single images: arrays or tensors (channels, height, width).
            annotations: Their targets. Masks are padded; boxes stay, as they refer to the unpadded images.
            constant_values: What to pad with.
            return_pixel_mask: Whether to give the mask of the pixels that are no padding.
            return_tensors: ``"pt"`` for tensors, ``"np"`` for arrays, None for lists of arrays.
            data_format: ``"channels_first"`` (the default) or ``"channels_last"`` for the result.
            input_data_format: ``"channels_first"`` (the default) or ``"channels_last"`` for ``images``.
            pad_size: Size to pad to; that of the processor, or else the largest of the images, when None.
            **kwargs: Options of Transformers without a meaning here.

        Returns:
            ``pixel_values`` (batch, channels, height, width), ``pixel_mask`` int64 (batch, height, width),
            and ``labels`` where annotations are given.

        Raises:
            ImageError: An image does not have three dimensions.
            ValueError: An image is larger than ``pad_size``.
        """
        tensors = [_as_planes(image, input_data_format) for image in _single_images(images)]
        sizes = [(t.shape[-2], t.shape[-1]) for t in tensors]
        wanted = self.pad_size if pad_size is None else _pad_size_dict(pad_size)
        padded = _padded_size(sizes, _pair(wanted))
        first = tensors[0]
        batch = first.new_empty((len(tensors), first.shape[0], *padded))
        for out, tensor, (height, width) in zip(batch, tensors, sizes):
            out[:, :height, :width] = tensor
            _fill_padding(out, height, width, constant_values)
        data: dict[str, Any] = {"pixel_values": batch}
        if return_pixel_mask:
            data["pixel_mask"] = torch.as_tensor(make_pixel_mask(sizes, padded), device=first.device)
        kind = _tensor_kind(return_tensors)
        encoded = _pack(data, kind, None, data_format)
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
            targets = [{k: torch.as_tensor(v) for k, v in annotation.items()} for annotation in annotations]
            encoded["labels"] = [_pack(pad_masks(target, *padded), kind or "np", None) for target in targets]
        return encoded

    def pad_and_create_pixel_mask(
        self, pixel_values_list: Sequence[Any], return_tensors: Any = None
    ) -> BatchFeature:
        """Old name of :meth:`pad`."""
        return self.pad(pixel_values_list, return_tensors=return_tensors)

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: TargetSizes | None = None
    ) -> list[dict[str, torch.Tensor]]:
        """Turns a detector's outputs into boxes.

        Args:
            outputs: Outputs with ``logits`` and ``pred_boxes``.
            threshold: Least score of a detection (exclusive).
            target_sizes: (height, width) of each image in pixels, as a tensor (batch, 2) or a list.

        Returns:
            For each image ``scores`` (n,), ``labels`` (n,) and ``boxes`` (n, 4), xyxy; in pixels of
            ``target_sizes``, or normalised without it.

        Raises:
            ValueError: The number of sizes is not that of the images.
        """
        return select_detections(self._candidates(outputs), threshold, target_sizes)

    def post_process(self, outputs: Any, target_sizes: TargetSizes) -> list[dict[str, torch.Tensor]]:
        """Turns a detector's outputs into boxes without a threshold, as Transformers 4 did.

        Args:
            outputs: Outputs with ``logits`` and ``pred_boxes``.
            target_sizes: (height, width) of each image in pixels.

        Returns:
            For each image ``scores``, ``labels`` and ``boxes``, xyxy in pixels, of all candidates.

        Raises:
            ValueError: The number of sizes is not that of the images.
        """
        return select_detections(self._candidates(outputs), None, target_sizes)

    def _candidates(self, outputs: Any) -> Candidates:
        """How a family reads its outputs; DETR's softmax unless it says otherwise."""
        return softmax_detections(_output(outputs, "logits"), _output(outputs, "pred_boxes"))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a processor from a JSON file's contents.

        Args:
            image_processor_dict: The contents, of any age.
            **kwargs: Options that take the place of those; with ``return_unused_kwargs=True`` the rest comes
                back.

        Returns:
            The processor, or the processor and the options that it does not know.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        known = {*_OPTIONS, *_OTHER_OPTIONS}
        given = {k: v for k, v in kwargs.items() if k in known}
        unused = {k: v for k, v in kwargs.items() if k not in known}
        values = {**image_processor_dict, **given}
        if "size" in given and "max_size" not in given:
            values.pop("max_size", None)  # it belongs to the size that is replaced
        if "pad_and_return_pixel_mask" in given and "do_pad" not in given:
            values["do_pad"] = given["pad_and_return_pixel_mask"]
        processor = cls(**values)
        return (processor, unused) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """The processor as the contents of a JSON file that Transformers 4 and 5 load."""
        values = {
            k: copy.deepcopy(v) for k, v in self.__dict__.items() if v is not None and not k.startswith("_")
        }
        values["resample"] = int(pillow_filter(self.resample))
        if not self.exif_orientation:
            del values["exif_orientation"]
        values["image_processor_type"] = self._json_class_name
        return {k: list(v) if isinstance(v, (tuple, np.ndarray)) else v for k, v in values.items()}

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes the processor's JSON file."""
        with atomic_file(json_file_path) as path:
            path.write_text(self.to_json_string(), encoding="utf-8")

    def check(self) -> None:
        """Looks at the options, which are otherwise looked at with the first image.

        Raises:
            ValueError: One is out of range.
            TypeError: One is of a type that it cannot be.
        """
        pillow_filter(self._settings({}).resample)

    def _settings(self, options: dict[str, Any]) -> _Settings:
        """The options of a call, those of the processor where it gives none."""
        _refuse_misspelt(options)
        max_size = options.get("max_size")
        values = {name: _or(options.get(name), getattr(self, name)) for name in _OPTIONS}
        if options.get("do_pad") is None:
            values["do_pad"] = _or(options.get("pad_and_return_pixel_mask"), self.do_pad)
        size = None
        if values["do_resize"]:
            size = normalize_size(values["size"], max_size)
        pad_size = values["pad_size"]
        return _Settings(
            format=_annotation_format(values["format"]) or COCO_DETECTION,
            size=size,
            resample=values["resample"],
            scaling=PixelScaling.of(
                values["rescale_factor"] if values["do_rescale"] else None,
                values["image_mean"] if values["do_normalize"] else None,
                values["image_std"] if values["do_normalize"] else None,
            ),
            do_convert_annotations=bool(values["do_convert_annotations"]),
            do_pad=bool(values["do_pad"]),
            pad_size=None if pad_size is None else _pair(_pad_size_dict(pad_size)),
            exif_orientation=bool(values["exif_orientation"]),
        )


def make_pixel_mask(sizes: Sequence[tuple[int, int]], padded: tuple[int, int]) -> np.ndarray:
    """Mask of a batch: int64 (batch, height, width), 1 for image and 0 for padding.

    Args:
        sizes: (height, width) of each image in pixels.
        padded: (height, width) of the batch in pixels.
    """
    mask = np.empty((len(sizes), *padded), dtype=np.int64)
    for image_mask, (height, width) in zip(mask, sizes):
        image_mask[:height, :width] = 1
        _fill_padding(image_mask, height, width, 0)
    return mask


def _make_pixels(
    rasters: Sequence[Raster],
    sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int] | None,
    settings: _Settings,
) -> np.ndarray | list[np.ndarray]:
    """Pixels of a batch as one array, or a list where sizes differ and nothing is padded."""
    is_bytes = settings.scaling is None and all(isinstance(raster, PIL.Image.Image) for raster in rasters)
    dtype = np.uint8 if is_bytes else np.float32
    batch: np.ndarray | list[np.ndarray]
    if padded is None and len(set(sizes)) > 1:
        batch = [np.empty((3, *size), dtype) for size in sizes]
    else:
        # One allocation that every image writes into: nothing is copied to be stacked or padded. It is
        # NumPy's, as that asks Linux for huge pages where torch does not, and a large batch is written in
        # half the time.
        batch = np.empty((len(sizes), 3, *(padded or sizes[0])), dtype)

    jobs = []
    threads = torch.get_num_threads()
    for out, raster, size in zip(batch, rasters, sizes):
        inside = out[:, : size[0], : size[1]]
        _fill_padding(out, *size, 0)
        parts: list[Box | None] = [None]
        if isinstance(raster, PIL.Image.Image):
            # A few images are split among the threads; of many each thread takes whole ones.
            parts = [*independent_parts(raster, *size, threads // len(rasters), settings.resample)]
        for part in parts:
            options = {"part": part, "resample": settings.resample, "scaling": settings.scaling}
            jobs.append(partial(write_pixels, raster, size, inside, **options))
    _run_all(jobs, threads)
    return batch


_helpers: dict[int, ThreadPoolExecutor] = {}


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


def _make_targets(
    annotations: list[Any],
    old_sizes: Sequence[tuple[int, int]],
    sizes: Sequence[tuple[int, int]],
    padded: tuple[int, int] | None,
    settings: _Settings,
    return_masks: bool | None,
    masks_path: str | Path | None,
) -> list[Target]:
    if len(annotations) != len(sizes):
        raise AnnotationError(
            f"The number of images ({len(sizes)}) and annotations ({len(annotations)}) do not match."
        )
    check_annotations(annotations, settings.format)
    targets = []
    for annotation, old_size, size in zip(annotations, old_sizes, sizes):
        if settings.format == COCO_PANOPTIC:
            with_masks = return_masks is not False
            target = prepare_panoptic(annotation, *old_size, masks_path=masks_path, return_masks=with_masks)
        else:
            target = prepare_detection(annotation, *old_size, return_masks=bool(return_masks))
        target = resize_target(target, *size)
        if settings.do_convert_annotations:
            target = normalize_boxes(target)
        targets.append(target if padded is None else pad_masks(target, *padded))
    return targets


def _fill_padding(image: Any, height: int, width: int, value: float) -> None:
    """Fills what lies below ``height`` and right of ``width`` of an image (..., height, width)."""
    image[..., height:, :] = value
    image[..., :height, width:] = value


def _padded_size(sizes: Sequence[tuple[int, int]], pad_size: tuple[int, int] | None) -> tuple[int, int]:
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


def _pack(
    data: Mapping[str, Any], kind: str | None, device: torch.device | str | None, data_format: Any = None
) -> BatchFeature:
    """Arrays and tensors of a batch in the form that was asked for."""
    packed: dict[str, Any] = {}
    for name, value in data.items():
        if name == "pixel_values":
            value = _with_channels(value, data_format)
        if kind is not None and isinstance(value, list):
            raise ValueError(
                "images of different sizes cannot be one tensor; use do_pad=True, or leave return_tensors out"
            )
        if kind == "pt":
            packed[name] = torch.as_tensor(value, device=device)
        elif kind == "np":
            packed[name] = _to_array(value)
        else:
            packed[name] = [_to_array(single) for single in value]
    return BatchFeature(packed)


def _to_array(value: np.ndarray | torch.Tensor) -> np.ndarray:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def _with_channels(images: Any, data_format: Any) -> Any:
    """A batch, or list of images, with its channels where ``data_format`` wants them."""
    layout = getattr(data_format, "value", data_format)
    if layout in (None, CHANNELS_FIRST):
        return images
    if layout != CHANNELS_LAST:
        raise ValueError(f"data_format must be {CHANNELS_FIRST!r} or {CHANNELS_LAST!r}, not {layout!r}")
    if isinstance(images, list):
        return [np.moveaxis(image, 0, -1) for image in images]
    return torch.as_tensor(images).movedim(1, -1)


def _size_of(raster: Raster) -> tuple[int, int]:
    """(height, width) of an image."""
    if isinstance(raster, PIL.Image.Image):
        return raster.height, raster.width
    return raster.shape[-2], raster.shape[-1]


def _single_images(images: Any) -> list[Any]:
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 3:
        return [images]
    return list(images)


def _as_planes(image: Any, input_data_format: Any) -> torch.Tensor:
    tensor = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
    if tensor.ndim != 3:
        raise ImageError(f"pad() takes images of shape (channels, height, width), not {tuple(tensor.shape)}")
    if getattr(input_data_format, "value", input_data_format) == CHANNELS_LAST:
        return tensor.movedim(-1, 0)
    return tensor


def _output(outputs: Any, name: str) -> torch.Tensor:
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name)


def _tensor_kind(return_tensors: Any) -> str | None:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind not in (None, "pt", "np"):
        raise ValueError(f"return_tensors must be 'pt', 'np' or None, not {kind!r}")
    return kind


def _annotation_format(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def _pad_size_dict(pad_size: Any) -> dict[str, int]:
    if isinstance(pad_size, int):
        pad_size = (pad_size, pad_size)
    size = normalize_size(pad_size)
    if set(size) != {"height", "width"}:
        raise ValueError(f"pad_size must have the keys height and width, not {', '.join(size)}")
    return size


def _pair(size: Mapping[str, int] | None) -> tuple[int, int] | None:
    return None if size is None else (size["height"], size["width"])


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _refuse_misspelt(options: Mapping[str, Any]) -> None:
    """Raises for an unknown option that is nearly a known one; others are let pass, as by Transformers."""
    known = {*_OPTIONS, *_OTHER_OPTIONS}
    for name in options.keys() - known:
        suggestion = did_you_mean(name, known, cutoff=0.8)
        if suggestion:
            raise TypeError(f"unknown option {name!r}{suggestion}")
        logger.debug("option %r is not known to this image processor and is ignored", name)
