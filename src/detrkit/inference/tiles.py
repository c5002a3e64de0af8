"""Large images: cut into overlapping tiles, which go through the model like images, and joined again.

Objects are chosen among the candidates of all tiles at once, by the same
:class:`~detrkit.results.detection_config.DetectionRule` as everywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from detrkit.common.errors import SettingError
from detrkit.common.terminal import say
from detrkit.common.text import short_name
from detrkit.inference.batching import map_in_threads, read_ahead, run_in_groups
from detrkit.inference.prepared import Origin, PreparedImage, origin_of
from detrkit.results.detection_config import DetectionConfig, DetectionRule, Threshold
from detrkit.results.detections import Detections
from detrkit.results.overlap import Views

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.processing.images import ImageSource
    from detrkit.results.panoptic import PanopticSegmentation

    Pixels: TypeAlias = Image | np.ndarray | PreparedImage

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are not included."""

Tiles: TypeAlias = "int | str | Sequence[int] | None"
"""Side of square tiles in pixels, or height and width; "auto" for tiles like the training's images; 0 for
no tiles; None as the detection settings say."""

AUTO = "auto"
TRAINING_SCALE = "training_scale"
"""Where ``DetectionConfig.chosen`` has what :func:`detrkit.data.training_scale` gives."""

# While the tiles of one image go through the model.
_SECONDS_BETWEEN_LINES = 60.0

# Tiles that share more than this with their neighbours cost more than they find.
_MOST_OVERLAP = 0.5


def with_tiles(
    config: DetectionConfig, tiles: Tiles, load_processor: Callable[[], object]
) -> DetectionConfig:
    """Detection settings with the tiles that a call or command asks for.

    "auto" takes the size of the images that the model was trained on, at which it sees objects at the scale
    it knows, and an overlap in which a large object fits. Without a record of them it takes the size that the
    image processor resizes to.

    Args:
        config: The model's settings.
        tiles: What is asked for.
        load_processor: Gives the model's image processor; only called if it is needed.

    Raises:
        SettingError: It is out of range, or "auto" has nothing to go by.
    """
    if tiles is None:
        return config
    if isinstance(tiles, str):
        if tiles != AUTO:
            raise SettingError(
                f"tiles must be a side in pixels, a height and a width, or {AUTO!r}, not {tiles!r}"
            )
        return _automatic(config, load_processor)
    return replace(config, tile_size=None if tiles == 0 else tiles)


def read_tiles(text: str | None) -> Tiles:
    """The value of ``--tiles``: "auto", a side such as "640", a height and a width such as "480x640", or "0".

    Raises:
        SettingError: It is something else.
    """
    if text is None or text == AUTO:
        return text
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and len(side) < 10 for side in sides):
        raise SettingError(
            f"--tiles must be {AUTO}, a side in pixels (640), a height and a width (480x640), or 0 for no "
            f"tiles, not {text[:100]!r}"
        )
    return int(sides[0]) if len(sides) == 1 else tuple(map(int, sides))


def _automatic(config: DetectionConfig, load_processor: Callable[[], object]) -> DetectionConfig:
    known = config.chosen.get(TRAINING_SCALE)
    if known is not None:
        try:
            height, width = (int(side) for side in known["image_size"])
            large = float(known.get("large_object_side") or 0)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise SettingError(
                f"{TRAINING_SCALE} in the model's detection settings is damaged; give the size of the tiles"
            ) from error
        needed = large / max(1, min(height, width))
        overlap = max(config.tile_overlap, min(_MOST_OVERLAP, math.ceil(needed * 100) / 100))
        return replace(config, tile_size=(height, width), tile_overlap=overlap)
    processor = load_processor()
    size = getattr(processor, "size", None)
    sides = dict(size) if getattr(processor, "do_resize", True) and isinstance(size, Mapping) else {}
    for names in (("height", "width"), ("shortest_edge",), ("max_height", "max_width"), ("longest_edge",)):
        if all(sides.get(name) for name in names):
            return replace(config, tile_size=(sides[names[0]], sides[names[-1]]))
    raise SettingError(
        "the model does not say what size of images it was made for; give the size of the tiles in pixels"
    )


