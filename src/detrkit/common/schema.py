"""The dictionaries that packages exchange: training targets, segments, and the entries of COCO documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


JsonObject: TypeAlias = Mapping[str, Any]
"""The content of a JSON file whose entries nobody has checked, such as a configuration."""


class _Objects(TypedDict):
    class_labels: Tensor
    boxes: Tensor


class Target(_Objects, total=False):
    """The objects of one image, as training and the losses take them.

    Attributes:
        class_labels: int64 (n,).
        boxes: float32 (n, 4): xyxy in pixels, for a model cxcywh and normalised to the image without padding.
        masks: bool (n, height, width), for a model padded as its image is.
        image_id: int64 (1,), by which errors name the image.
        area: float32 (n,) in pixels of the resized image.
        iscrowd: int64 (n,).
        orig_size: int64 (2,), height and width of the image as it was read.
        size: int64 (2,), height and width after resizing, without padding.
        keypoints: float32 (m, 3).
    """

    masks: Tensor
    image_id: Tensor
    area: Tensor
    iscrowd: Tensor
    orig_size: Tensor
    size: Tensor
    keypoints: Tensor


class _Segment(TypedDict):
    id: int
    category_id: int


class Segment(_Segment, total=False):
    """An entry of a panoptic ``segments_info``.

    Attributes:
        id: Value of its pixels in the map of segments.
        category_id: A category id in a COCO file, a label in a model's result.
        isthing: 1 or True for a thing, 0 or False for stuff.
        area: Number of pixels.
        score: Confidence in [0, 1], of a predicted segment.
        iscrowd: 1 for a group of objects, of a true segment.
        bbox: x and y of the top left corner, width and height in pixels.
    """

    isthing: int
    area: int
    score: float
    iscrowd: int
    bbox: list[int]


class RunLengths(TypedDict):
    """A mask as COCO's run lengths: its height and width, and the runs as a list or a compressed string."""

    size: list[int]
    counts: list[int] | str


class Image(TypedDict, total=False):
    """An entry of ``images``."""

    id: int
    file_name: str
    height: int
    width: int


class Category(TypedDict, total=False):
    """An entry of ``categories``."""

    id: int
    name: str
    supercategory: str
    isthing: int


class Annotation(TypedDict, total=False):
    """An entry of ``annotations``: an object, or with ``segments_info`` the segments of an image.

    Attributes:
        bbox: x and y of the top left corner, width and height in pixels.
        area: In pixels.
        segmentation: Polygons of x, y, x, y, ..., or run lengths.
        score: Confidence in [0, 1], of a detection.
        file_name: The PNG file of a panoptic annotation.
    """

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: list[list[float]] | RunLengths
    keypoints: list[float]
    score: float
    file_name: str
    segments_info: list[Segment]


class Document(TypedDict, total=False):
    """A COCO document; what its entries hold has been checked no further than the reader says."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]
