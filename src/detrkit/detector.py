"""The main job in one object: images in, boxes in pixels out.

Example:
    ```python
    from detrkit import Detector

    detector = Detector.from_pretrained("facebook/detr-resnet-50")
    detections = detector("photo.jpg")
    detections.draw("photo.jpg").save("photo_boxes.jpg")
    ```
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from detrkit.errors import CheckpointError, ImageError, MissingExtraError, SettingError
from detrkit.integration import Family, family_of

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_ENGINES = ("torch",)
_LATER_ENGINES = ("compile", "onnx", "openvino")
_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}
# A batch holds images of one processed size only. Up to this many batches' worth of images wait for others
# of their size before they are run in a smaller batch.
_WAITING_BATCHES = 4
_PROGRESS_AFTER_SECONDS = 3.0

_Item = TypeVar("_Item")


class Detection(NamedTuple):
    """One detected object.

    Attributes:
        box: (4,) float32, x0, y0, x1, y1 in pixels of the original image.
        score: Confidence in [0, 1].
        label: Class id.
        name: Class name.
        mask: (height, width) bool, or None.
    """

    box: np.ndarray
    score: float
    label: int
    name: str
    mask: np.ndarray | None = None


@dataclass(eq=False, repr=False)
class Detections:
    """The objects found in one image, the most confident first.

    ``len()`` counts them, iterating gives a ``Detection`` each, and indexing takes an integer (a
    ``Detection``) or a slice, a boolean mask or a list of positions (``Detections``):
    ``detections[detections.scores > 0.9]``.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels of the original image. As in the original
            implementations, a box may reach a little over the border.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64 class ids.
        names: N class names.
        image_size: Height and width of the original image in pixels.
        masks: (N, height, width) bool, or None where the model gives none.
        source: File name or address of the image, where it came from one.
        exif_orientation: Whether the boxes refer to the image turned as its EXIF entry says.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: list[str]
    image_size: tuple[int, int]
    masks: np.ndarray | None = None
    source: str | None = None
    exif_orientation: bool = False

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        return (self._row(i) for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (int, np.integer)) and not isinstance(index, bool):
            return self._row(int(index))
        chosen = np.arange(len(self))[_as_index(index)]
        return Detections(
            boxes=self.boxes[chosen],
            scores=self.scores[chosen],
            labels=self.labels[chosen],
            names=[self.names[i] for i in chosen],
            image_size=self.image_size,
            masks=None if self.masks is None else self.masks[chosen],
            source=self.source,
            exif_orientation=self.exif_orientation,
        )

    def __repr__(self) -> str:
        height, width = self.image_size
        where = f" in {self.source}" if self.source else ""
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.names).most_common())
        return f"Detections({len(self)}{where}, {width}x{height}{': ' if counts else ''}{counts})"

    def _row(self, i: int) -> Detection:
        mask = None if self.masks is None else self.masks[i]
        return Detection(self.boxes[i], float(self.scores[i]), int(self.labels[i]), self.names[i], mask)

    def to_coco(self, image_id: int = 0, first_id: int = 1) -> list[dict[str, Any]]:
        """The detections as entries of a COCO document's ``annotations`` (or of a COCO results file).

        Args:
            image_id: Id of the image.
            first_id: ``id`` of the first entry; the others count on from it.

        Returns:
            A dict for each detection: ``id``, ``image_id``, ``category_id``, ``bbox`` (x, y of the top left
            corner, width, height, in pixels), ``area`` (of the box, in pixels) and ``score``.
        """
        entries = []
        sizes = self.boxes[:, 2:] - self.boxes[:, :2]
        for i, (box, size) in enumerate(zip(self.boxes, sizes)):
            entries.append(
                {
                    "id": first_id + i,
                    "image_id": image_id,
                    "category_id": int(self.labels[i]),
                    "bbox": [_shortest(v) for v in (*box[:2], *size)],
                    "area": _shortest(size[0] * size[1]),
                    "score": _shortest(self.scores[i]),
                }
            )
        return entries

    def to_supervision(self) -> Any:
        """The detections as ``supervision.Detections``, with the names under ``data["class_name"]``.

        Raises:
            MissingExtraError: The supervision package is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise MissingExtraError("Detections.to_supervision()", "supervision") from error
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            mask=None if self.masks is None else self.masks.astype(bool),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, image: Any = None) -> Image:
        """Draws boxes, names and scores on a picture.

        Args:
            image: The picture that was given to the detector (path, address, PIL image, array or tensor).
                When left out, the file or address that the detections came from is read again.

        Returns:
            A new RGB picture of the same size.

        Raises:
            ImageError: The picture cannot be read, or is not of the size that the boxes refer to.
        """
        from detrkit.processing.images import load_image
        from detrkit.visualization import class_color, draw_boxes

        if image is None:
            if self.source is None:
                raise ImageError("these detections did not come from a file; give draw() the image")
            image = self.source
        picture = load_image(image, exif_orientation=self.exif_orientation)
        height, width = self.image_size
        if picture.size != (width, height):
            raise ImageError(
                f"the boxes refer to an image of {width}x{height} pixels, but the picture to draw on has "
                f"{picture.width}x{picture.height}"
            )
        captions = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores)]
        return draw_boxes(picture, self.boxes, captions, [class_color(int(label)) for label in self.labels])


class Detector:
    """A model with its image processor: finds the objects in images of any kind.

    Attributes:
        model: The model as it is run, ready for inference.
        processor: The image processor that belongs to it.
        names: Class id -> class name.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        engine: str = "torch",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Prepares a model for inference; ``from_pretrained`` loads model and processor as well.

        On a CPU this also makes the process keep freed memory for reuse (see
        :mod:`detrkit.engines.allocator`).

        Args:
            model: An object detection model of detrkit; it is changed, and can no longer be trained.
            processor: Its image processor.
            engine: What runs the model; "torch" is the only one in this version.
            device: Such as "cpu" or "cuda:1"; by default a GPU where there is one.
            dtype: "float32" (the default), "float16" or "bfloat16", or the torch dtype.

        Raises:
            SettingError: Engine, device or dtype do not exist or are not available here.
        """
        _check_engine(engine)
        self._device, self._dtype = _torch_device(device), _torch_dtype(dtype)
        from detrkit.engines.allocator import keep_memory
        from detrkit.engines.torch_engine import prepare

        self.names: dict[int, str] = {int(label): str(name) for label, name in model.config.id2label.items()}
        self.processor = processor
        if self._device.type == "cpu":
            keep_memory()
        self.model = prepare(model, self._device, self._dtype)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        *,
        engine: str = "torch",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> Detector:
        """Loads a model and its image processor.

        Args:
            model: A Hub id ("facebook/detr-resnet-50"), a folder, or a short name ("detr-resnet-50").
            engine: What runs the model; "torch" is the only one in this version.
            device: Such as "cpu" or "cuda:1"; by default a GPU where there is one.
            dtype: "float32" (the default), "float16" or "bfloat16", or the torch dtype.
            revision: Branch, tag or commit on the Hub.

        Raises:
            CheckpointError: The model cannot be found, read or used.
            SettingError: Engine, device or dtype do not exist or are not available here.
        """
        from detrkit.checkpoints.registry import resolve_model

        # Mistakes in the settings should not wait for a download.
        _check_engine(engine)
        device, dtype = _torch_device(device), _torch_dtype(dtype)
        name = resolve_model(os.fspath(model))
        family = _read_family(name, revision)
        return cls(
            _load_model(family, name, revision),
            _load_processor(family, name, revision),
            engine=engine,
            device=device,
            dtype=dtype,
        )

    def __repr__(self) -> str:
        return (
            f"Detector({type(self.model).__name__}, {len(self.names)} classes, {self._device}, {self._dtype})"
        )

    def __call__(
        self, images: Any, threshold: float = 0.5, batch_size: int = 1, *, exif_orientation: bool = False
    ) -> Any:
        """Finds the objects in one image or in many.

        Images are only batched with others of the same processed size, so that a result does not depend on
        the other images.

        Args:
            images: A path, an http(s) address, a PIL image, an (H, W, 3) array or a tensor, or many in
                a list, a generator or a 4-dimensional array.
            threshold: Only objects with a higher score are given.
            batch_size: The most images that go through the model at once.
            exif_orientation: Turn each image as its EXIF entry says; boxes then refer to the turned image. By
                default boxes refer to the pixels as they are stored, which is what annotation files do.

        Returns:
            ``Detections`` in pixels of the original image for one image, a list of them in the order of the
            images for many.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range.
        """
        many = not _is_one_image(images)
        total = len(images) if hasattr(images, "__len__") and many else None
        results = self.stream(
            images if many else [images], threshold, batch_size, exif_orientation=exif_orientation
        )
        if not many:
            return next(results)
        return list(with_progress(results, total))

    def stream(
        self,
        images: Iterable[Any],
        threshold: float = 0.5,
        batch_size: int = 1,
        *,
        exif_orientation: bool = False,
    ) -> Iterator[Detections]:
        """Like calling the detector with many images, but gives each result as soon as it is there.

        Only a few batches of images are held in memory, however many there are.

        Args:
            images: Images of any kind that a call takes.
            threshold: Only objects with a higher score are given.
            batch_size: The most images that go through the model at once.
            exif_orientation: Turn each image as its EXIF entry says.

        Returns:
            An iterator of the ``Detections``, in the order of the images.

        Raises:
            ImageError: An image cannot be found or read.
            SettingError: ``threshold`` or ``batch_size`` are out of range.
        """
        if not 0 <= threshold <= 1:
            raise SettingError(f"threshold must lie between 0 and 1, not {threshold}")
        if batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, not {batch_size}")
        return self._stream(images, threshold, batch_size, exif_orientation)

    def _stream(
        self, images: Iterable[Any], threshold: float, batch_size: int, exif_orientation: bool
    ) -> Iterator[Detections]:
        waiting: dict[tuple[int, ...], list[_Prepared]] = {}
        finished: dict[int, Detections] = {}
        following = 0  # position of the next result to give

        for position, source in enumerate(images):
            item = self._prepare(position, source, exif_orientation)
            batch = waiting.setdefault(item.shape, [])
            batch.append(item)
            held_up = position + 1 - following >= _WAITING_BATCHES * batch_size
            if len(batch) < batch_size and held_up:
                # The first image in line holds up the results of all behind it.
                batch = min(waiting.values(), key=lambda items: items[0].position)
            if len(batch) == batch_size or held_up:
                finished.update(self._detect(waiting.pop(batch[0].shape), threshold))
            while following in finished:
                yield finished.pop(following)
                following += 1
        for batch in waiting.values():
            finished.update(self._detect(batch, threshold))
        for position in sorted(finished):
            yield finished[position]

    def _prepare(self, position: int, source: Any, exif_orientation: bool) -> _Prepared:
        image = read_image(source, exif_orientation=exif_orientation)
        inputs = self.processor(images=[image], return_tensors="pt")
        return _Prepared(
            position=position,
            pixel_values=inputs["pixel_values"],
            pixel_mask=inputs.get("pixel_mask"),
            image_size=(image.height, image.width),
            source=os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
            exif_orientation=exif_orientation,
        )

    def _detect(self, batch: Sequence[_Prepared], threshold: float) -> Iterator[tuple[int, Detections]]:
        """Runs the model on images of one processed size; gives their positions and detections."""
        import torch

        inputs = {
            "pixel_values": torch.cat([item.pixel_values for item in batch]).to(self._device, self._dtype)
        }
        masks = [item.pixel_mask for item in batch if item.pixel_mask is not None]
        if masks and not all(bool(mask.all()) for mask in masks):
            inputs["pixel_mask"] = torch.cat(masks).to(self._device)
        with torch.inference_mode():
            outputs = self.model(**inputs)
        # Half precision would round box corners to whole pixels and more.
        outputs["logits"], outputs["pred_boxes"] = outputs["logits"].float(), outputs["pred_boxes"].float()
        results = self.processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=[item.image_size for item in batch]
        )
        return ((item.position, self._detections(result, item)) for result, item in zip(results, batch))

    def _detections(self, result: dict[str, torch.Tensor], item: _Prepared) -> Detections:
        scores = result["scores"].cpu().numpy().astype(np.float32)
        order = np.argsort(-scores, kind="stable")
        labels = result["labels"].cpu().numpy().astype(np.int64)[order]
        return Detections(
            boxes=result["boxes"].cpu().numpy().astype(np.float32).reshape(-1, 4)[order],
            scores=scores[order],
            labels=labels,
            names=[self.names.get(label, str(label)) for label in labels.tolist()],
            image_size=item.image_size,
            source=item.source,
            exif_orientation=item.exif_orientation,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Prepared:
    """One image ready for the model: (1, 3, H, W) pixel values and (1, H, W) mask of the real pixels."""

    position: int
    pixel_values: torch.Tensor
    pixel_mask: torch.Tensor | None
    image_size: tuple[int, int]
    source: str | None
    exif_orientation: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.pixel_values.shape[-2:])


def read_image(source: Any, *, exif_orientation: bool = False) -> Image:
    """Reads one image and leaves its EXIF block behind: whether to turn the image is settled here, once.

    Args:
        source: Path, address, PIL image, array or tensor.
        exif_orientation: Turn the image as its EXIF entry says.

    Returns:
        The RGB image.

    Raises:
        ImageError: The image cannot be found, read or used.
    """
    from detrkit.processing.images import load_image

    image = load_image(source, exif_orientation=exif_orientation)
    if image.info or image.format is not None:
        image = image.copy()
        image.info = {}
    return image


def with_progress(
    results: Iterable[_Item], total: int | None, description: str = "Detecting"
) -> Iterator[_Item]:
    """Passes results on, with a progress bar on stderr once they take more than a few seconds.

    There is no bar where stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield from results
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    start, shown = time.monotonic(), False
    try:
        for result in results:
            bar.advance(task)
            if not shown and time.monotonic() - start > _PROGRESS_AFTER_SECONDS:
                bar.start()
                shown = True
            yield result
    finally:
        if shown:
            bar.stop()