def tile_boxes(height: int, width: int, shape: tuple[int, int], overlap: float) -> list[Box]:
    """Tiles that cover an image, row by row; all of one size, at even distances.

    Args:
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        shape: Height and width of a tile in pixels; an image that is smaller has tiles of its own height or
            width.
        overlap: Least part of a tile's sides that two neighbours share, from 0 to below 1.
    """
    tall, wide = min(shape[0], height), min(shape[1], width)
    return [
        (left, top, left + wide, top + tall)
        for top in _starts(height, tall, overlap)
        for left in _starts(width, wide, overlap)
    ]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    step = max(1.0, side * (1 - overlap))
    gaps = math.ceil((length - side) / step - 1e-9)  # as many as there are, in spite of rounding
    return [round(i * (length - side) / gaps) for i in range(gaps + 1)] if gaps > 0 else [0]


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tile was cut out.

    Attributes:
        box: The tile.
        image_size: Height and width of the image in pixels.
        tiles: How many tiles the image has.
        origin: Where the image came from.
    """

    box: Box
    image_size: tuple[int, int]
    tiles: int
    origin: Origin


@dataclass(frozen=True, kw_only=True)
class TiledRun:
    """Detection in the tiles of images.

    Attributes:
        run: Finds what may become objects in a batch of tiles: the candidates that ``TileRule`` selects.
        config: The detection settings, which say how images are cut.
        names: The model's labels and their class names.
    """

    run: Callable[[Sequence[PreparedImage]], Iterable[Detections]]
    config: DetectionConfig
    names: Mapping[int, str]

    def stream(
        self,
        images: Iterable[ImageSource],
        read: Callable[[ImageSource], Pixels],
        prepare: Callable[[Any], PreparedImage],
        exif_orientation: bool,
        batch_size: int,
        threads: int,
    ) -> Iterator[TiledPrediction]:
        """What is in the tiles of each image, in order; tiles share batches, also those of two images.

        Args:
            images: The images; one at a time is read, in the background.
            read: Reads one as pixels.
            prepare: Makes the model's input from the pixels of a tile; called in several threads.
            exif_orientation: Whether images are turned as their EXIF entry says.
            batch_size: Maximum number of tiles that go through the model at once.
            threads: How many threads prepare tiles.
        """
        prepared = map_in_threads(partial(_prepared, prepare), self._pieces(images, read), threads)
        ready = read_ahead(prepared, depth=batch_size + 1)
        found = run_in_groups(
            ready, self._found, kind=lambda item: item[1].frame.padded_size, size=batch_size
        )
        waiting: list[tuple[_Place, Detections]] = []
        told = time.monotonic()
        for piece in found:
            waiting.append(piece)
            if time.monotonic() - told > _SECONDS_BETWEEN_LINES:  # an image can take as long as thousands
                told = time.monotonic()
                name = short_name(piece[0].origin.source or "image")
                say(
                    f"{name}: {len(waiting)} of {piece[0].tiles} tiles",
                    done=len(waiting),
                    total=piece[0].tiles,
                )
            if len(waiting) == piece[0].tiles:
                yield TiledPrediction(
                    self.config, self.names, self.config.least_threshold, waiting, exif_orientation
                )
                waiting = []

    def _pieces(
        self, images: Iterable[ImageSource], read: Callable[[ImageSource], Pixels]
    ) -> Iterator[tuple[_Place, Pixels]]:
        for source in images:
            # Not bound here: while the next image is read this one can go.
            yield from self._cut(source if isinstance(source, PreparedImage) else read(source), source)

    def _cut(self, pixels: Pixels, source: ImageSource) -> Iterator[tuple[_Place, Pixels]]:
        origin = origin_of(source)
        size = _size_of(pixels)
        if isinstance(pixels, PreparedImage):  # resized already
            self.config.check_whole(size, pixels.frame.source)
            yield _Place(box=(0, 0, size[1], size[0]), image_size=size, tiles=1, origin=origin), pixels
            return
        assert self.config.tile_shape is not None
        boxes = tile_boxes(*size, self.config.tile_shape, self.config.tile_overlap)
        for box in boxes:
            part = pixels if len(boxes) == 1 else _crop(pixels, box)
            yield _Place(box=box, image_size=size, tiles=len(boxes), origin=origin), part

    def _found(self, batch: Sequence[tuple[_Place, PreparedImage]]) -> Iterator[tuple[_Place, Detections]]:
        places, prepared = zip(*batch)
        for place, found in zip(places, self.run(prepared)):
            if found.masks is not None:  # one bit a pixel: there may be thousands before an image is done
                found = replace(found, masks=np.packbits(found.masks, axis=-1))
            yield place, found


@dataclass(frozen=True, eq=False)
class TiledPrediction:
    """What may be objects in the tiles of one image; thresholds can be applied to it later.

    Attributes:
        config: The detection settings where a call does not say otherwise.
        names: The model's labels and their class names.
        min_threshold: The lowest threshold that can be asked for.
    """

    config: DetectionConfig
    names: Mapping[int, str]
    min_threshold: float
    _pieces: Sequence[tuple[_Place, Detections]]
    _exif_orientation: bool

    def segments(self, threshold: float) -> PanopticSegmentation:
        """Raises a SettingError: segmentation looks at whole images."""
        self.config.check_whole(self._pieces[0][0].image_size, None)
        raise AssertionError("only images that are cut have a prediction of this kind")

    def detections(self, threshold: Threshold | None = None) -> Detections:
        """The objects of the image.

        Raises:
            SettingError: ``threshold`` is lower than what the model was run for.
        """
        config = self.config.with_options(threshold=threshold)
        if config.least_threshold < self.min_threshold:
            raise SettingError(
                f"threshold must be at least {self.min_threshold}, which the model was run for, not "
                f"{threshold}"
            )
        pieces = self._pieces
        first = pieces[0][0]
        counts = [len(found) for _, found in pieces]
        boxes = [found.boxes for _, found in pieces]
        views = None
        if len(pieces) > 1:
            tiles = np.array([place.box for place, _ in pieces], np.float32)
            boxes = [part + tile[[0, 1, 0, 1]] for part, tile in zip(boxes, tiles)]
            views = Views(np.repeat(tiles, counts, axis=0), first.image_size)
        scores = np.concatenate([found.scores for _, found in pieces])
        labels = np.concatenate([found.labels for _, found in pieces])
        all_boxes = np.concatenate(boxes)
        places, final = DetectionRule(config, self.names).select(scores, labels, all_boxes, views)
        names = [name for _, found in pieces for name in found.names]
        return Detections(
            boxes=all_boxes[places],
            scores=final,
            labels=labels[places],
            names=[names[place] for place in places],
            image_size=first.image_size,
            masks=_joined_masks(pieces, places),
            source=first.origin.source,
            frame_index=first.origin.index,
            timestamp=first.origin.timestamp,
            exif_orientation=self._exif_orientation,
        )


def _joined_masks(pieces: Sequence[tuple[_Place, Detections]], chosen: np.ndarray) -> np.ndarray | None:
    """The masks (n, height, width) of the chosen candidates in the frame of the image."""
    if any(found.masks is None for _, found in pieces):
        return None
    height, width = pieces[0][0].image_size
    try:
        masks = np.zeros((len(chosen), height, width), bool)
    except MemoryError as error:
        raise SettingError(
            f"masks of {len(chosen)} objects in an image of {width}x{height} pixels do not fit into "
            "memory; leave out masks, or raise the threshold"
        ) from error
    owners = np.repeat(np.arange(len(pieces)), [len(found) for _, found in pieces])
    firsts = np.cumsum([0, *(len(found) for _, found in pieces)])
    for mask, candidate in zip(masks, chosen):
        place, found = pieces[owners[candidate]]
        left, top, right, bottom = place.box
        assert found.masks is not None
        packed = found.masks[candidate - firsts[owners[candidate]]]
        mask[top:bottom, left:right] = np.unpackbits(packed, axis=-1, count=right - left)
    return masks


def _prepared(
    prepare: Callable[[Any], PreparedImage], piece: tuple[_Place, Pixels]
) -> tuple[_Place, PreparedImage]:
    return piece[0], prepare(piece[1])


def _size_of(pixels: Pixels) -> tuple[int, int]:
    if isinstance(pixels, PreparedImage):
        return pixels.frame.image_size
    if isinstance(pixels, np.ndarray):
        return pixels.shape[-2], pixels.shape[-1]
    return pixels.height, pixels.width


def _crop(pixels: Image | np.ndarray, box: Box) -> Image | np.ndarray:
    if isinstance(pixels, np.ndarray):
        return pixels[..., box[1] : box[3], box[0] : box[2]]
    return pixels.crop(box)
