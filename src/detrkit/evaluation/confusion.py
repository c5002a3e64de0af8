"""Which classes a detector takes for which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BACKGROUND = "(background)"


@dataclass(frozen=True, eq=False)
class ConfusionMatrix:
    """How many objects of each class were detected as which.

    Attributes:
        counts: (classes + 1, classes + 1) int64: rows are the true, columns the detected classes. The last
            column counts objects that were missed, the last row detections where there is no object.
        names: The classes, the background last.
        score_threshold: Only detections with a higher score count.
        iou_threshold: The least IoU of a detection with its object.
    """

    counts: np.ndarray
    names: tuple[str, ...]
    score_threshold: float
    iou_threshold: float

    def add(
        self, ious: np.ndarray, detected: Sequence[int], true: Sequence[int], crowds: Sequence[bool]
    ) -> None:
        """Counts one image.

        Each detection in turn takes the object that it overlaps most among those that are left, whatever the
        class of either. A detection that only fits a crowd is not counted.

        Args:
            ious: (detections, objects), the most confident detection first.
            detected: The class of each detection, as row and column of the matrix.
            true: The class of each object.
            crowds: Whether each object is a crowd.
        """
        crowd = np.array(crowds, dtype=bool)
        left = ~crowd
        for overlaps, label in zip(ious, detected):
            fits = overlaps >= self.iou_threshold
            if (fits & left).any():
                best = int(np.where(fits & left, overlaps, -1).argmax())
                self.counts[true[best], label] += 1
                left[best] = False
            elif not (fits & crowd).any():
                self.counts[-1, label] += 1
        for place in np.flatnonzero(left).tolist():
            self.counts[true[place], -1] += 1