def _as_index(index: Any) -> Any:
    if isinstance(index, slice):
        return index
    index = np.asarray(index)
    return index.astype(np.int64) if index.size == 0 and index.dtype != bool else index


def _shortest(value: np.float32) -> float:
    """The float with the fewest digits that is the same float32; keeps JSON files small and exact."""
    return float(str(np.float32(value)))


def _is_one_image(images: Any) -> bool:
    """Whether the argument of a call is one image rather than many."""
    if isinstance(images, (str, os.PathLike)):
        return True
    dimensions = getattr(images, "ndim", None)  # arrays and tensors
    if dimensions is not None:
        return dimensions <= 3
    return not isinstance(images, Iterable)  # a PIL image is not iterable; load_image says what else is wrong


def _check_engine(engine: str) -> None:
    if engine in _LATER_ENGINES:
        raise SettingError(f"the engine {engine!r} is not available in this version; use 'torch'")
    if engine not in _ENGINES:
        raise SettingError(f"unknown engine {engine!r}; use one of: {', '.join(_ENGINES)}")


def _torch_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the default one; checked to be there."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise SettingError(f"unknown device {device!r}; use 'cpu', 'cuda' or 'cuda:0'") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"device '{found}' is not available: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise SettingError("device 'mps' is not available on this machine; use 'cpu'")
    return found


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    import torch

    if isinstance(dtype, str) and dtype in _DTYPES:
        return getattr(torch, _DTYPES[dtype])
    if dtype is None:
        return torch.float32
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        return dtype
    raise SettingError(f"unknown dtype {str(dtype)!r}; use 'float32', 'float16' or 'bfloat16'")


