"""From a model's outputs to detections and segments in pixels of the image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.common.schema import Category
from detrkit.inference.prepared import ImageFrame
from detrkit.results.detections import Detections
from detrkit.results.panoptic import PanopticSegmentation

if TYPE_CHECKING:
    import torch

    from detrkit.processing.image_processor import DetrImageProcessorBase
    from detrkit.processing.segmentation import IsThingMap


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputReader:
    """Turns a model's outputs into results.

    Attributes:
        processor: The model's image processor.
        names: Label -> class name.
        has_masks: Whether the model gives masks.
        object_limit: The most objects that the model gives of an image.
        is_thing_map: Whether a class is a thing, by label; None leaves it to the processor.
    """

    processor: DetrImageProcessorBase
    names: Mapping[int, str]
    has_masks: bool
    object_limit: int
    is_thing_map: IsThingMap | None = None

    def detections(
        self,
        outputs: Mapping[str, torch.Tensor],
        frames: Sequence[ImageFrame],
        threshold: float,
        with_masks: bool,
        max_objects: int | None = None,
    ) -> Iterator[Detections]:
        """The objects above a threshold in each image of a batch, the best ``max_objects`` of them."""
        limit = self.object_limit if max_objects is None else min(max_objects, self.object_limit)
        results = self._select(outputs, frames, threshold, limit)
        if with_masks:
            masks = self.processor.detection_masks(
                outputs,
                threshold,
                [frame.processed_size for frame in frames],
                [frame.image_size for frame in frames],
                padded_size=frames[0].padded_size,
                top_k=limit,
            )
            results = [{**result, "masks": found} for result, found in zip(results, masks)]
        for result, frame in zip(results, frames):
            yield self._detections(result, frame)

    def candidates(self, outputs: Mapping[str, torch.Tensor], frame: ImageFrame) -> Candidates:
        """All scored boxes of a batch of one image."""
        [found] = self._select(outputs, [frame], None, self.object_limit)
        detections = self._detections(found, frame)
        scores, queries = self.processor.candidate_queries(outputs["logits"], self.object_limit)
        order = np.argsort(-scores[0].cpu().numpy(), kind="stable")
        return Candidates(detections, queries[0].cpu().numpy()[order])

    def segments(
        self, outputs: Mapping[str, torch.Tensor], frames: Sequence[ImageFrame], threshold: float
    ) -> Iterator[PanopticSegmentation]:
        """The panoptic segmentation of each image of a batch."""
        maps = self.processor.panoptic_maps(
            outputs,
            processed_sizes=[frame.processed_size for frame in frames],
            target_sizes=[frame.image_size for frame in frames],
            threshold=threshold,
            is_thing_map=self.is_thing_map,
            padded_size=frames[0].padded_size,
        )
        for (ids, segments), frame in zip(maps, frames):
            yield PanopticSegmentation(
                ids=ids.cpu().numpy().astype(np.int32, copy=False),
                segments=segments,
                names=[self.name(segment["category_id"]) for segment in segments],
                image_size=frame.image_size,
                source=frame.source,
                exif_orientation=frame.exif_orientation,
            )

    def name(self, label: int) -> str:
        """The class name of a label, or its number if the model does not name it."""
        return self.names.get(label, str(label))

    def categories(self, found: Collection[int]) -> list[Category]:
        """See :meth:`detrkit.Detector.categories`."""
        used = {i: name for i, name in sorted(self.names.items()) if name != "N/A" or i in found}
        listed: list[Category] = [{"id": label, "name": name} for label, name in used.items()]
        if self.has_masks:
            from detrkit.processing.segmentation import resolve_is_thing_map

            is_thing = resolve_is_thing_map(self.is_thing_map, self.processor.is_thing_map)
            for entry in listed:
                entry["isthing"] = int(is_thing(entry["id"]))
        return listed

    def _select(
        self,
        outputs: Mapping[str, torch.Tensor],
        frames: Sequence[ImageFrame],
        threshold: float | None,
        limit: int,
    ) -> list[dict[str, torch.Tensor]]:
        """The candidates of each image that are above a threshold, in pixels."""
        from detrkit.processing.post_processing import select_detections

        sizes = [frame.image_size for frame in frames]
        return select_detections(self.processor.candidates(outputs, limit), threshold, sizes)

    def _detections(self, result: Mapping[str, torch.Tensor], frame: ImageFrame) -> Detections:
        scores = result["scores"].cpu().numpy().astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        labels = result["labels"].cpu().numpy().astype(np.int64)[order]
        masks = result.get("masks")
        return Detections(
            boxes=result["boxes"].cpu().numpy().astype(np.float32).reshape(-1, 4)[order],
            scores=scores[order],
            labels=labels,
            names=[self.name(label) for label in labels.tolist()],
            image_size=frame.image_size,
            masks=None if masks is None else masks.cpu().numpy()[order],
            source=frame.source,
            exif_orientation=frame.exif_orientation,
        )


@dataclass(frozen=True, eq=False)
class Candidates:
    """All scored boxes of one image, before any threshold.

    Attributes:
        detections: N candidates, the most confident first.
        queries: (N,) int64, the number of the object query behind each.
    """

    detections: Detections
    queries: np.ndarray

    def above(self, threshold: float) -> Candidates:
        """Those with a higher score."""
        kept = self.detections.scores > threshold
        return Candidates(self.detections[kept], self.queries[kept])


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """A model's output for one image, from :meth:`Detector.predict`; thresholds are applied to it later.

    Attributes:
        outputs: The model's outputs by name, for a batch of this image: ``logits``, ``pred_boxes`` and, of a
            model that was run for masks, ``pred_masks``; on request all the others.
        frame: Sizes and source of the image.
        min_threshold: The lowest threshold that the model was run for.
    """

    outputs: Mapping[str, torch.Tensor]
    frame: ImageFrame
    min_threshold: float
    _reader: OutputReader

    def detections(self, threshold: float = 0.5, max_objects: int | None = None) -> Detections:
        """What calling the detector with this threshold gives, without masks.

        Raises:
            SettingError: ``threshold`` is lower than what the model was run for.
        """
        self._check(threshold)
        return next(self._reader.detections(self.outputs, [self.frame], threshold, False, max_objects))

    def segments(self, threshold: float = 0.85) -> PanopticSegmentation:
        """What ``Detector.segment`` gives with this threshold.

        Raises:
            SettingError: ``threshold`` is lower than what the model was run for, or there are no masks.
        """
        if not self._reader.has_masks:
            raise no_masks()
        if "pred_masks" not in self.outputs:
            raise SettingError("the model was run without masks; run it with predict()")
        self._check(threshold)
        return next(self._reader.segments(self.outputs, [self.frame], threshold))

    def candidates(self) -> Candidates:
        """All scored boxes with the object query behind each.

        DETR gives one for each query, the other families as many of the best pairs of query and class, or the
        100 best if there are fewer queries.
        """
        return self._reader.candidates(self.outputs, self.frame)

    def _check(self, threshold: float) -> None:
        if not self.min_threshold <= threshold <= 1:
            raise SettingError(
                f"threshold must be between {self.min_threshold}, which the model was run for, and 1, "
                f"not {threshold}"
            )


def no_masks() -> SettingError:
    """The error for masks that are asked of a model without them."""
    return SettingError(
        "this model finds boxes only; masks need a panoptic model such as detr-resnet-50-panoptic"
    )
