"""From a model's outputs to detections and segments in pixels of the image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.common.schema import Category
from detrkit.common.without_torch import is_tensor, to_array
from detrkit.inference.prepared import ImageFrame
from detrkit.results.detection_config import DetectionConfig, DetectionRule, Threshold
from detrkit.results.detections import Detections
from detrkit.results.panoptic import PanopticSegmentation

if TYPE_CHECKING:
    import torch

    from detrkit.processing.array_processor import ArrayImageProcessor
    from detrkit.processing.image_processor import DetrImageProcessorBase
    from detrkit.processing.panoptic_rule import IsThingMap


Outputs: TypeAlias = "Mapping[str, torch.Tensor] | Mapping[str, np.ndarray]"
"""A model's outputs by name: arrays of an exported model, tensors of any other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OutputReader:
    """Turns a model's outputs into results.

    Attributes:
        processor: The model's image processor.
        names: Label -> class name.
        has_masks: Whether the model gives masks.
        object_limit: The most objects that the model gives of an image.
        config: The detection settings where a call does not say otherwise.
        is_thing_map: Whether a class is a thing, by label; None leaves it to the processor.
    """

    processor: DetrImageProcessorBase | ArrayImageProcessor
    names: Mapping[int, str]
    has_masks: bool
    object_limit: int
    config: DetectionConfig
    is_thing_map: IsThingMap | None = None

    def rule(self, config: DetectionConfig) -> DetectionRule:
        """Detection settings for this model.

        Raises:
            SettingError: They name a class that the model does not have.
        """
        return DetectionRule(config, self.names)

    def detections(
        self,
        outputs: Outputs,
        frames: Sequence[ImageFrame],
        rule: DetectionRule,
        with_masks: bool,
    ) -> Iterator[Detections]:
        """The objects that detection settings choose in each image of a batch."""
        chosen = [self._chosen(found, rule) for found in self._candidates(outputs, frames)]
        if not with_masks:
            yield from (found.detections for found in chosen)
            return
        masks = self.processor.detection_masks(
            outputs,
            [_like(outputs["pred_masks"], found.queries) for found in chosen],
            [frame.processed_size for frame in frames],
            [frame.image_size for frame in frames],
            padded_size=frames[0].padded_size,
        )
        for found, image_masks in zip(chosen, masks):
            yield replace(found.detections, masks=to_array(image_masks))

    def candidates(
        self, outputs: Outputs, frame: ImageFrame, rule: DetectionRule | None = None
    ) -> Candidates:
        """The scored boxes of a batch of one image: all of them, or those that detection settings choose."""
        [found] = self._candidates(outputs, [frame])
        if rule is not None:
            return self._chosen(found, rule)
        order = np.argsort(-found.detections.scores, kind="stable")
        return Candidates(found.detections[order], found.queries[order])

    def segments(
        self, outputs: Outputs, frames: Sequence[ImageFrame], threshold: float
    ) -> Iterator[PanopticSegmentation]:
        """The panoptic segmentation of each image of a batch; a SettingError for one to be cut into tiles."""
        for frame in frames:
            self.config.check_whole(frame.image_size, frame.source)
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
                ids=to_array(ids).astype(np.int32, copy=False),
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
        maps = (self.is_thing_map, self.processor.is_thing_map) if self.has_masks else None
        return listed_categories(self.names, found, maps)

    def _candidates(self, outputs: Outputs, frames: Sequence[ImageFrame]) -> Iterator[Candidates]:
        """All scored boxes of each image, in pixels."""
        found = self.processor.candidates(outputs, self.object_limit)
        columns = (to_array(column) for column in found)
        for scores, labels, boxes, queries, frame in zip(*columns, frames):
            height, width = frame.image_size
            detections = Detections(
                boxes=boxes * np.array([width, height, width, height], np.float32),
                scores=scores,
                labels=labels,
                names=[self.name(label) for label in labels.tolist()],
                image_size=frame.image_size,
                source=frame.source,
                exif_orientation=frame.exif_orientation,
                frame_index=frame.index,
                timestamp=frame.timestamp,
            )
            yield Candidates(detections, queries)

    @staticmethod
    def _chosen(candidates: Candidates, rule: DetectionRule) -> Candidates:
        found = candidates.detections
        places, scores = rule.select(found.scores, found.labels, found.boxes)
        return Candidates(replace(found[places], scores=scores), candidates.queries[places])


@dataclass(frozen=True, eq=False)
class Candidates:
    """Scored boxes of one image, with the object query behind each.

    Attributes:
        detections: N boxes, the most confident first.
        queries: (N,) int64, the number of the object query behind each.
    """

    detections: Detections
    queries: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """A model's output for one image, from :meth:`Detector.predict`; thresholds are applied to it later.

    Attributes:
        outputs: The model's outputs by name, for a batch of this image: ``logits``, ``pred_boxes`` and, of a
            model that was run for masks, ``pred_masks``; on request all the others.
        frame: Sizes and source of the image.
        min_threshold: The lowest threshold that the model was run for.
    """

    outputs: Outputs
    frame: ImageFrame
    min_threshold: float
    _reader: OutputReader

    def detections(
        self,
        threshold: Threshold | None = None,
        max_objects: int | None = None,
        *,
        overlap: float | None = None,
    ) -> Detections:
        """The result of calling the detector with these options, without masks.

        Raises:
            SettingError: An option is out of range, or ``threshold`` lower than what the model was run for.
        """
        return self.objects(threshold, max_objects, overlap=overlap).detections

    def objects(
        self,
        threshold: Threshold | None = None,
        max_objects: int | None = None,
        *,
        overlap: float | None = None,
    ) -> Candidates:
        """Like :meth:`detections`, with the object query behind each."""
        if isinstance(threshold, (int, float)):
            self._check(threshold)
        config = self._reader.config.with_options(
            threshold=threshold, max_objects=max_objects, overlap=overlap
        )
        self._check(config.least_threshold)
        return self._reader.candidates(self.outputs, self.frame, self._reader.rule(config))

    def segments(self, threshold: float = 0.85) -> PanopticSegmentation:
        """The result of ``Detector.segment`` with this threshold.

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
        """All scored boxes before any decision, with the object query behind each.

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


def _like(outputs: torch.Tensor | np.ndarray, rows: np.ndarray) -> torch.Tensor | np.ndarray:
    """Rows of the kind that outputs are of, and where these are."""
    if not is_tensor(outputs):
        return rows
    import torch

    return torch.from_numpy(rows).to(outputs.device)


def listed_categories(
    names: Mapping[int, str], found: Collection[int], maps: Sequence[IsThingMap | None] | None
) -> list[Category]:
    """A model's classes as the ``categories`` of a COCO document.

    Args:
        names: Label -> class name.
        found: Labels that are listed even where COCO left them unused ("N/A").
        maps: Whether a class is a thing, by label: the first map that is given counts. None for a model
            without masks.
    """
    used = {i: name for i, name in sorted(names.items()) if name != "N/A" or i in found}
    listed: list[Category] = [{"id": label, "name": name} for label, name in used.items()]
    if maps is not None:
        from detrkit.processing.panoptic_rule import resolve_is_thing_map

        is_thing = resolve_is_thing_map(*maps)
        for entry in listed:
            entry["isthing"] = int(is_thing(entry["id"]))
    return listed


def no_masks() -> SettingError:
    """The error for masks that are asked of a model without them."""
    return SettingError(
        "this model detects boxes only; masks need a panoptic model such as detr-resnet-50-panoptic"
    )
