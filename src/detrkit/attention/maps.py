"""Looking inside a detector: what it attends to, and which of its queries fire where.

Figures 3, 6 and 7 of the DETR paper (https://arxiv.org/abs/2005.12872) as numbers;
:mod:`detrkit.attention.drawing` draws them.

DETR and Conditional DETR spread their attention over all cells of one feature map: an ``AttentionMaps``.
Deformable DETR samples a few points of several maps: an ``AttentionSamples``.

From a feature map to the image there is one rule, that of the models' own coordinates: the cells that are
not padding cover the image evenly, column c of n from c / n to (c + 1) / n of its width. A cell has seen more
than it covers: the receptive field of the backbone's last stage is hundreds of pixels wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from detrkit.common.errors import ImageError, SettingError
from detrkit.common.progress import with_progress
from detrkit.results.detection_config import Threshold
from detrkit.results.detections import Detections

if TYPE_CHECKING:
    import torch

    from detrkit.inference.detector import Detector
    from detrkit.inference.predictions import Prediction
    from detrkit.models.detection import ObjectDetectionModel
    from detrkit.processing.array_processor import ArrayImageProcessor
    from detrkit.processing.image_processor import DetrImageProcessorBase
    from detrkit.processing.images import ImageSource

_Self = TypeVar("_Self", bound="Attention")


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """What N places or objects attend to in one layer.

    ``len()`` counts them; indexing by a slice, a boolean mask or a list of positions chooses among them.

    Attributes:
        weights: (N, heads, ...) float32, not negative; those of a head sum to 1.
        points: (N, 2) float64, x and y in pixels of the original image: of the encoder the centre of the cell
            that attends, of the decoder the centre of the detected box.
        image_size: Height and width of the original image in pixels.
        layer: Which layer, counted from 0.
        detections: Of the decoder, the N objects that the queries found.
        queries: Of the decoder, (N,) int64, the number of each query.
    """

    weights: np.ndarray
    points: np.ndarray
    image_size: tuple[int, int]
    layer: int
    detections: Detections | None = None
    queries: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self: _Self, index: Any) -> _Self:
        if isinstance(index, (int, np.integer)):
            index = [index]
        rows = np.arange(len(self))[index]
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in self._by_row},
            detections=None if self.detections is None else self.detections[rows],
            queries=None if self.queries is None else self.queries[rows],
        )

    @property
    def _by_row(self) -> tuple[str, ...]:
        """Names of the arrays that have a row for each place or object."""
        return "weights", "points"

    def share_inside(self, boxes: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """How much of the attention falls into a box, all heads counting the same.

        Args:
            boxes: (N, 4), one for each row, x0, y0, x1, y1 in pixels of the original image.

        Returns:
            (N,) float64 in [0, 1].

        Raises:
            ValueError: There are not as many boxes as rows.
        """
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        if len(boxes) != len(self):
            raise ValueError(f"{len(boxes)} boxes for {len(self)} rows of attention")
        return np.array([self._share(row, box) for row, box in enumerate(boxes)], dtype=np.float64)

    def _share(self, row: int, box: np.ndarray) -> float:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMaps(Attention):
    """Attention to all cells of a feature map; ``weights`` are (N, heads, height, width), without padding."""

    @property
    def maps(self) -> np.ndarray:
        """(N, height, width) float32, the mean of the heads; each sums to 1."""
        return self.weights.mean(axis=1)

    def _share(self, row: int, box: np.ndarray) -> float:
        height, width = self.weights.shape[-2:]
        rows = _covered(height, self.image_size[0], box[1], box[3])
        columns = _covered(width, self.image_size[1], box[0], box[2])
        return float(rows @ self.weights[row].mean(axis=0, dtype=np.float64) @ columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionSamples(Attention):
    """Attention to sampled points; ``weights`` are (N, heads, levels, points), finest level first.

    Attributes:
        locations: (N, heads, levels, points, 2) float32, x and y in pixels of the original image. A sample
            may be outside of it, where it reads zeros.
    """

    locations: np.ndarray

    @property
    def _by_row(self) -> tuple[str, ...]:
        return "weights", "points", "locations"

    def _share(self, row: int, box: np.ndarray) -> float:
        at = self.locations[row]
        inside = ((at >= box[:2]) & (at <= box[2:])).all(axis=-1)
        return float(self.weights[row][inside].sum(dtype=np.float64)) / self.weights.shape[1]


def encoder_attention(
    detector: Detector,
    image: ImageSource,
    points: Iterable[Sequence[float]],
    *,
    layer: int = -1,
    level: int = 0,
    exif_orientation: bool = False,
) -> AttentionMaps | AttentionSamples:
    """What the encoder's cells at chosen points attend to (figure 3 of the DETR paper).

    Args:
        detector: A detector that PyTorch runs.
        image: Path, address, PIL image, array or tensor.
        points: N pairs x, y in pixels of the original image, from 0, the left or upper edge, to its width
            and height.
        layer: The encoder's layer; negative numbers count from the last.
        level: Of Deformable DETR, whose encoder has a cell at every point in each level: which level's cell,
            0 for the finest.
        exif_orientation: Turn the image as its EXIF entry says.

    Returns:
        A row for each point: maps, for Deformable DETR samples.

    Raises:
        SettingError: A point is outside the image, the layer or level does not exist, or the detector is
            not run by PyTorch's eager mode.
        ImageError: The image cannot be found or read.
    """
    look = _look(detector, image, exif_orientation)
    height, width = look.image_size
    wanted = check_points(points, look.image_size)
    if not wanted:
        raise SettingError("encoder attention needs at least one point, x and y in pixels of the image")
    if not 0 <= level < len(look.grids):
        raise SettingError(
            f"feature level {level} does not exist: this model has {len(look.grids)} levels, counted from 0"
        )
    grid = look.grids[level]
    columns = np.array([min(int(x / width * grid.real_width), grid.real_width - 1) for x, _ in wanted])
    rows = np.array([min(int(y / height * grid.real_height), grid.real_height - 1) for _, y in wanted])
    cells = sum(g.height * g.width for g in look.grids[:level]) + rows * grid.width + columns
    centres = np.stack(
        [(columns + 0.5) / grid.real_width * width, (rows + 0.5) / grid.real_height * height], axis=-1
    )
    return look.attention("encoder", layer, cells, points=centres)


def check_points(points: Iterable[Sequence[float]], image_size: tuple[int, int]) -> list[tuple[float, float]]:
    """The x and y of points, checked to be in an image.

    Args:
        points: Pairs x, y in pixels, from 0, the left or upper edge, to the width and height.
        image_size: Height and width of the image in pixels.

    Raises:
        SettingError: One does not, or is no pair of numbers.
    """
    height, width = image_size
    checked = []
    for point in points:
        try:
            x, y = (float(value) for value in point)
        except (TypeError, ValueError) as error:
            raise SettingError(f"a point is a pair of numbers x, y in pixels, not {point!r}") from error
        if not (0 <= x <= width and 0 <= y <= height):
            raise SettingError(
                f"the point {x:g},{y:g} is outside the image, which is {width} pixels wide and {height} high"
            )
        checked.append((x, y))
    return checked


class NothingDetectedError(SettingError):
    """No object scores above the threshold."""


def decoder_attention(
    detector: Detector,
    image: ImageSource,
    threshold: Threshold | None = None,
    *,
    layer: int = -1,
    exif_orientation: bool = False,
) -> AttentionMaps | AttentionSamples:
    """What the query of each detected object attends to in the image (figure 6 of the DETR paper).

    Args:
        detector: A detector that PyTorch runs.
        image: Path, address, PIL image, array or tensor.
        threshold: Only objects with a higher score; by default as the detector's settings say.
        layer: The decoder's layer; negative numbers count from the last.
        exif_orientation: Turn the image as its EXIF entry says.

    Returns:
        A row for each detection, the most confident first: maps, for Deformable DETR samples. Two objects of
        different classes can come from one query, except in DETR.

    Raises:
        NothingDetectedError: No object scores above the threshold.
        SettingError: The threshold is out of range, there is no such layer, or the detector is not run by
            PyTorch's eager mode.
        ImageError: The image cannot be found or read.
    """
    config = detector.detection_config.with_options(threshold=threshold)
    look = _look(detector, image, exif_orientation)
    found = look.prediction.objects(threshold)
    if len(found.queries) == 0:
        best = look.prediction.candidates().detections.scores[0]
        raise NothingDetectedError(
            f"no object scores above {config.describe(bare=True)}: the best score is {best:.3f}; lower the "
            "threshold"
        )
    boxes = found.detections.boxes.astype(np.float64)
    return look.attention(
        "decoder",
        layer,
        found.queries,
        points=(boxes[:, :2] + boxes[:, 2:]) / 2,
        detections=found.detections,
        queries=found.queries,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryStatistics:
    """The boxes that each query of a detector gave over many images: M boxes that scored above a threshold.

    Attributes:
        queries: (M,) int64, the number of the query.
        boxes: (M, 4) float32, cxcywh, normalised by the size of each image.
        scores: (M,) float32, the score of the query's best class.
        labels: (M,) int64, that class.
        images: (M,) int64, the position of the image.
        image_count: Number of images, those without any box too.
        query_count: Number of queries.
        ranked: Whether the queries are the proposals of a two-stage model. Their numbers are then ranks,
            query 0 being the encoder's best guess in each image, and no query has a place of its own.
    """

    queries: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    image_count: int
    query_count: int
    ranked: bool

    @property
    def counts(self) -> np.ndarray:
        """(query_count,) int64: in how many images each query gave a box."""
        return np.bincount(self.queries, minlength=self.query_count)


def query_statistics(
    detector: Detector,
    images: Iterable[ImageSource],
    threshold: float = 0.5,
    batch_size: int = 1,
    *,
    exif_orientation: bool = False,
    total: int | None = None,
) -> QueryStatistics:
    """Collects which queries fire where over many images (figure 7 of the DETR paper).

    A query gives one box an image, with the class that it scores highest. Shows a progress bar.

    Args:
        detector: A detector on any engine.
        images: Images of any kind that a detector takes.
        threshold: Only boxes with a higher score; below 0, all that the queries give, as in the paper.
        batch_size: Maximum number of images that go through the model at once.
        exif_orientation: Turn each image as its EXIF entry says.
        total: Number of images, for the progress bar, if ``images`` has no length.

    Raises:
        SettingError: ``threshold`` or ``batch_size`` are out of range.
        ImageError: There are no images, or one cannot be found or read.
    """
    if threshold > 1:
        raise SettingError(f"threshold must not be above 1, not {threshold}")
    predictions = detector.stream_predictions(images, batch_size, exif_orientation=exif_orientation)
    stream = (_fired(detector.processor, prediction.outputs, threshold) for prediction in predictions)
    if total is None and isinstance(images, Sized):
        total = len(images)
    found = list(with_progress(stream, total, "Asking the queries"))
    if not found:
        raise ImageError("no images to collect the queries' boxes from")
    fired, columns = zip(*found)
    queries, boxes, scores, labels = (np.concatenate(column) for column in zip(*columns))
    return QueryStatistics(
        queries=queries,
        boxes=boxes,
        scores=scores,
        labels=labels,
        images=np.repeat(np.arange(len(found)), [mask.sum() for mask in fired]),
        image_count=len(found),
        query_count=max(map(len, fired)),
        ranked=bool(getattr(detector.config, "two_stage", False)),
    )


def _fired(
    processor: DetrImageProcessorBase | ArrayImageProcessor, outputs: Mapping[str, Any], threshold: float
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Which queries of an image give a box, bool (queries,); their numbers, boxes, scores and labels."""
    logits, boxes = outputs["logits"], outputs["pred_boxes"]  # tensors, or arrays of an exported model
    probabilities = _array(processor.query_probabilities(logits)[0])[0]
    labels, scores = probabilities.argmax(-1), probabilities.max(-1)
    keep = scores > threshold
    return keep, (np.flatnonzero(keep), _array(boxes)[0][keep], scores[keep], labels[keep])


