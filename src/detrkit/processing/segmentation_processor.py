"""An image processor's methods that turn masks into instance, semantic and panoptic segmentations.

Outputs need ``logits`` (batch, queries, classes) and ``pred_masks`` (batch, queries, h, w), mask logits over
the batch with its padding, of all queries or of any number of them. The images of a padded batch need
``processed_sizes``, (height, width) of each image as the model saw it, without padding: their
masks are cropped to it. Without it an image is taken to fill the batch, and its masks go straight to the
target size.

One convention holds for all maps of segments: int32, ids from 1, and 0 where there is no segment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from transformers import BatchFeature

from detrkit.common.schema import Segment
from detrkit.processing.options import default
from detrkit.processing.panoptic_png import encode_panoptic_png
from detrkit.processing.panoptic_rule import (
    PANOPTIC_THRESHOLD,
    IsThingMap,
    PanopticRule,
    check_thresholds,
    logits_and_masks,
    mask_sizes,
    pixel_centres,
    pixel_corners,
    resolve_is_thing_map,
)
from detrkit.processing.post_processing import Outputs, TargetSizes, best_queries, check_classes
from detrkit.processing.segmentation import (
    LabelledSegment,
    MaskGrid,
    PanopticPng,
    Segmentation,
    instance_masks,
    instance_segments,
    panoptic_segments,
    run_lengths,
    semantic_map,
    semantic_scores,
)


class _Image(NamedTuple):
    """One image of a batch: its queries above a threshold, and how their masks become pixels."""

    scores: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor
    grid: MaskGrid


class SegmentationPostProcessing:
    """Instance, semantic and panoptic post-processing, as Transformers 5 and 4 offer them.

    Sizes are (height, width) in pixels. ``processed_sizes`` are those of the images as the model saw them,
    without padding, ``padded_size`` that of the batch with padding (the largest of these by default), and
    ``target_sizes`` those of the results (by default ``processed_sizes``, or else that of ``pred_masks``).
    """

    is_thing_map: dict[int, bool] | None

    def post_process_panoptic_segmentation(
        self,
        outputs: Outputs,
        threshold: float = PANOPTIC_THRESHOLD,
        mask_threshold: float | None = None,
        overlap_mask_area_threshold: float | None = None,
        label_ids_to_fuse: Collection[int] | None = None,
        target_sizes: TargetSizes | None = None,
        *,
        processed_sizes: TargetSizes | None = None,
        padded_size: Sequence[int] | None = None,
        is_thing_map: IsThingMap | None = None,
    ) -> list[Segmentation]:
        """Turns a model's outputs into panoptic segmentations by the original's algorithm.

        Every pixel goes to a segment, unless no query is above ``threshold``. The original knows no other
        threshold; the next two, which Transformers has, are applied where they are given: a segment is then
        left out, and its pixels belong to none, where it has won no more than ``overlap_mask_area_threshold``
        (0 when only the other is given) of the pixels at which its own probability exceeds ``mask_threshold``
        (0.5 when only the other is given), or where there are no such pixels.

        Args:
            outputs: Outputs with ``logits`` and ``pred_masks``.
            threshold: Score above which a query can become a segment, in [0, 1].
            mask_threshold: Probability of a mask, in [0, 1]; see above.
            overlap_mask_area_threshold: Share of its own mask that a segment has to win, in [0, 1].
            label_ids_to_fuse: Classes with at most one segment; stuff when None.
            target_sizes: Sizes of the results.
            processed_sizes: Sizes of the images as the model saw them.
            padded_size: Size of the batch with padding.
            is_thing_map: Whether a class is a thing, by label; the processor's or else COCO's when None.

        Returns:
            A :class:`Segmentation` for each image.

        Raises:
            ValueError: There are no masks, sizes do not fit the batch, or a threshold is out of range.
        """
        check_thresholds(
            mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
        )
        if mask_threshold is not None and overlap_mask_area_threshold is None:
            overlap_mask_area_threshold = 0.0
        rule = replace(
            self._panoptic_rule(is_thing_map, label_ids_to_fuse),
            mask_threshold=default(mask_threshold, 0.5),
            overlap_threshold=overlap_mask_area_threshold,
        )
        results: list[Segmentation] = []
        for image in self._images(outputs, threshold, processed_sizes, target_sizes, padded_size):
            ids, segments = panoptic_segments(*image, rule)
            segments_info = [_labelled(segment, rule) for segment in segments]
            results.append({"segmentation": ids, "segments_info": segments_info})
        return results

    def panoptic_maps(
        self,
        outputs: Outputs,
        processed_sizes: TargetSizes,
        target_sizes: TargetSizes | None = None,
        threshold: float = PANOPTIC_THRESHOLD,
        is_thing_map: IsThingMap | None = None,
        padded_size: Sequence[int] | None = None,
    ) -> list[tuple[torch.Tensor, list[Segment]]]:
        """Panoptic segmentations as they are evaluated: the original's algorithm, with padding cropped.

        Args:
            outputs: Outputs with ``logits`` and ``pred_masks``.
            processed_sizes: Sizes of the images as the model saw them.
            target_sizes: Sizes of the results.
            threshold: Score above which a query can become a segment, in [0, 1].
            is_thing_map: Whether a class is a thing, by label; the processor's or else COCO's when None.
            padded_size: Size of the batch with padding.

        Returns:
            For each image ids, int32 (height, width) on the outputs' device with 0 where there is no segment,
            and for each segment ``id``, ``category_id``, ``isthing``, ``area`` in pixels and ``score``.

        Raises:
            ValueError: There are no masks, sizes do not fit the batch, or a threshold is out of range.
        """
        rule = self._panoptic_rule(is_thing_map)
        images = self._images(outputs, threshold, processed_sizes, target_sizes, padded_size)
        return [panoptic_segments(*image, rule) for image in images]

    def post_process_panoptic(
        self,
        outputs: Outputs,
        processed_sizes: TargetSizes,
        target_sizes: TargetSizes | None = None,
        is_thing_map: IsThingMap | None = None,
        threshold: float = PANOPTIC_THRESHOLD,
    ) -> list[PanopticPng]:
        """Panoptic segmentations as PNG files, as Transformers 4 gave them.

        As in the original, the masks of the whole batch are resized to each image's processed size, which is
        right for images that fill their batch. For others use :meth:`panoptic_maps` or
        :meth:`post_process_panoptic_segmentation`, which crop the padding.

        Args:
            outputs: Outputs with ``logits`` and ``pred_masks``.
            processed_sizes: Sizes of the images as the model saw them.
            target_sizes: Sizes of the results.
            is_thing_map: Whether a class is a thing, by label; the processor's or else COCO's when None.
            threshold: Score above which a query can become a segment, in [0, 1].

        Returns:
            A :class:`PanopticPng` for each image.

        Raises:
            ValueError: There are no masks, sizes do not fit the batch, or a threshold is out of range.
        """
        rule = self._panoptic_rule(is_thing_map)
        results: list[PanopticPng] = []
        for image in self._images(outputs, threshold, processed_sizes, target_sizes, crop=False):
            ids, segments = panoptic_segments(*image, rule)
            for segment in segments:
                del segment["score"]  # which Transformers 4 did not give
            png = encode_panoptic_png(ids.cpu().numpy())
            results.append({"png_string": png, "segments_info": segments})
        return results

    def post_process_instance_segmentation(
        self,
        outputs: Outputs,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: TargetSizes | None = None,
        return_coco_annotation: bool | None = False,
        *,
        processed_sizes: TargetSizes | None = None,
        padded_size: Sequence[int] | None = None,
    ) -> list[Segmentation]:
        """Turns a model's outputs into objects that do not overlap.

        An object has the pixels at which its mask's probability exceeds ``mask_threshold``; where masks
        overlap, probability times score decides. See :meth:`detection_masks` for masks as the original has
        them, each by itself.

        Args:
            outputs: Outputs with ``logits`` and ``pred_masks``.
            threshold: Score above which a query is an object, in [0, 1].
            mask_threshold: Probability above which a pixel belongs to a mask, in [0, 1].
            overlap_mask_area_threshold: Share of its own mask that an object has to win, in [0, 1].
            target_sizes: Sizes of the results.
            return_coco_annotation: Whether to give run lengths instead of a map.
            processed_sizes: Sizes of the images as the model saw them.
            padded_size: Size of the batch with padding.

        Returns:
            A :class:`Segmentation` for each image.

        Raises:
            ValueError: There are no masks, sizes do not fit the batch, or a threshold is out of range.
        """
        check_thresholds(
            mask_threshold=mask_threshold, overlap_mask_area_threshold=overlap_mask_area_threshold
        )
        results: list[Segmentation] = []
        for image in self._images(outputs, threshold, processed_sizes, target_sizes, padded_size):
            ids, segments = instance_segments(*image, mask_threshold, overlap_mask_area_threshold)
            segmentation: torch.Tensor | list[list[int]] = ids
            if return_coco_annotation:
                segmentation = [run_lengths(ids == segment["id"]) for segment in segments]
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results

    def post_process_semantic_segmentation(
        self,
        outputs: Outputs,
        target_sizes: TargetSizes | None = None,
        return_segmentation_scores: bool = False,
        *,
        processed_sizes: TargetSizes | None = None,
        padded_size: Sequence[int] | None = None,
    ) -> list[torch.Tensor] | list[BatchFeature]:
        """Turns a model's outputs into maps of classes.

        Args:
            outputs: Outputs with ``logits`` and ``pred_masks``.
            target_sizes: Sizes of the results.
            return_segmentation_scores: Whether to give the scores too.
            processed_sizes: Sizes of the images as the model saw them.
            padded_size: Size of the batch with padding.

        Returns:
            For each image int64 (height, width), the likeliest class of each pixel; with scores it is the
            attribute and entry ``segmentation``, beside ``segmentation_scores`` (classes, height, width).

        Raises:
            ValueError: There are no masks, or sizes do not fit the batch.
        """
        logits, masks = logits_and_masks(outputs)
        probabilities, _ = self.query_probabilities(logits)
        grids = _grids(masks, processed_sizes, target_sizes, padded_size)
        maps = [semantic_map(*image) for image in zip(probabilities, masks, grids)]
        if not return_segmentation_scores:
            return maps
        scores = (semantic_scores(*image) for image in zip(probabilities, masks, grids))
        return [BatchFeature({"segmentation": m, "segmentation_scores": s}) for m, s in zip(maps, scores)]

    def post_process_segmentation(
        self, outputs: Outputs, target_sizes: TargetSizes, threshold: float = 0.9, mask_threshold: float = 0.5
    ) -> list[dict[str, torch.Tensor]]:
        """Masks of the queries above a threshold, each by itself, as Transformers 4 gave them.

        Arguments and errors are those of :meth:`post_process_instance_segmentation`; images fill their batch.

        Returns:
            For each image ``scores`` (n,), ``labels`` (n,) and ``masks`` (n, height, width), int64, 0 or 1.
        """
        check_thresholds(mask_threshold=mask_threshold)
        return [
            {
                "scores": scores,
                "labels": labels,
                "masks": instance_masks(masks, grid, mask_threshold).long(),
            }
            for scores, labels, masks, grid in self._images(outputs, threshold, None, target_sizes)
        ]

    def post_process_instance(
        self,
        results: list[dict[str, torch.Tensor]],
        outputs: Outputs,
        orig_target_sizes: TargetSizes,
        max_target_sizes: TargetSizes,
        threshold: float = 0.5,
    ) -> list[dict[str, torch.Tensor]]:
        """Adds masks to the boxes of :meth:`post_process`, as Transformers 4 and the original do.

        Args:
            results: For each image what :meth:`post_process` gave; ``masks`` are added to it.
            outputs: The outputs it was given, with ``pred_masks``.
            orig_target_sizes: (height, width) of each original image in pixels.
            max_target_sizes: (height, width) of each image in pixels as the model saw it, without padding.
            threshold: Probability above which a pixel belongs to a mask, in [0, 1].

        Returns:
            ``results``, with ``masks`` uint8 (n, 1, height, width) on the CPU.

        Raises:
            ValueError: There are no masks, sizes or results do not fit the batch, or a threshold is out of
                range.
        """
        logits, masks = logits_and_masks(outputs)
        check_thresholds(threshold=threshold)
        _, queries = self.candidate_queries(logits)
        if len(results) != len(masks):
            raise ValueError(f"there are {len(results)} results for {len(masks)} images")
        grids = _grids(masks, max_target_sizes, orig_target_sizes, nearest=pixel_corners)
        for result, image_masks, rows, grid in zip(results, masks, queries, grids):
            if "scores" in result and len(result["scores"]) != len(rows):
                raise ValueError(
                    f"a result has {len(result['scores'])} boxes where the outputs give {len(rows)}; "
                    "pass what post_process() gave, without a threshold"
                )
            found = instance_masks(image_masks[rows], grid, threshold)
            result["masks"] = found.unsqueeze(1).to(torch.uint8).cpu()
        return results

    def detection_masks(
        self,
        outputs: Outputs,
        queries: Sequence[torch.Tensor],
        processed_sizes: TargetSizes,
        target_sizes: TargetSizes,
        mask_threshold: float = 0.5,
        padded_size: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """Masks of detections, row by row.

        Source: ``PostProcessSegm`` in models/segmentation.py of facebookresearch/detr.

        Args:
            outputs: Outputs with ``logits`` and ``pred_masks``.
            queries: For each image (n,), the query behind each detection.
            processed_sizes: Sizes of the images as the model saw them.
            target_sizes: Sizes of the results.
            mask_threshold: Probability above which a pixel belongs to a mask, in [0, 1].
            padded_size: Size of the batch with padding.

        Returns:
            For each image bool (n, height, width) on the outputs' device.

        Raises:
            ValueError: There are no masks, sizes do not fit the batch, or a threshold is out of range.
        """
        _, masks = logits_and_masks(outputs)
        check_thresholds(mask_threshold=mask_threshold)
        grids = _grids(masks, processed_sizes, target_sizes, padded_size, nearest=pixel_corners)
        return [
            instance_masks(image_masks[rows], grid, mask_threshold)
            for rows, image_masks, grid in zip(queries, masks, grids)
        ]

    def candidate_queries(
        self, logits: torch.Tensor, top_k: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score and query of each of the ``candidates`` of object detection, in their order (batch, n)."""
        return best_queries(self.query_probabilities(logits)[0].amax(-1), top_k)

    def query_probabilities(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How a family reads its logits; DETR's softmax unless it says otherwise.

        Returns:
            float32 (batch, queries, classes), probabilities without "no object"; and bool (batch, queries),
            whether a query is likelier an object of one class than none.
        """
        check_classes(logits, least=2)
        probabilities = logits.float().softmax(-1)
        return probabilities[..., :-1], probabilities.argmax(-1) != logits.shape[-1] - 1

    def _panoptic_rule(
        self, is_thing_map: IsThingMap | None, fused: Collection[int] | None = None
    ) -> PanopticRule:
        """What is a thing, and which classes have at most one segment: stuff unless they are named."""
        return PanopticRule.of(resolve_is_thing_map(is_thing_map, self.is_thing_map), fused)

    def _images(
        self,
        outputs: Outputs,
        threshold: float,
        processed_sizes: TargetSizes | None,
        target_sizes: TargetSizes | None,
        padded_size: Sequence[int] | None = None,
        crop: bool = True,
    ) -> Iterator[_Image]:
        """The images of a batch with their queries above a threshold."""
        check_thresholds(threshold=threshold)
        logits, masks = logits_and_masks(outputs)
        probabilities, is_object = self.query_probabilities(logits)
        scores, labels = probabilities.max(-1)
        keep = is_object & (scores > threshold)
        grids = _grids(masks, processed_sizes, target_sizes, padded_size, crop=crop)
        for values in zip(scores, labels, masks, keep, grids):
            image_scores, image_labels, image_masks, image_keep, grid = values
            yield _Image(
                image_scores[image_keep], image_labels[image_keep], image_masks[image_keep].float(), grid
            )


def _labelled(segment: Segment, rule: PanopticRule) -> LabelledSegment:
    """A segment in the form of Transformers."""
    label = segment["category_id"]
    return {
        "id": segment["id"],
        "label_id": label,
        "was_fused": rule.is_merged(label),
        "score": segment["score"],
        "isthing": segment["isthing"],
        "area": segment["area"],
    }


def _grids(
    masks: torch.Tensor,
    processed_sizes: TargetSizes | None,
    target_sizes: TargetSizes | None,
    padded_size: Sequence[int] | None = None,
    *,
    crop: bool = True,
    nearest: Callable[[int, int], np.ndarray] = pixel_centres,
) -> list[MaskGrid]:
    """How the masks (batch, queries, h, w) become pixels of each image."""
    sizes = mask_sizes(masks, processed_sizes, target_sizes, padded_size, crop=crop)
    return [MaskGrid(*each, nearest=nearest) for each in sizes]
