"""A panoptic segmentation: every pixel of one image belongs to a segment, or to none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from detrkit.common.schema import Annotation, Segment
from detrkit.results.detections import image_of, summary
from detrkit.results.shapes import find_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.processing.images import ImageSource


@dataclass(eq=False, repr=False)
class PanopticSegmentation:
    """The segments of one image, things (one for each object) and stuff (one for each class).

    Attributes:
        ids: (height, width) int32, the id of the segment that each pixel of the original image belongs to;
            0 for a pixel of no segment.
        segments: For each segment ``id``, ``category_id`` (the model's class), ``isthing``, ``area`` in
            pixels and ``score`` in [0, 1].
        names: The class name of each segment.
        image_size: Height and width of the original image in pixels.
        source: File name or address of the image, where it came from one.
        exif_orientation: Whether the segments refer to the image turned as its EXIF entry says.
    """

    ids: np.ndarray
    segments: list[Segment]
    names: list[str]
    image_size: tuple[int, int]
    source: str | None = None
    exif_orientation: bool = False

    def __len__(self) -> int:
        return len(self.segments)

    def __repr__(self) -> str:
        return summary(self)

    def mask(self, index: int) -> np.ndarray:
        """The pixels of a segment.

        Args:
            index: Its position in ``segments``.

        Returns:
            (height, width) bool.
        """
        return self.ids == self.segments[index]["id"]

    def to_png(self) -> Image:
        """The ids as a COCO panoptic image: red + 256 green + 65536 blue is the id of a pixel's segment."""
        from PIL import Image

        from detrkit.processing.panoptic_png import id_to_rgb

        return Image.fromarray(id_to_rgb(self.ids))

    def to_coco(self, image_id: int = 0, file_name: str | None = None) -> Annotation:
        """The segmentation as an entry of a COCO panoptic document's ``annotations``.

        Args:
            image_id: Id of the image.
            file_name: Name of the PNG file that ``to_png`` is saved under; ``<image_id>.png`` when None.

        Returns:
            ``image_id``, ``file_name`` and ``segments_info``: for each segment ``id``, ``category_id``,
            ``isthing``, ``iscrowd`` (0), ``area``, ``bbox`` (x, y of the top left corner, width, height, in
            pixels) and ``score``.
        """
        boxes = _bounding_boxes(self.ids)
        return {
            "image_id": image_id,
            "file_name": file_name or f"{image_id}.png",
            "segments_info": [
                {
                    "id": int(segment["id"]),
                    "category_id": int(segment["category_id"]),
                    "isthing": int(segment["isthing"]),
                    "iscrowd": 0,
                    "area": int(segment["area"]),
                    "bbox": boxes[int(segment["id"])],
                    "score": float(str(np.float32(segment["score"]))),
                }
                for segment in self.segments
            ],
        }

    def draw(self, image: ImageSource | None = None) -> Image:
        """Draws the segments over an image, with their names.

        Args:
            image: The image that was given to the detector (path, address, PIL image, array or tensor).
                When left out, the file or address that the segmentation came from is read again.

        Returns:
            A new RGB image of the same size.

        Raises:
            ImageError: The image cannot be read, or does not have the size that the segments refer to.
        """
        from detrkit.results.drawing import draw_segments, segment_colors

        background = image_of(self, image, "segments")
        colors = segment_colors([int(s["category_id"]) for s in self.segments])
        return draw_segments(background, self.ids, [int(s["id"]) for s in self.segments], self.names, colors)


def _bounding_boxes(ids: np.ndarray) -> dict[int, list[int]]:
    """Id -> x, y, width and height in pixels of the smallest box around its segment."""
    found, compact = np.unique(ids, return_inverse=True)
    boxes = find_boxes(compact.reshape(ids.shape) + 1, len(found))
    return {
        number: [box[1].start, box[0].start, box[1].stop - box[1].start, box[0].stop - box[0].start]
        for number, box in zip(found.tolist(), boxes)
        if box is not None
    }