def _array(values: np.ndarray | torch.Tensor) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


class _Grid(NamedTuple):
    """Cells of a feature map, and how many of them, from the upper left, are not padding."""

    height: int
    width: int
    real_height: int
    real_width: int


@dataclass(frozen=True)
class _Look:
    """A model's outputs for one image, attentions included, and the shapes of its feature maps."""

    prediction: Prediction
    grids: list[_Grid]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.prediction.frame.image_size

    def attention(
        self, part: str, layer: int, rows: np.ndarray, **about: Any
    ) -> AttentionMaps | AttentionSamples:
        """The attention of some rows of a layer of the encoder or decoder, in the image's coordinates."""
        outputs: Mapping[str, Any] = self.prediction.outputs
        name = {"encoder": "encoder", "decoder": "cross"}[part]
        weights, locations = outputs[f"{name}_attentions"], outputs.get(f"{name}_sampling_locations")
        if not -len(weights) <= layer < len(weights):
            raise SettingError(
                f"{part} layer {layer} does not exist: this model has {len(weights)} layers, counted from 0"
            )
        about |= {"image_size": self.image_size, "layer": layer % len(weights)}
        if locations is None:
            grid = self.grids[0]
            chosen = weights[layer][0][:, rows].float().cpu().numpy().swapaxes(0, 1)
            maps = chosen.reshape(*chosen.shape[:2], grid.height, grid.width)
            return AttentionMaps(weights=maps[..., : grid.real_height, : grid.real_width].copy(), **about)
        height, width = self.image_size
        scales = [(width * g.width / g.real_width, height * g.height / g.real_height) for g in self.grids]
        at = locations[layer][0][rows].float().cpu().numpy()
        return AttentionSamples(
            weights=weights[layer][0][rows].float().cpu().numpy(),
            locations=at * np.array(scales, dtype=np.float32)[:, None],
            **about,
        )


