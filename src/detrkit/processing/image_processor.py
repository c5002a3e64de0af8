"""The image processor of all families: images and annotations in, the network's input out."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import BatchFeature, TensorType
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs

from detrkit.common.errors import AnnotationError, ImageError
from detrkit.common.files import atomic_file
from detrkit.common.schema import Target
from detrkit.processing.annotations import (
    check_annotations,
    normalize_boxes,
    pad_masks,
    prepare_detection,
    prepare_panoptic,
    resize_target,
)
from detrkit.processing.batch import fill_padding, make_pixel_mask, padded_size
from detrkit.processing.images import CHANNELS_LAST, DataFormat, ImageSources, flatten_images
from detrkit.processing.options import (
    COCO_DETECTION,
    COCO_PANOPTIC,
    OPTIONS,
    Settings,
    height_and_width,
    name_of,
    refuse_unknown,
    tensor_kind,
)
from detrkit.processing.packing import Pixels, pack
from detrkit.processing.panoptic_rule import IsThingMap
from detrkit.processing.post_processing import (
    Candidates,
    Outputs,
    TargetSizes,
    output,
    select_detections,
    softmax_detections,
)
from detrkit.processing.preparation import ImagePreparation, Plan, with_options
from detrkit.processing.resize import Resample, SizeOption, pillow_filter
from detrkit.processing.segmentation_processor import SegmentationPostProcessing

# A call also takes options that only mean something to other processors of Transformers.
KNOWN_OPTIONS = OPTIONS | frozenset(ImagesKwargs.__annotations__)

Annotations: TypeAlias = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""COCO annotations of one image or of many, from a user and not yet checked."""

Planes: TypeAlias = np.ndarray | torch.Tensor
"""The pixels of one image, (channels, height, width)."""


class DetrImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options beyond those that every image processor of Transformers takes."""

    format: str
    num_channels: int
    do_convert_annotations: bool
    exif_orientation: bool


class DetrImageProcessorBase(ImagePreparation, SegmentationPostProcessing, BaseImageProcessor):
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
        num_channels: Channels of the images, 1 for gray. By default as many as there are means and
            deviations, where these are several numbers, else 3.
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
        size: SizeOption = None,
        resample: Resample = None,
        do_rescale: bool | None = True,
        rescale_factor: float | None = 1 / 255,
        do_normalize: bool | None = True,
        image_mean: float | Sequence[float] | None = None,
        image_std: float | Sequence[float] | None = None,
        do_convert_annotations: bool | None = None,
        do_pad: bool | None = None,
        pad_size: SizeOption = None,
        exif_orientation: bool | None = False,
        is_thing_map: IsThingMap | None = None,
        num_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in OPTIONS}
        kwargs = self.take_options({**options, **kwargs})
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
        images: ImageSources,
        annotations: Annotations | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | Path | None = None,
        *,
        return_tensors: str | TensorType | None = None,
        data_format: DataFormat = None,
        input_data_format: DataFormat = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Makes the network's input, and targets from annotations; what calling the processor does.

        Args:
            images: One image or a list, gray, RGB or RGBA, channels first or last. Bytes are resized as the
                original does, real numbers without rounding; both are rescaled unless ``do_rescale=False``.
            annotations: For each image a dictionary with ``image_id`` and ``annotations`` (COCO detection) or
                with ``image_id``, ``file_name`` and ``segments_info`` (COCO panoptic).
            return_segmentation_masks: Whether targets have masks; by default if annotations are panoptic.
            masks_path: Folder of the PNG files of panoptic annotations.
            return_tensors: ``"pt"`` for tensors, ``"np"`` for arrays, None for lists of arrays.
            data_format: ``"channels_first"`` (the default) or ``"channels_last"`` for ``pixel_values``.
            input_data_format: Where arrays have their channels; found from the shape when None.
            device: Where tensors go; when None, to where the images' tensors are.
            **options: Options of the constructor, for this call.

        Returns:
            ``pixel_values`` (batch, channels, height, width), ``pixel_mask`` int64 (batch, height, width)
            with 1 for image and 0 for padding unless ``do_pad=False``, and with annotations ``labels``: a
            :class:`~detrkit.common.schema.Target` for each image.

        Raises:
            ImageError: An image cannot be read or used.
            AnnotationError: Annotations do not fit their format or image.
            ValueError: Options that are not understood; images of different sizes without padding.
            TypeError: An option that does not exist.
        """
        refuse_unknown(options, KNOWN_OPTIONS)
        settings, kind = Settings.of(self, options), tensor_kind(return_tensors)
        sources = flatten_images(images)
        if device is None and isinstance(sources[0], torch.Tensor):
            device = sources[0].device
        plan = self.plan(sources, settings, input_data_format)
        targets = None
        if annotations is not None:
            targets = _make_targets(annotations, plan, settings, return_segmentation_masks, masks_path)
        encoded = pack(plan.make(settings), kind, device, data_format)
        if targets is not None:
            encoded["labels"] = [pack(target, kind or "np", device) for target in targets]
        return encoded

    def pad(
        self,
        images: Planes | Sequence[Planes],
        annotations: Target | Sequence[Target] | None = None,
        constant_values: float = 0,
        return_pixel_mask: bool = True,
        return_tensors: str | TensorType | None = None,
        data_format: DataFormat = None,
        input_data_format: DataFormat = None,
        pad_size: SizeOption = None,
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
            **kwargs: Options of Transformers without a meaning here, such as ``update_bboxes``.

        Returns:
            ``pixel_values`` (batch, channels, height, width), ``pixel_mask`` int64 (batch, height, width),
            and ``labels`` where annotations are given.

        Raises:
            ImageError: An image does not have three dimensions.
            ValueError: An image is larger than ``pad_size``.
            TypeError: An option that does not exist.
        """
        refuse_unknown(kwargs, {*inspect.signature(self.pad).parameters, *KNOWN_OPTIONS, "update_bboxes"})
        tensors = [_as_planes(image, input_data_format) for image in _single_images(images)]
        sizes = [(t.shape[-2], t.shape[-1]) for t in tensors]
        wanted = self.pad_size if pad_size is None else pad_size
        padded = padded_size(sizes, None if wanted is None else height_and_width(wanted))
        first = tensors[0]
        batch = first.new_empty((len(tensors), first.shape[0], *padded))
        for out, tensor, (height, width) in zip(batch, tensors, sizes):
            out[:, :height, :width] = tensor
            fill_padding(out, height, width, constant_values)
        data: dict[str, Pixels] = {"pixel_values": batch}
        if return_pixel_mask:
            data["pixel_mask"] = torch.as_tensor(make_pixel_mask(sizes, padded), device=first.device)
        kind = tensor_kind(return_tensors)
        encoded = pack(data, kind, None, data_format)
        if annotations is not None:
            targets = [annotations] if isinstance(annotations, Mapping) else annotations
            encoded["labels"] = [
                pack(
                    {name: torch.as_tensor(value) for name, value in pad_masks(target, *padded).items()},
                    kind or "np",
                    None,
                )
                for target in targets
            ]
        return encoded

    def pad_and_create_pixel_mask(
        self, pixel_values_list: Sequence[Planes], return_tensors: str | TensorType | None = None
    ) -> BatchFeature:
        """Old name of :meth:`pad`."""
        return self.pad(pixel_values_list, return_tensors=return_tensors)

    def post_process_object_detection(
        self, outputs: Outputs, threshold: float = 0.5, target_sizes: TargetSizes | None = None
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
        return select_detections(self.candidates(outputs), threshold, target_sizes)

    def post_process(self, outputs: Outputs, target_sizes: TargetSizes) -> list[dict[str, torch.Tensor]]:
        """Turns a detector's outputs into boxes without a threshold, as Transformers 4 did.

        Args:
            outputs: Outputs with ``logits`` and ``pred_boxes``.
            target_sizes: (height, width) of each image in pixels.

        Returns:
            For each image ``scores``, ``labels`` and ``boxes``, xyxy in pixels, of all candidates.

        Raises:
            ValueError: The number of sizes is not that of the images.
        """
        return select_detections(self.candidates(outputs), None, target_sizes)

    def candidates(self, outputs: Outputs, top_k: int | None = None) -> Candidates:
        """How a family reads its outputs before any threshold; DETR's softmax unless it says otherwise.

        Args:
            outputs: Outputs with ``logits`` and ``pred_boxes``.
            top_k: The most candidates of an image; when None as many as the original's evaluation takes.
        """
        return softmax_detections(output(outputs, "logits"), output(outputs, "pred_boxes"), top_k)

    def object_limit(self, queries: int) -> int:
        """The most objects of an image that a detector gives, for a model with so many object queries."""
        return queries

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
        given = {k: v for k, v in kwargs.items() if k in KNOWN_OPTIONS}
        unused = {k: v for k, v in kwargs.items() if k not in KNOWN_OPTIONS}
        processor = cls(**with_options(image_processor_dict, given))
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


def _make_targets(
    annotations: Annotations,
    plan: Plan,
    settings: Settings,
    return_masks: bool | None,
    masks_path: str | Path | None,
) -> list[Target]:
    annotations = [annotations] if isinstance(annotations, Mapping) else list(annotations)
    if len(annotations) != len(plan.sizes):
        raise AnnotationError(
            f"The number of images ({len(plan.sizes)}) and annotations ({len(annotations)}) do not match."
        )
    check_annotations(annotations, settings.format)
    targets = []
    for annotation, old_size, size in zip(annotations, plan.old_sizes, plan.sizes):
        if settings.format == COCO_PANOPTIC:
            with_masks = return_masks is not False
            target = prepare_panoptic(annotation, *old_size, masks_path=masks_path, return_masks=with_masks)
        else:
            target = prepare_detection(annotation, *old_size, return_masks=bool(return_masks))
        target = resize_target(target, *size)
        if settings.do_convert_annotations:
            target = normalize_boxes(target)
        targets.append(target if plan.padded is None else pad_masks(target, *plan.padded))
    return targets


def _single_images(images: Planes | Sequence[Planes]) -> list[Planes]:
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 3:
        return [images]
    return list(images)


def _as_planes(image: Planes, input_data_format: DataFormat) -> torch.Tensor:
    tensor = image if isinstance(image, torch.Tensor) else torch.from_numpy(np.array(image))
    if tensor.ndim != 3:
        raise ImageError(f"pad() takes images of shape (channels, height, width), not {tuple(tensor.shape)}")
    if name_of(input_data_format) == CHANNELS_LAST:
        return tensor.movedim(-1, 0)
    return tensor
