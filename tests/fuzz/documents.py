"""What detrkit reads again of what it wrote: journals, finished documents and detection settings."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np

from detrkit.results.coco_document import CocoOutput
from detrkit.results.detection_config import DetectionConfig, DetectionRule
from detrkit.results.detections import Detections
from detrkit.results.journal import _line
from tests.fuzz.base import Choices, branching_seeds, edited, folder, json_text

_NAMES = {0: "N/A", 1: "cell", 2: "plate"}
_FILES = ("a.png", "b.png", "c.mp4")
_INFO: dict[str, Any] = {"version": "1", "model": "cells", "weights": "sha256:0", "threshold": 0.5}


def _output() -> CocoOutput:
    file = folder() / "out.json"
    return CocoOutput(file, [1, 2, 3], _FILES, _INFO, fingerprint=lambda i: f"sha256:{i}", videos={2: 1})


@cache
def _written() -> tuple[list[Any], dict[str, Any]]:
    """The settings and entries of a journal, and the document of the same run."""
    output = _output()
    output.start()
    for position in (0, 1):
        output.add(
            position,
            Detections(
                boxes=np.array([[1, 2, 5, 6], [0, 0, 9, 9]], np.float32),
                scores=np.array([0.9, 0.6], np.float32),
                labels=np.array([1, 2]),
                names=["cell", "plate"],
                image_size=(9, 12),
            ),
        )
    journal = folder() / "out.json.unfinished.jsonl"
    lines = [json.loads(line)["entry"] for line in journal.read_bytes().splitlines()]
    document = output.document(_NAMES)
    output.close()
    return lines, document


def journal(data: bytes) -> None:
    """A journal with changed bytes, or whose entries are changed and bear the right check."""
    entries, _ = _written()
    choices = Choices(data)
    what = choices.number(3)
    rest = data[choices.place :]
    lines = [_line(entry) for entry in entries]
    if what == 0:
        content = b"".join(lines[:1]) + rest
    elif what == 1:
        text = bytearray(b"".join(lines))
        place = Choices(rest).number(len(text))
        text[place : place + len(rest) % 7] = rest[2:]
        content = bytes(text)
    else:
        changed = edited(entries, Choices(rest))
        listed = changed if isinstance(changed, list) else [changed]
        content = b"".join(_line(entry) for entry in listed)
    (folder() / "out.json").unlink(missing_ok=True)
    (folder() / "out.json.unfinished.jsonl").write_bytes(content)
    _continue()


def document(data: bytes) -> None:
    """The finished document of a run that is to be resumed."""
    _, whole = _written()
    (folder() / "out.json.unfinished.jsonl").unlink(missing_ok=True)
    (folder() / "out.json").write_bytes(json_text(whole, data))
    _output().is_complete()
    _continue()


def _continue() -> None:
    output = _output()
    try:
        output.resume()
        for position in output.done:
            output.detections(position, _NAMES)
        written = output.document(_NAMES)
        assert len(written["images"]) == len(output.done)  # type: ignore[arg-type]
    finally:
        if output.journal is not None:
            output.journal.remove()


_SETTINGS: dict[str, Any] = {
    **{"threshold": {"cell": 0.4}, "overlap": 0.8, "class_agnostic": False, "max_objects": 3},
    "calibration": {"cell": [[0.0, 0.0], [0.5, 0.7], [1.0, 1.0]]},
    **{"tile_size": [64, 48], "tile_overlap": 0.2, "chosen": {"images": 3}},
}


def settings(data: bytes) -> None:
    """The detection settings of a model, and what they choose of an image's boxes."""
    (folder() / "detection_config.json").write_bytes(json_text(_SETTINGS, data))
    config = DetectionConfig.from_pretrained(folder())
    rule = DetectionRule(config, _NAMES)
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3], [5, 5, 9, 9]], np.float32)
    places, scores = rule.select(np.array([0.9, 0.6, 0.45], np.float32), np.array([1, 1, 2]), boxes)
    assert len(places) == len(scores) <= 3
    assert 0 <= rule.least_score <= 1
    json.dumps(config.decisions())
    config.describe()


def document_seeds() -> list[bytes]:
    return [b"\0{}", b"\0[]", b'\0{"info": {}}', *branching_seeds(4)]