def _read_family(name: str, revision: str | None) -> Family:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise _unreadable(name, revision, "config.json", error) from error
    if not config:
        raise CheckpointError(f"{_where(name, revision)} has no config.json; {_remedy(name)}")
    return family_of(config.get("model_type"), name)


def _load_model(family: Family, name: str, revision: str | None) -> Any:
    from safetensors import SafetensorError

    try:
        model, report = family.load(family.detector).from_pretrained(
            name, revision=revision, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, EOFError, SafetensorError) as error:
        raise _unreadable(name, revision, "weights", error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        # Transformers would fill these with random numbers and go on.
        raise CheckpointError(
            f"the weights of {_where(name, revision)} lack {len(missing)} of the model's tensors, such as "
            f"{missing[0]}; {_remedy(name)}"
        )
    return model


def _load_processor(family: Family, name: str, revision: str | None) -> Any:
    try:
        return family.load(family.processor).from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _unreadable(name, revision, "preprocessor_config.json", error) from error


def _where(name: str, revision: str | None) -> str:
    return f"{name} (revision {revision})" if revision else name


def _remedy(name: str) -> str:
    if os.path.isdir(name):  # noqa: PTH112 - a Hub id is not a path
        return "save or convert the model again: detrkit convert CHECKPOINT OUTPUT --model NAME"
    return (
        "check the name and the revision, your network and, for a private model, your login (hf auth login)"
    )


def _unreadable(name: str, revision: str | None, part: str, error: Exception) -> CheckpointError:
    """One line that names the model and the part; the libraries' own messages run over many."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(
        f"cannot read the {part} of {_where(name, revision)}: {said.rstrip('.')}; {_remedy(name)}"
    )
