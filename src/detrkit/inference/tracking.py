"""Following objects from frame to frame.

Example:
    ```python
    from detrkit import Detector
    from detrkit.inference.tracking import Tracker
    from detrkit.inference.video import read_video

    detector, tracker = Detector.from_pretrained("blood-cells"), Tracker()
    for found in detector.stream(read_video("clip.mp4")):
        tracker.update(found)
        print(found.frame_index, found.track_ids)
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from detrkit.common.errors import MissingExtraError

if TYPE_CHECKING:
    from trackers import ByteTrackTracker

    from detrkit.results.detections import Detections


class Tracker:
    """Follows objects through a video with ByteTrack (Zhang et al., 2022) and numbers them.

    A box that overlaps an object's box in the previous frame is the same object; classes are not compared.
    Every detection is followed, because its score is above the detector's threshold.

    Args:
        patience: Frames for which an object may be missing and still keep its number.

    Raises:
        MissingExtraError: The trackers package is not installed.
    """

    def __init__(self, patience: int = 30) -> None:
        self._tracker: ByteTrackTracker = import_tracker()(
            lost_track_buffer=patience,
            # Buffers are given for 30 frames a second; time is counted in frames here.
            frame_rate=30,
            # Both scores that tell good detections from others are left to the detector's threshold.
            track_activation_threshold=0.0,
            high_conf_det_threshold=0.0,
        )
        self._begun = False

    def update(self, detections: Detections) -> Detections:
        """Sets the ``track_ids`` of the detections in the next frame.

        Numbers begin with 1. Objects of the first frame that has any get theirs at once, later ones when they
        are seen a second time; until then they have -1.

        Args:
            detections: What was found in the frame; changed in place.

        Returns:
            The same detections.
        """
        import supervision

        boxes = supervision.Detections(
            xyxy=detections.boxes.copy(),
            confidence=detections.scores.copy(),
            data={"place": np.arange(len(detections))},
        )
        if not self._begun and len(boxes):
            # As in the original, the objects of the first frame need not be seen twice.
            self._tracker.update(boxes)
            self._begun = True
        found = self._tracker.update(boxes)
        ids = np.full(len(detections), -1, dtype=np.int64)
        if len(found):
            tracks = np.asarray(found.tracker_id, dtype=np.int64)
            ids[found.data["place"]] = np.where(tracks < 0, -1, tracks + 1)
        detections.track_ids = ids
        return detections


def import_tracker() -> type[ByteTrackTracker]:
    """The tracker's class; raises a MissingExtraError if its package is not installed."""
    try:
        from trackers import ByteTrackTracker
    except ImportError as error:
        raise MissingExtraError("following objects through a video", "track") from error
    return ByteTrackTracker
