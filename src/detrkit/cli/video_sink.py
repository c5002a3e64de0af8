"""Videos with what was found drawn over them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from detrkit.cli.output import check_save_dir
from detrkit.cli.sinks import Ending, Sink
from detrkit.common.limits import ImageLimits
from detrkit.common.outputs import video_output
from detrkit.inference.inputs import ImageInput
from detrkit.results.positions import frame_index, is_frame, named

if TYPE_CHECKING:
    from PIL.Image import Image

    from detrkit.inference.detector import Detector
    from detrkit.inference.video_writer import VideoWriter
    from detrkit.results.detections import Detections


class VideoDrawings(Sink["Detections"]):
    """A folder with a drawn video for each video.

    A video cannot be continued, so that a run that is resumed draws all its frames.
    """

    redraws = True

    def __init__(
        self, folder: Path, inputs: Sequence[ImageInput], names: Sequence[str], limits: ImageLimits
    ) -> None:
        check_save_dir(folder)
        self._folder, self._inputs, self._limits = folder, inputs, limits
        self._paths = {i: folder / names[i] for i, item in enumerate(inputs) if item.video}
        self.outputs = [video_output("--save-dir", path) for path in self._paths.values()]
        self._current: tuple[int, VideoWriter] | None = None

    def begin(self) -> Collection[int]:
        """Says nothing of frames, which are drawn whether they have results already or not."""
        return ()

    def accept(self, position: int, image: Image | None, result: Detections) -> None:
        """Adds a drawn frame to the video that it is of."""
        from detrkit.inference.video_writer import VideoWriter

        if not is_frame(position):
            return
        video, index = named(position), frame_index(position)
        assert index is not None
        if self._current is None or self._current[0] != video:
            self._finish_current(whole=True)
            source = self._inputs[video].source
            self._current = video, VideoWriter(self._paths[video], source, self._limits)
        self._current[1].write(result.draw(image), index, result.timestamp)

    def finish(self, detector: Detector, done: Sequence[int], ending: Ending) -> Sequence[str]:
        """Completes the video that is being written; one of an interrupted run ends where that did."""
        self._finish_current(whole=ending is not Ending.INTERRUPTED)
        return [f"drawn videos in {self._folder}"]

    def close(self) -> None:
        """Removes a video that is not complete."""
        if self._current is not None:
            self._current[1].discard()
            self._current = None

    def _finish_current(self, *, whole: bool) -> None:
        if self._current is not None:
            self._current[1].finish(whole=whole)
            self._current = None
