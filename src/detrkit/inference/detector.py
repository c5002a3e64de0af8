"""The main class: it takes images and returns boxes and segments in pixels.

Example:
    ```python
    from detrkit import Detector

    detector = Detector.from_pretrained("facebook/detr-resnet-50")
    detections = detector("photo.jpg")
    detections.draw("photo.jpg").save("photo_boxes.jpg")
    ```
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, TypeVar, overload

from detrkit.common.errors import SettingError
from detrkit.common.limits import ImageLimits
from detrkit.common.schema import Category
from detrkit.engines import check_engine, start, wake
from detrkit.engines.interface import ModelConfig, RunnableModel, has_masks
from detrkit.engines.names import EXPORTED_ENGINES
from detrkit.engines.placement import place
from detrkit.families import family_of
from detrkit.inference.own_parts import own_model, own_processor
from detrkit.inference.predictions import OutputReader, Prediction
from detrkit.inference.prepared import PreparedImage, check_numbers
from detrkit.inference.running import Batch, ModelRunner, TorchRunner
from detrkit.inference.streams import BatchRun, CallOptions, ImageStreams, detecting, detecting_by_layer
from detrkit.inference.tiles import TiledPrediction, TiledRun, Tiles, with_tiles
from detrkit.processing.array_processor import ArrayImageProcessor
from detrkit.results.detection_config import DetectionConfig, DetectionRule, Threshold
from detrkit.results.detections import Detections
from detrkit.results.panoptic import PanopticSegmentation

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image
    from typing_extensions import Unpack

    from detrkit.engines.placement import Device, Dtype
    from detrkit.processing.image_processor import DetrImageProcessorBase
    from detrkit.processing.images import ImageSource

_Result = TypeVar("_Result")

# What a call takes: one image, one or many, many (a str is iterable too, hence the ignores).
_File: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | BinaryIO | Image"
_Array: TypeAlias = "np.ndarray | torch.Tensor"
_Many: TypeAlias = "Iterable[ImageSource]"


class Detector:
    """A model with its image processor: detects objects in images.

    Attributes:
        model: The model as it is run, ready for inference.
        processor: The image processor that belongs to it; an exported model's gives arrays.
        names: Label -> class name.
        limits: Maximum size of image files, and the addresses that may be opened; can be set.
        detection_config: The default settings that turn scores into detections; can be set.
    """

    def __init__(
        self,
        model: RunnableModel,
        processor: DetrImageProcessorBase,
        *,
        engine: str = "torch",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        limits: ImageLimits | None = None,
    ) -> None:
        """Prepares a model for inference; ``from_pretrained`` loads model and processor as well.

        On a CPU the process then keeps freed memory for reuse (see :mod:`detrkit.engines.allocator`).

        Args:
            model: A detection or segmentation model of detrkit. The detector prepares a copy: the model can
                still be trained and saved, and later changes to it do not reach the detector.
            processor: Its image processor; one of Transformers or of another family gives its options to one
                that reads the model's outputs.
            engine: As for ``from_pretrained``, like the others. "onnx" and "openvino" first export the model,
                which takes a while and is saved by loading a folder that ``detrkit export`` wrote.
            device: Where the engine runs.
            dtype: Type of the weights.
            limits: Of image files and addresses.

        Raises:
            SettingError: Engine, device or dtype do not exist or are not available here, or the model or
                processor is of another kind.
            MissingExtraError: The engine's packages are not installed.
        """
        check_engine(engine)
        placement = place(engine, device, dtype)
        model = own_model(model)
        processor = own_processor(processor, model.config.model_type)
        self._start(model, processor, engine, placement, limits, DetectionConfig())

    def _start(
        self,
        model: RunnableModel,
        processor: DetrImageProcessorBase | ArrayImageProcessor,
        engine: str,
        placement: tuple[Device, Dtype],
        limits: ImageLimits | None,
        detection_config: DetectionConfig,
    ) -> None:
        """Starts a model on an engine, device and dtype that have been checked."""
        from detrkit.engines.allocator import Excess, keep_memory

        self._engine, self._placement = engine, placement
        self.names: dict[int, str] = {int(label): str(name) for label, name in model.config.id2label.items()}
        if engine in EXPORTED_ENGINES:
            family = family_of(model.config.model_type, "the model")
            processor = ArrayImageProcessor.of(processor, family.class_scores)
        self.processor = processor.fitted_to(getattr(model.config, "num_channels", 3))
        self.limits = limits or ImageLimits()
        self._object_limit = processor.object_limit(model.config.object_queries)
        self._is_thing_map = getattr(model.config, "is_thing_map", None)
        self.detection_config = detection_config
        keeps_memory = str(placement[0]) == "cpu" and keep_memory()
        self._excess = Excess() if keeps_memory else None
        self.model: RunnableModel = start(model, engine, *placement)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        engine: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        queries: int | None = None,
        limits: ImageLimits | None = None,
    ) -> Detector:
        """Loads a model and its image processor.

        Args:
            model: A Hub id ("facebook/detr-resnet-50"), a folder, or a short name ("detr-resnet-50").
            engine: What runs the model: "torch", "compile", "onnx" or "openvino" (see
                :mod:`detrkit.engines`); by default the one that a folder's model was exported for, otherwise
                "torch".
            device: Such as "cpu" or "cuda:1"; by default a GPU if there is one and the engine runs there.
            dtype: "float32" (the default), "float16" or "bfloat16", or the torch dtype.
            revision: Branch, tag or commit on the Hub.
            queries: Object queries of a two-stage Deformable DETR, which finds more in crowds with more of
                them, without training; None for those that it was trained with.
            limits: Maximum size of image files, and the addresses that may be opened; None for the defaults.

        Raises:
            CheckpointError: The model cannot be found, read or used.
            SettingError: Engine, device or dtype do not exist or are not available here, or the model cannot
                have so many queries.
            MissingExtraError: The engine's packages are not installed.
        """
        from detrkit.checkpoints.loading import choose_engine, read_detection_config
        from detrkit.checkpoints.opening import open_model
        from detrkit.checkpoints.registry import resolve_model

        # Mistakes in the settings should not wait for a download.
        name = resolve_model(os.fspath(model))
        manifest, engine = choose_engine(name, engine)
        check_engine(engine)
        placement = place(engine, device, dtype)
        loaded, processor = open_model(name, revision, engine, manifest, queries)
        settings = read_detection_config(name, revision)
        detector = cls.__new__(cls)
        detector._start(loaded, processor, engine, placement, limits, settings)
        return detector

    @property
    def config(self) -> ModelConfig:
        """The model's configuration; an exported model's has the entries of its config.json as attributes."""
        return self.model.config

    @property
    def has_masks(self) -> bool:
        """Whether the model gives masks, so that it can segment."""
        return has_masks(self.model)

    @property
    def detection_config(self) -> DetectionConfig:
        """The default settings that turn scores into detections; arguments of a call take precedence."""
        return self._detection_config

    @detection_config.setter
    def detection_config(self, config: DetectionConfig) -> None:
        DetectionRule(config, self.names)  # a class that the model does not have
        self._detection_config = config

    def with_config(self, config: DetectionConfig, tiles: Tiles = None) -> Detector:
        """A detector with other detection settings and the same model; this detector does not change.

        Args:
            config: The settings.
            tiles: As for a call; replaces the tiles in the settings.

        Raises:
            SettingError: The settings name a class that the model does not have, or ``tiles`` is not a size.
        """
        other = copy.copy(self)
        other.detection_config = with_tiles(config, tiles, lambda: self.processor)
        return other

    @property
    def _device(self) -> Device:
        return getattr(self.model, "device", self._placement[0])  # it may have been moved by hand

    @property
    def _dtype(self) -> Dtype:
        return getattr(self.model, "dtype", self._placement[1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        wake(self.model, self._engine)

    def __repr__(self) -> str:
        return (
            f"Detector({type(self.model).__name__}, {len(self.names)} classes, {self._device}, {self._dtype})"
        )

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self,
        images: _File,
        threshold: Threshold | None = ...,
        batch_size: int = ...,
        **options: Unpack[CallOptions],
    ) -> Detections: ...

    @overload
    def __call__(
        self,
        images: _Array,
        threshold: Threshold | None = ...,
        batch_size: int = ...,
        **options: Unpack[CallOptions],
    ) -> Any: ...

    @overload
    def __call__(
        self,
        images: _Many,
        threshold: Threshold | None = ...,
        batch_size: int = ...,
        **options: Unpack[CallOptions],
    ) -> list[Detections]: ...

    def __call__(
        self,
        images: ImageSource | _Many,
        threshold: Threshold | None = None,
        batch_size: int = 1,
        *,
        masks: bool | None = None,
        max_objects: int | None = None,
        overlap: float | None = None,
        class_agnostic: bool | None = None,
        tiles: Tiles = None,
        exif_orientation: bool = False,
    ) -> Detections | list[Detections]:
        """Finds the objects in one image or in many.

        Only images of one processed size are batched, so that a result does not depend on the others.

        Args:
            images: A path, an address, the bytes of a file, an open file, a PIL image, an (H, W, 3) array or
                a tensor, or many in a list, a generator or a 4-dimensional array.
            threshold: Only objects with a higher score are given: a number, or one for each class name. This
                and the three options of the filter are as ``detection_config`` says where they are None.
            batch_size: Maximum number of images that go through the model at once.
            masks: Whether to give a mask for each object; by default if the model has masks.
            max_objects: The most objects of an image, the best ones; at most as many as the model has object
                queries, in each tile.
            overlap: IoU above which the lower-scored of two boxes is dropped; 1 keeps all.
            class_agnostic: Whether boxes of two classes drop each other too.
            tiles: Cut larger images into overlapping tiles: of this side in pixels or of this height and
                width, "auto" for tiles like the images of the training, 0 for none.
            exif_orientation: Turn each image as its EXIF entry says; boxes then refer to the turned image. By
                default boxes refer to the pixels as they are stored, which is what annotation files do.

        Returns:
            ``Detections`` in pixels of the original image for one image, a list of them in the order of the
            images for many.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: A number is out of range, or the model gives no masks.
        """
        options = {"max_objects": max_objects, "overlap": overlap, "class_agnostic": class_agnostic}
        run = self._detecting(threshold, masks, tiles, **options)
        return self._images(batch_size, exif_orientation).one_or_many(images, run, "Detecting")

    def stream(
        self,
        images: _Many,
        threshold: Threshold | None = None,
        batch_size: int = 1,
        *,
        masks: bool | None = None,
        max_objects: int | None = None,
        overlap: float | None = None,
        class_agnostic: bool | None = None,
        tiles: Tiles = None,
        exif_orientation: bool = False,
    ) -> Iterator[Detections]:
        """Like a call with many images, but yields the results in order, each as soon as it is available.

        The next images are read and resized in the background, where ``images`` is iterated over too, while
        the model runs. Only a few batches are held in memory. Arguments are those of a call.
        """
        options = {"max_objects": max_objects, "overlap": overlap, "class_agnostic": class_agnostic}
        run = self._detecting(threshold, masks, tiles, **options)
        return self._images(batch_size, exif_orientation).results(images, run)

    def stream_layers(
        self,
        images: _Many,
        batch_size: int = 1,
        *,
        overlaps: Sequence[float | None] = (None,),
        exif_orientation: bool = False,
    ) -> Iterator[list[Detections]]:
        """Like ``stream`` with threshold 0 and without masks, but for each decoder layer.

        Args:
            images: Like the others, as for a call.
            batch_size: Maximum number of images that go through the model at once.
            overlaps: Values of ``overlap``, each of which all layers are read with.
            exif_orientation: Turn each image as its EXIF entry says.

        Returns:
            For each image, in order, the detections of all layers, the last layer's last, with the first of
            ``overlaps``, then those with the next.

        Raises:
            SettingError: The engine is not "torch", or ``detection_config`` cuts images into tiles.
        """
        if self._engine != "torch":
            raise SettingError(f"the engine {self._engine} gives the last decoder layer only; use torch")
        options = self.detection_config.with_options
        configs = [options(threshold=0.0, overlap=overlap) for overlap in overlaps]
        run = detecting_by_layer(self._runner, self._reader, configs)
        return self._images(batch_size, exif_orientation).results(images, run)

    @overload
    def segment(  # type: ignore[overload-overlap]
        self, images: _File, threshold: float = ..., batch_size: int = ..., *, exif_orientation: bool = ...
    ) -> PanopticSegmentation: ...

    @overload
    def segment(
        self, images: _Array, threshold: float = ..., batch_size: int = ..., *, exif_orientation: bool = ...
    ) -> Any: ...

    @overload
    def segment(
        self, images: _Many, threshold: float = ..., batch_size: int = ..., *, exif_orientation: bool = ...
    ) -> list[PanopticSegmentation]: ...

    def segment(
        self,
        images: ImageSource | _Many,
        threshold: float = 0.85,
        batch_size: int = 1,
        *,
        exif_orientation: bool = False,
    ) -> PanopticSegmentation | list[PanopticSegmentation]:
        """Assigns every pixel of one image, or of many, to an object or background class.

        Args:
            images: As for a call.
            threshold: Only segments with a higher score are given.
            batch_size: Maximum number of images that go through the model at once.
            exif_orientation: As for a call.

        Returns:
            A ``PanopticSegmentation`` in pixels of the original image for one image, a list of them in the
            order of the images for many.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range, or the model gives no masks.
        """
        streams = self._images(batch_size, exif_orientation)
        return streams.one_or_many(images, self._segmenting(threshold), "Segmenting")

    def stream_segments(
        self,
        images: _Many,
        threshold: float = 0.85,
        batch_size: int = 1,
        *,
        exif_orientation: bool = False,
    ) -> Iterator[PanopticSegmentation]:
        """Like ``segment`` with many images, but yields each result, in order, as soon as it is available."""
        return self._images(batch_size, exif_orientation).results(images, self._segmenting(threshold))

    def predict(
        self,
        image: ImageSource,
        min_threshold: float = 0.1,
        *,
        attentions: bool = False,
        exif_orientation: bool = False,
    ) -> Prediction:
        """Runs the model on one image, for results at many thresholds without running it again.

        Args:
            image: One of those that a call takes.
            min_threshold: The lowest threshold that will be asked for; with a model that gives masks, a
                higher one saves time and memory.
            attentions: Keep all of the model's outputs, its attention weights included, but compute no masks;
                requires the engine "torch".
            exif_orientation: As for a call.

        Raises:
            ImageError: The image cannot be found or read.
            SettingError: ``min_threshold`` is out of range, or the image is to be cut into tiles.
        """
        check_numbers(min_threshold, 1)
        batch, with_masks = [self.prepare(image, exif_orientation)], self.has_masks
        run = self._runner.predictions
        return next(run(batch, self._reader, min_threshold, masks=with_masks, attentions=attentions))

    def predict_in_tiles(
        self, image: ImageSource, min_threshold: float = 0.1, *, exif_orientation: bool = False
    ) -> TiledPrediction:
        """Like ``predict`` for an image that ``detection_config`` has cut into tiles, without masks."""
        run = self._detecting(min_threshold, False, None)
        assert isinstance(run, TiledRun)
        found = next(self._images(1, exif_orientation).in_tiles([image], run))
        return replace(found, config=self.detection_config)

    def stream_predictions(
        self, images: _Many, batch_size: int = 1, *, exif_orientation: bool = False
    ) -> Iterator[Prediction]:
        """Like ``predict`` with many images, read ahead as by ``stream``; any threshold, but no masks."""
        runner, reader = self._runner, self._reader
        run = partial(runner.predictions, reader=reader, min_threshold=0.0, masks=False, attentions=False)
        return self._images(batch_size, exif_orientation).results(images, run)

    def _detecting(
        self, threshold: Threshold | None, masks: bool | None, tiles: Tiles, **options: Any
    ) -> BatchRun[Detections]:
        """What finds the objects of images, its settings checked."""
        config = self.detection_config.with_options(threshold=threshold, **options)
        return detecting(self._runner, self._reader, with_tiles(config, tiles, lambda: self.processor), masks)

    def _segmenting(self, threshold: float) -> Callable[[Batch], Iterator[PanopticSegmentation]]:
        """What segments a batch, its settings checked."""
        check_numbers(threshold, 1)
        reader, runner = self._reader, self._runner
        model = runner.masks_above(threshold)
        return lambda batch: reader.segments(
            runner.outputs(batch, model), [item.frame for item in batch], threshold
        )

    def _images(self, batch_size: int, exif_orientation: bool) -> ImageStreams:
        return ImageStreams(self.processor, self._device, self.limits, batch_size, exif_orientation)

    def prepare(self, image: ImageSource, exif_orientation: bool = False) -> PreparedImage:
        """Reads and resizes an image ahead, in any thread; calls and streams take the result as an image."""
        return self._images(1, exif_orientation).prepare(image)

    @property
    def _runner(self) -> ModelRunner:
        if isinstance(self.processor, ArrayImageProcessor):
            return ModelRunner(self.model, self._excess)
        return TorchRunner(self.model, self._excess, self.processor, self._device, self._dtype)

    @property
    def _reader(self) -> OutputReader:
        return OutputReader(
            processor=self.processor,
            names=self.names,
            has_masks=self.has_masks,
            object_limit=self._object_limit,
            config=self.detection_config,
            is_thing_map=self._is_thing_map,
        )

    def categories(self, found: Collection[int] = ()) -> list[Category]:
        """The model's classes as the ``categories`` of a COCO document.

        Args:
            found: Labels of results, which are listed even where COCO left them unused ("N/A").

        Returns:
            For each class ``id`` and ``name``, and ``isthing`` if the model gives masks.
        """
        return self._reader.categories(found)
