"""The dictionaries that packages exchange: training targets, segments, and the entries of COCO documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

if TYPE_CHECKING:
    from torch import Tensor


JsonObject: TypeAlias = Mapping[str, Any]
"""The content of a JSON file whose entries nobody has checked, such as a configuration."""


class Target(TypedDict, total=False):
    """The objects of one image, as training and the losses take them.

    Boxes are xyxy in pixels, for a model cxcywh and normalised to the image without padding.
    """

    class_labels: Tensor  # int64 (n,)
    boxes: Tensor  # float32 (n, 4)
    masks: Tensor  # bool (n, height, width), for a model padded as its image is
    image_id: Tensor  # int64 (1,), by which errors name the image
    area: Tensor  # float32 (n,) in pixels of the resized image
    iscrowd: Tensor  # int64 (n,)
    orig_size: Tensor  # int64 (2,), height and width of the image as it was read
    size: Tensor  # int64 (2,), height and width after resizing, without padding
    keypoints: Tensor  # float32 (m, 3)


class Segment(TypedDict, total=False):
    """An entry of a panoptic ``segments_info``."""

    id: int  # value of its pixels in the map of segments
    category_id: int  # a category id in a COCO file, a label in a model's result
    isthing: int  # 1 or True for a thing, 0 or False for stuff
    area: int  # number of pixels
    score: float  # in [0, 1], of a predicted segment
    iscrowd: int  # 1 for a group of objects, of a true segment
    bbox: list[int]  # x and y of the top left corner, width and height in pixels


class RunLengths(TypedDict):
    """A mask as COCO's run lengths."""

    size: list[int]  # height and width
    counts: list[int] | str  # the runs as a list or a compressed string


class Image(TypedDict, total=False):
    """An entry of ``images``."""

    id: int
    file_name: str
    height: int
    width: int
    video_id: int  # of a frame: an entry of ``videos``
    frame_index: int  # of a frame, from 0
    timestamp: float | None  # of a frame, in seconds from the start


class Category(TypedDict, total=False):
    """An entry of ``categories``."""

    id: int
    name: str
    supercategory: str
    isthing: int


class Annotation(TypedDict, total=False):
    """An entry of ``annotations``: an object, or with ``segments_info`` the segments of an image."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]  # x and y of the top left corner, width and height in pixels
    area: float  # in pixels
    iscrowd: int
    segmentation: list[list[float]] | RunLengths  # polygons of x, y, x, y, ..., or run lengths
    keypoints: list[float]
    score: float  # in [0, 1], of a detection
    track_id: int  # the same for an object in all frames that it was followed through
    file_name: str  # the PNG file of a panoptic annotation
    segments_info: list[Segment]


class Document(TypedDict, total=False):
    """A COCO document; what its entries hold has been checked no further than the reader says."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]