def _look(detector: Detector, image: ImageSource, exif_orientation: bool) -> _Look:
    """Runs a detector on one image and keeps its attentions and the shapes of its feature maps."""
    grids: list[_Grid] = []

    def note(_: Any, inputs: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        """Every family encodes the positions of each map that it attends to, and knows what is padding."""
        feature_map, mask = inputs
        height, width = feature_map.shape[-2:]
        real = (height, width) if mask is None else (int(mask[0, :, 0].sum()), int(mask[0, 0].sum()))
        grids.append(_Grid(height, width, *real))

    model = _eager_model(detector)
    handle = model.model.backbone.position_embedding.register_forward_pre_hook(note)
    try:
        return _Look(detector.predict(image, attentions=True, exif_orientation=exif_orientation), grids)
    finally:
        handle.remove()


def _eager_model(detector: Detector) -> ObjectDetectionModel:
    """The detection model of a detector; a SettingError unless it runs on PyTorch's eager engine."""
    from torch import nn

    model = detector.model
    if not isinstance(model, nn.Module):
        raise SettingError(
            "exported models do not return attention; load the original model with engine='torch'"
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise SettingError("compiled models do not return attention; load the model with engine='torch'")
    return model.detector if detector.has_masks else model


def _covered(cells: int, length: int, start: float, end: float) -> np.ndarray:
    """(cells,): how much of each of the cells along an axis of ``length`` pixels an interval covers."""
    edges = np.linspace(0, length, cells + 1)
    overlap = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
    return overlap.clip(min=0) / (length / cells)
