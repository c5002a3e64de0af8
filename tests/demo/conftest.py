"""A detector that tells which image it was given, and pictures that can be told apart."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import DetectionConfig, Detections


@dataclass
class NumberReader:
    """Finds one object, of the class that is painted all over the picture; notes the order of pictures."""

    names: dict[int, str] = field(
        default_factory=lambda: {number: f"number {number}" for number in range(99)}
    )
    has_masks: bool = False
    detection_config: DetectionConfig = field(default_factory=DetectionConfig)
    seen: list[int] = field(default_factory=list)
    entered: threading.Event = field(default_factory=threading.Event)
    gate: threading.Event = field(default_factory=threading.Event)

    def predict(self, image: Image.Image, min_threshold: float) -> NumberPrediction:
        self.entered.set()
        self.gate.wait(120)
        number = image.getpixel((5, 5))[0] // 2
        self.seen.append(number)
        return NumberPrediction(number, image.size, min_threshold)


@dataclass
class NumberPrediction:
    number: int
    size: tuple[int, int]
    min_threshold: float

    def detections(self, threshold: float | None) -> Detections:
        threshold = 0.5 if threshold is None else threshold
        found = Detections(
            boxes=np.array([[self.number, 1, self.number + 10, 9]], dtype=np.float32),
            scores=np.array([0.75], dtype=np.float32),
            labels=np.array([self.number]),
            names=[f"number {self.number}"],
            image_size=self.size[::-1],
        )
        return found[found.scores > threshold]


def number_picture(folder: Path, number: int) -> Path:
    """A picture that stands for a number."""
    path = folder / f"picture-{number}.png"
    Image.new("RGB", (40 + number, 30), (2 * number, 0, 0)).save(path)
    return path


@pytest.fixture
def number_reader() -> NumberReader:
    return NumberReader()
