"""The main job in one object: images in, boxes and segments in pixels out.

Example:
    ```python
    from detrkit import Detector

    detector = Detector.from_pretrained("facebook/detr-resnet-50")
    detections = detector("photo.jpg")
    detections.draw("photo.jpg").save("photo_boxes.jpg")

    segmenter = Detector.from_pretrained("facebook/detr-resnet-50-panoptic")
    segmenter.segment("photo.jpg").draw().save("photo_segments.jpg")
    ```
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.progress import with_progress
from detrkit.engines import check_engine, start
from detrkit.engines.placement import place
from detrkit.inference.batching import read_ahead, run_in_groups
from detrkit.results.detections import Detections
from detrkit.results.panoptic import PanopticSegmentation

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_Result = TypeVar("_Result")


class Detector:
    """A model with its image processor: finds the objects in images of any kind.

    Attributes:
        model: The model as it is run, ready for inference.
        processor: The image processor that belongs to it.
        names: Class id -> class name.
        has_masks: Whether the model gives masks, so that it can segment.
        limits: How large image files may be and which addresses are asked; can be set.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        engine: str = "torch",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        """Prepares a model for inference; ``from_pretrained`` loads model and processor as well.

        On a CPU this also makes the process keep freed memory for reuse (see
        :mod:`detrkit.engines.allocator`).

        Args:
            model: A detection or segmentation model of detrkit; it is changed, and can no longer be trained.
            processor: Its image processor.
            engine: What runs the model: "torch", "compile", "onnx" or "openvino" (see
                :mod:`detrkit.engines`). The last two export the model first, which takes a while; load a
                folder that ``detrkit export`` wrote to save that.
            device: Such as "cpu" or "cuda:1"; by default a GPU where there is one and the engine runs there.
            dtype: "float32" (the default), "float16" or "bfloat16", or the torch dtype.
            limits: How large image files may be and which addresses are asked, where not as usual.

        Raises:
            SettingError: Engine, device or dtype do not exist or are not available here.
            MissingExtraError: The engine's packages are not installed.
        """
        check_engine(engine)
        self._device, self._dtype = place(engine, device, dtype)
        from detrkit.engines.allocator import Excess, keep_memory

        self.names: dict[int, str] = {int(label): str(name) for label, name in model.config.id2label.items()}
        self.processor = processor
        self.limits = limits or ImageLimits()
        self.has_masks = hasattr(model, "segment")
        self._is_thing_map = getattr(model.config, "is_thing_map", None)
        keeps_memory = self._device.type == "cpu" and keep_memory()
        self._excess = Excess() if keeps_memory else None
        self.model = start(model, engine, self._device, self._dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        engine: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        limits: ImageLimits | None = None,
    ) -> Detector:
        """Loads a model and its image processor.

        Args:
            model: A Hub id ("facebook/detr-resnet-50"), a folder, or a short name ("detr-resnet-50").
            engine: What runs the model: "torch", "compile", "onnx" or "openvino"; by default the one that a
                folder's model was exported for, otherwise "torch".
            device: Such as "cpu" or "cuda:1"; by default a GPU where there is one and the engine runs there.
            dtype: "float32" (the default), "float16" or "bfloat16", or the torch dtype.
            revision: Branch, tag or commit on the Hub.
            limits: How large image files may be and which addresses are asked, where not as usual.

        Raises:
            CheckpointError: The model cannot be found, read or used.
            SettingError: Engine, device or dtype do not exist or are not available here.
            MissingExtraError: The engine's packages are not installed.
        """
        from detrkit.checkpoints.loading import exported_for, load_for_engine
        from detrkit.checkpoints.registry import resolve_model

        # Mistakes in the settings should not wait for a download.
        name = resolve_model(os.fspath(model))
        engine = engine or exported_for(name) or "torch"
        check_engine(engine)
        device, dtype = place(engine, device, dtype)
        loaded, processor = load_for_engine(name, revision, engine)
        return cls(loaded, processor, engine=engine, device=device, dtype=dtype, limits=limits)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def __repr__(self) -> str:
        return (
            f"Detector({type(self.model).__name__}, {len(self.names)} classes, {self._device}, {self._dtype})"
        )

    def __call__(
        self,
        images: Any,
        threshold: float = 0.5,
        batch_size: int = 1,
        *,
        masks: bool | None = None,
        exif_orientation: bool = False,
    ) -> Any:
        """Finds the objects in one image or in many.

        Images are only batched with others of the same processed size, so that a result does not depend on
        the other images.

        Args:
            images: A path, an http(s) address, a PIL image, an (H, W, 3) array or a tensor, or many in
                a list, a generator or a 4-dimensional array.
            threshold: Only objects with a higher score are given.
            batch_size: The most images that go through the model at once.
            masks: Whether to give a mask for each object; by default where the model gives masks.
            exif_orientation: Turn each image as its EXIF entry says; boxes then refer to the turned image. By
                default boxes refer to the pixels as they are stored, which is what annotation files do.

        Returns:
            ``Detections`` in pixels of the original image for one image, a list of them in the order of the
            images for many.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range, or the model gives no masks.
        """
        run = self._detecting(threshold, batch_size, masks)
        return self._one_or_many(images, run, batch_size, exif_orientation, "Detecting")

    def stream(
        self,
        images: Iterable[Any],
        threshold: float = 0.5,
        batch_size: int = 1,
        *,
        masks: bool | None = None,
        exif_orientation: bool = False,
    ) -> Iterator[Detections]:
        """Like calling the detector with many images, but gives each result as soon as it is there.

        The next images are read and resized in a background thread, which also iterates over ``images``,
        while the model runs. Only a few batches of images are held in memory, however many there are.

        Args:
            images: Images of any kind that a call takes.
            threshold: As for a call, like the others.
            batch_size: The most images that go through the model at once.
            masks: Whether to give a mask for each object.
            exif_orientation: Turn each image as its EXIF entry says.

        Returns:
            An iterator of the ``Detections``, in the order of the images.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range, or the model gives no masks.
        """
        return self._stream(
            images, self._detecting(threshold, batch_size, masks), batch_size, exif_orientation
        )

    def segment(
        self,
        images: Any,
        threshold: float = 0.85,
        batch_size: int = 1,
        *,
        exif_orientation: bool = False,
    ) -> Any:
        """Gives every pixel of one image, or of many, to an object or a kind of background.

        Args:
            images: As for a call.
            threshold: Only segments with a higher score are given.
            batch_size: The most images that go through the model at once.
            exif_orientation: As for a call.

        Returns:
            A ``PanopticSegmentation`` in pixels of the original image for one image, a list of them in the
            order of the images for many.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range, or the model gives no masks.
        """
        run = self._segmenting(threshold, batch_size)
        return self._one_or_many(images, run, batch_size, exif_orientation, "Segmenting")

    def stream_segments(
        self,
        images: Iterable[Any],
        threshold: float = 0.85,
        batch_size: int = 1,
        *,
        exif_orientation: bool = False,
    ) -> Iterator[PanopticSegmentation]:
        """Like ``segment`` with many images, but gives each result as soon as it is there.

        Args:
            images: Images of any kind that a call takes, read ahead as by ``stream``.
            threshold: As for ``segment``, like the others.
            batch_size: The most images that go through the model at once.
            exif_orientation: Turn each image as its EXIF entry says.

        Returns:
            An iterator of the segmentations, in the order of the images.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range, or the model gives no masks.
        """
        return self._stream(images, self._segmenting(threshold, batch_size), batch_size, exif_orientation)

    def _detecting(
        self, threshold: float, batch_size: int, masks: bool | None
    ) -> Callable[[_Batch], Iterator[Detections]]:
        """What finds the objects of a batch, its settings checked."""
        check_numbers(threshold, batch_size)
        if masks and not self.has_masks:
            raise self._no_masks()
        with_masks = self.has_masks if masks is None else masks
        return partial(self._detect, threshold=threshold, with_masks=with_masks)

    def _segmenting(
        self, threshold: float, batch_size: int
    ) -> Callable[[_Batch], Iterator[PanopticSegmentation]]:
        """What segments a batch, its settings checked."""
        check_numbers(threshold, batch_size)
        if not self.has_masks:
            raise self._no_masks()
        return partial(self._segment, threshold=threshold)

    def predict(self, image: Any, lowest: float = 0.1, *, exif_orientation: bool = False) -> Prediction:
        """Runs the model on one image, for results at many thresholds without running it again.

        Args:
            image: A path, an http(s) address, a PIL image, an (H, W, 3) array or a tensor.
            lowest: Least threshold that will be asked for; with a model that gives masks, a higher one saves
                time and memory.
            exif_orientation: As for a call.

        Raises:
            ImageError: The image cannot be found or read.
            SettingError: ``lowest`` is out of range.
        """
        check_numbers(lowest, 1)
        item = self._prepare(image, exif_orientation)
        model = partial(self.model.segment, threshold=lowest) if self.has_masks else self.model
        outputs = self._run([item], model)
        # Predictions may be kept in numbers: without the model's features, and of the pixels only the shape.
        read = ("logits", "pred_boxes", "pred_masks")
        outputs = {name: outputs[name] for name in read if outputs.get(name) is not None}
        pixels = item.pixel_values.new_empty(()).expand(item.pixel_values.shape)
        return Prediction(self, replace(item, pixel_values=pixels), outputs, lowest)

    def _no_masks(self) -> SettingError:
        return SettingError(
            f"{type(self.model).__name__} finds boxes only; masks need a panoptic model such as "
            "detr-resnet-50-panoptic"
        )

    def _stream(
        self,
        images: Iterable[Any],
        run: Callable[[_Batch], Iterable[_Result]],
        batch_size: int,
        exif_orientation: bool,
    ) -> Iterator[_Result]:
        """The result of each image, in order."""
        prepared = (self._prepare(source, exif_orientation) for source in images)
        ready = read_ahead(prepared, depth=batch_size + 1)
        return run_in_groups(ready, run, kind=lambda item: item.shape, size=batch_size)

    def _one_or_many(
        self,
        images: Any,
        run: Callable[[_Batch], Iterable[Any]],
        batch_size: int,
        exif_orientation: bool,
        description: str,
    ) -> Any:
        """The result for one image, or the list of those for many, with a progress bar."""
        if _is_one_image(images):
            return next(iter(run([self._prepare(images, exif_orientation)])))
        total = len(images) if hasattr(images, "__len__") else None
        results = self._stream(images, run, batch_size, exif_orientation)
        return list(with_progress(results, total, description))

    def _prepare(self, source: Any, exif_orientation: bool) -> _Prepared:
        image = read_image(source, exif_orientation=exif_orientation, limits=self.limits)
        inputs = self.processor(images=[image], return_tensors="pt")
        mask = inputs.get("pixel_mask")
        return _Prepared(
            pixel_values=inputs["pixel_values"],
            pixel_mask=None if mask is None or bool(mask.all()) else mask,
            image_size=(image.height, image.width),
            source=os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
            exif_orientation=exif_orientation,
        )

    def _detect(self, batch: _Batch, threshold: float, with_masks: bool) -> Iterator[Detections]:
        """The detections of images of one processed size."""
        if not with_masks:
            outputs = self._run(batch, self.model.detector if self.has_masks else self.model)
        else:
            outputs = self._run(batch, partial(self.model.segment, threshold=threshold))
        return self._read_detections(outputs, batch, threshold, with_masks)

    def _read_detections(
        self, outputs: Any, batch: _Batch, threshold: float, with_masks: bool
    ) -> Iterator[Detections]:
        """The detections that are in the model's outputs."""
        sizes = [item.image_size for item in batch]
        results = self.processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        if with_masks:
            processed = [item.processed_size for item in batch]
            masks = self.processor.detection_masks(
                outputs, threshold, processed, sizes, padded_size=batch[0].shape
            )
            results = [{**result, "masks": found} for result, found in zip(results, masks)]
        for result, item in zip(results, batch):
            yield self._detections(result, item)

    def _segment(self, batch: _Batch, threshold: float) -> Iterator[PanopticSegmentation]:
        """The segmentations of images of one processed size."""
        outputs = self._run(batch, partial(self.model.segment, threshold=threshold))
        return self._read_segments(outputs, batch, threshold)

    def _read_segments(self, outputs: Any, batch: _Batch, threshold: float) -> Iterator[PanopticSegmentation]:
        """The segmentations that are in the model's outputs."""
        maps = self.processor.panoptic_maps(
            outputs,
            processed_sizes=[item.processed_size for item in batch],
            target_sizes=[item.image_size for item in batch],
            threshold=threshold,
            is_thing_map=self._is_thing_map,
            padded_size=batch[0].shape,
        )
        for (ids, segments), item in zip(maps, batch):
            yield PanopticSegmentation(
                ids=ids.cpu().numpy().astype(np.int32, copy=False),
                segments=segments,
                names=[self._name(segment["category_id"]) for segment in segments],
                image_size=item.image_size,
                source=item.source,
                exif_orientation=item.exif_orientation,
            )

    def _run(self, batch: _Batch, model: Callable[..., Any]) -> Any:
        """A model's outputs for images of one processed size."""
        import torch

        inputs = {
            "pixel_values": torch.cat([item.pixel_values for item in batch]).to(self._device, self._dtype)
        }
        if any(item.pixel_mask is not None for item in batch):
            whole = torch.ones(1, *batch[0].shape, dtype=torch.long)
            masks = [whole if item.pixel_mask is None else item.pixel_mask for item in batch]
            inputs["pixel_mask"] = torch.cat(masks).to(self._device)
        with torch.inference_mode():
            outputs = model(**inputs)
        if self._excess is not None:
            self._excess.check()
        # Half precision would round box corners to whole pixels and more.
        outputs["logits"], outputs["pred_boxes"] = outputs["logits"].float(), outputs["pred_boxes"].float()
        return outputs

    def _detections(self, result: dict[str, torch.Tensor], item: _Prepared) -> Detections:
        scores = result["scores"].cpu().numpy().astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        labels = result["labels"].cpu().numpy().astype(np.int64)[order]
        masks = result.get("masks")
        return Detections(
            boxes=result["boxes"].cpu().numpy().astype(np.float32).reshape(-1, 4)[order],
            scores=scores[order],
            labels=labels,
            names=[self._name(label) for label in labels.tolist()],
            image_size=item.image_size,
            masks=None if masks is None else masks.cpu().numpy()[order],
            source=item.source,
            exif_orientation=item.exif_orientation,
        )

    def categories(self, found: Collection[int] = ()) -> list[dict[str, Any]]:
        """The model's classes as the ``categories`` of a COCO document.

        Args:
            found: Class ids of results, which are listed even where COCO left them unused ("N/A").

        Returns:
            For each class ``id`` and ``name``, and ``isthing`` where the model gives masks.
        """
        used = {i: name for i, name in sorted(self.names.items()) if name != "N/A" or i in found}
        listed: list[dict[str, Any]] = [{"id": label, "name": name} for label, name in used.items()]
        if self.has_masks:
            from detrkit.processing.segmentation import resolve_is_thing_map

            is_thing = resolve_is_thing_map(self._is_thing_map, self.processor.is_thing_map)
            listed = [{**entry, "isthing": int(is_thing(entry["id"]))} for entry in listed]
        return listed

    def _name(self, label: int) -> str:
        return self.names.get(label, str(label))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """One image ready for the model.

    Attributes:
        pixel_values: (1, 3, height, width).
        pixel_mask: (1, height, width), nonzero where pixels are real; None where all are.
    """

    pixel_values: torch.Tensor
    pixel_mask: torch.Tensor | None
    image_size: tuple[int, int]
    source: str | None
    exif_orientation: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixel_values.shape[-2:])

    @property
    def processed_size(self) -> tuple[int, int]:
        """Height and width without padding, which lies below and to the right."""
        if self.pixel_mask is None:
            return self.shape[0], self.shape[1]
        return int(self.pixel_mask[0, :, 0].sum()), int(self.pixel_mask[0, 0].sum())


