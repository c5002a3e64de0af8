"""The image processor of exported models: arrays in and out, with NumPy and Pillow alone.

It is made of the same ``preprocessor_config.json`` as the processors of Transformers' interface, makes the
same pixels (:class:`~detrkit.processing.preparation.ImagePreparation`), and reads a model's outputs by the
same rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.common.schema import Segment
from detrkit.common.without_torch import require_torch
from detrkit.processing.array_post_processing import (
    TOP_K,
    ArrayCandidates,
    sigmoid,
    sigmoid_candidates,
    softmax,
    softmax_candidates,
)
from detrkit.processing.array_segmentation import masks_above, panoptic_map
from detrkit.processing.images import ImageSources, flatten_images
from detrkit.processing.options import OPTIONS, Settings, default, refuse_unknown
from detrkit.processing.panoptic_rule import (
    PANOPTIC_THRESHOLD,
    IsThingMap,
    PanopticRule,
    check_thresholds,
    logits_and_masks,
    mask_sizes,
    resolve_is_thing_map,
)
from detrkit.processing.preparation import ImagePreparation, with_options

ArrayOutputs: TypeAlias = Mapping[str, np.ndarray]
"""A model's outputs by name."""

_Sizes: TypeAlias = Sequence[tuple[int, int]]


class ArrayImageProcessor(ImagePreparation):
    """Turns images into an exported model's input and its outputs into candidates and masks.

    Args:
        class_scores: "softmax" over the classes and no-object, or a "sigmoid" for each class, as the family
            of the model has it.
        **options: The contents of ``preprocessor_config.json``, of any age; what it does not know is ignored.

    Raises:
        ValueError: An option is not understood.
    """

    def __init__(self, class_scores: Literal["softmax", "sigmoid"], **options: Any) -> None:
        self.class_scores = class_scores
        self.take_options(options)

    @classmethod
    def of(cls, processor: Any, class_scores: Literal["softmax", "sigmoid"]) -> ArrayImageProcessor:
        """The processor with the options of one of Transformers' interface."""
        if isinstance(processor, cls):
            return processor
        return cls(class_scores, **processor.to_dict())

    def __call__(
        self, images: ImageSources, return_tensors: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Makes the network's input.

        Args:
            images: One image or a list of them.
            return_tensors: "np" for arrays, the default, or "pt" for tensors, which need PyTorch.
            **options: Options of the constructor, for this call.

        Returns:
            ``pixel_values`` float32 (batch, channels, height, width) and, unless ``do_pad=False``,
            ``pixel_mask`` int64 (batch, height, width) with 1 for image and 0 for padding.

        Raises:
            ImageError: An image cannot be read or used.
            SettingError: An option that does not exist, or images of different sizes without padding.
            ValueError: An option that is not understood.
        """
        refuse_unknown(options, OPTIONS)
        if return_tensors not in (None, "np", "pt"):
            raise SettingError(f"return_tensors must be 'np' or 'pt', not {return_tensors!r}")
        settings = Settings.of(self, with_options({}, options))
        made: dict[str, np.ndarray] = {}
        for name, value in self.plan(flatten_images(images), settings).make(settings).items():
            if isinstance(value, list):
                raise SettingError("images of different sizes cannot be one batch; use do_pad=True")
            made[name] = value
        if return_tensors != "pt":
            return made
        require_torch("return_tensors='pt'")
        import torch

        return {name: torch.from_numpy(value) for name, value in made.items()}

    def candidates(self, outputs: ArrayOutputs, top_k: int | None = None) -> ArrayCandidates:
        """Scored boxes of a batch before any threshold.

        Args:
            outputs: Arrays with the names ``logits`` and ``pred_boxes``.
            top_k: The most candidates of an image; when None as many as the original's evaluation takes.
        """
        if self.class_scores == "sigmoid":
            return sigmoid_candidates(outputs["logits"], outputs["pred_boxes"], default(top_k, TOP_K))
        return softmax_candidates(outputs["logits"], outputs["pred_boxes"], top_k)

    def object_limit(self, queries: int) -> int:
        """The most objects of an image that a detector gives, for a model with so many object queries."""
        return max(queries, TOP_K) if self.class_scores == "sigmoid" else queries

    def query_probabilities(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities without "no object", and which queries are likelier an object of one class than none.

        Args:
            logits: (batch, queries, classes).

        Returns:
            float32 (batch, queries, classes) and bool (batch, queries).
        """
        if self.class_scores == "sigmoid":
            return sigmoid(logits), np.ones(logits.shape[:2], bool)
        probabilities = softmax(logits)
        return probabilities[..., :-1], probabilities.argmax(-1) != logits.shape[-1] - 1

    def detection_masks(
        self,
        outputs: ArrayOutputs,
        queries: Sequence[np.ndarray],
        processed_sizes: _Sizes,
        target_sizes: _Sizes,
        padded_size: tuple[int, int] | None = None,
    ) -> list[np.ndarray]:
        """The masks of detections.

        Args:
            outputs: Arrays with the names ``logits`` and ``pred_masks``.
            queries: For each image the rows of the outputs behind its detections.
            processed_sizes: Sizes of the images as the model saw them, without padding.
            target_sizes: Sizes of the results.
            padded_size: Size of the batch with padding.

        Returns:
            For each image bool (n, height, width).
        """
        _, masks = logits_and_masks(outputs)
        sizes = mask_sizes(masks, processed_sizes, target_sizes, padded_size)
        return [masks_above(own[rows], size) for own, rows, size in zip(masks, queries, sizes)]

    def panoptic_maps(
        self,
        outputs: ArrayOutputs,
        processed_sizes: _Sizes,
        target_sizes: _Sizes | None = None,
        threshold: float = PANOPTIC_THRESHOLD,
        is_thing_map: IsThingMap | None = None,
        padded_size: tuple[int, int] | None = None,
    ) -> list[tuple[np.ndarray, list[Segment]]]:
        """Panoptic segmentations by the original's algorithm, with padding cropped.

        Args:
            outputs: Arrays with the names ``logits`` and ``pred_masks``.
            processed_sizes: Sizes of the images as the model saw them, without padding.
            target_sizes: Sizes of the results.
            threshold: Score above which a query can become a segment, in [0, 1].
            is_thing_map: Whether a class is a thing, by label; the processor's or else COCO's when None.
            padded_size: Size of the batch with padding.

        Returns:
            For each image ids, int32 (height, width) with 0 where there is no segment, and its segments.
        """
        check_thresholds(threshold=threshold)
        logits, masks = logits_and_masks(outputs)
        rule = PanopticRule.of(resolve_is_thing_map(is_thing_map, self.is_thing_map))
        probabilities, is_object = self.query_probabilities(logits)
        scores, labels = probabilities.max(-1), probabilities.argmax(-1)
        kept = is_object & (scores > threshold)
        sizes = mask_sizes(masks, processed_sizes, target_sizes, padded_size)
        return [
            panoptic_map(image_scores[keep], image_labels[keep], image_masks[keep], size, rule)
            for image_scores, image_labels, image_masks, keep, size in zip(scores, labels, masks, kept, sizes)
        ]