# Images of one processed size.
_Batch = Sequence[_Prepared]


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a model said of one image, from :meth:`Detector.predict`; thresholds are applied to it later."""

    _detector: Detector
    _item: _Prepared
    _outputs: Any
    _lowest: float

    def detections(self, threshold: float = 0.5) -> Detections:
        """What calling the detector with this threshold gives, without masks.

        Raises:
            SettingError: ``threshold`` is lower than what the model was run for.
        """
        self._check(threshold)
        return next(self._detector._read_detections(self._outputs, [self._item], threshold, False))

    def segmentation(self, threshold: float = 0.85) -> PanopticSegmentation:
        """What ``Detector.segment`` gives with this threshold.

        Raises:
            SettingError: ``threshold`` is lower than what the model was run for, or the model gives no masks.
        """
        if not self._detector.has_masks:
            raise self._detector._no_masks()
        self._check(threshold)
        return next(self._detector._read_segments(self._outputs, [self._item], threshold))

    def _check(self, threshold: float) -> None:
        if not self._lowest <= threshold <= 1:
            raise SettingError(
                f"threshold must lie between {self._lowest}, which the model was run for, and 1, "
                f"not {threshold}"
            )


def read_image(source: Any, *, exif_orientation: bool = False, limits: ImageLimits | None = None) -> Image:
    """Reads one image and leaves its EXIF block behind: whether to turn the image is settled here, once.

    Args:
        source: Path, address, PIL image, array or tensor.
        exif_orientation: Turn the image as its EXIF entry says.
        limits: See :func:`detrkit.processing.images.load_image`.

    Returns:
        The RGB image.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    from detrkit.processing.images import load_image

    image = load_image(source, exif_orientation=exif_orientation, limits=limits)
    if image.info or image.format is not None:
        image = image.copy()
        image.info = {}
    return image


def _is_one_image(images: Any) -> bool:
    """Whether the argument of a call is one image rather than many."""
    if isinstance(images, (str, bytes, bytearray, os.PathLike)):
        return True
    dimensions = getattr(images, "ndim", None)  # arrays and tensors
    if dimensions is not None:
        return dimensions <= 3
    return not isinstance(images, Iterable)  # a PIL image is not iterable; load_image says what else is wrong


def check_numbers(threshold: float, batch_size: int) -> None:
    """Raises SettingError for numbers that no detector takes."""
    if not isinstance(threshold, Real) or not 0 <= threshold <= 1:
        raise SettingError(f"threshold must lie between 0 and 1, not {threshold!r}")
    if not isinstance(batch_size, Integral):
        raise SettingError(f"batch_size must be a whole number, not {batch_size!r}")
    if batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, not {batch_size}")
