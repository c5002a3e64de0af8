"""What one process of a comparison runs: a model by detrkit or by Transformers, forward and end to end.

``python -m detrkit.benchmark.sides SETTINGS`` loads a model, makes one timed run for each line on stdin that
says ``forward`` or ``end to end``, and answers with a line of JSON; to ``memory`` with the most it has held.

*Forward* is the model alone, on normalised images without padding. *End to end* is from 640x480 images to
boxes in pixels, for models with masks to maps of segments.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from detrkit.benchmark import machine

STAGES = ("forward", "end to end")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a process is to run.

    Attributes:
        maker: ``module:function`` that makes the side, called with these settings.
        model: Hub id or folder; for an exported engine a folder that was exported for it.
        engine: What runs the model.
        height: Height of the images as the model sees them, in pixels.
        width: Their width.
        batch: Images at once.
        threads: Of PyTorch and the other runtimes.
        threshold: Least score of a result.
        device: Where the model runs.
        dtype: Type of its weights.
        cpu_time: Count the processor's seconds, all threads together, not those that pass.
    """

    maker: str
    model: str
    engine: str = "torch"
    height: int
    width: int
    batch: int
    threads: int
    threshold: float
    device: str = "cpu"
    dtype: str = "float32"
    cpu_time: bool = False

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The images of a batch: noise, whose work is that of any image."""
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        return [PIL.Image.fromarray(noise)] * self.batch

    @property
    def size(self) -> dict[str, int]:
        """For an image processor."""
        return {"height": self.height, "width": self.width}


@dataclass(frozen=True)
class Side:
    """One side of a comparison. Both runs give a number that shows that two sides computed the same.

    Attributes:
        forward: Runs the model; gives the sum of its logits' absolute values.
        end_to_end: From images to results; gives the sum of scores, or the number of segments.
    """

    forward: Callable[[], float]
    end_to_end: Callable[[], float]


def detrkit_side(settings: Settings) -> Side:
    """A :class:`~detrkit.inference.detector.Detector`."""
    from detrkit.inference.detector import Detector
    from detrkit.results.detection_config import DetectionConfig

    detector = Detector.from_pretrained(
        settings.model, engine=settings.engine, device=settings.device, dtype=settings.dtype
    )
    detector.processor.size = settings.size
    detector = detector.with_config(DetectionConfig())  # the other side has no overlap filter
    images = settings.images
    pixels = _pixels(settings)

    def end_to_end() -> float:
        if detector.has_masks:
            return float(sum(map(len, detector.segment(images, settings.threshold, settings.batch))))
        results = detector(images, settings.threshold, settings.batch)
        return float(sum(found.scores.sum() for found in results))

    return Side(lambda: _run(detector.model, pixels), end_to_end)


def transformers_side(settings: Settings) -> Side:
    """The model of the same name in Transformers, eager (``torch``) or by ``torch.compile``."""
    model, processor = load_transformers(settings)
    if settings.engine == "compile":
        model = torch.compile(model)
    return around_transformers(model, processor, settings)


def load_transformers(settings: Settings) -> tuple[Any, Any]:
    """A model of Transformers and its image processor."""
    import transformers

    from detrkit.checkpoints.loading import read_model_files

    files = read_model_files(settings.model)
    model = getattr(transformers, files.model_class).from_pretrained(settings.model)
    model = model.eval().to(settings.device, getattr(torch, settings.dtype))
    return model, getattr(transformers, files.family.processor).from_pretrained(settings.model)


def around_transformers(model: Callable[..., Any], processor: Any, settings: Settings) -> Side:
    """The side of a model that is called as those of Transformers, with one of its image processors."""
    images = settings.images
    pixels = _pixels(settings)

    def end_to_end() -> float:
        inputs = processor(images=images, size=settings.size, return_tensors="pt").to(settings.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(pixels.dtype)
        with torch.inference_mode():
            outputs = model(**inputs)
        sizes = [image.size[::-1] for image in images]
        if "pred_masks" in outputs:
            maps = processor.post_process_panoptic_segmentation(
                outputs, settings.threshold, target_sizes=sizes
            )
            return float(sum(len(found["segments_info"]) for found in maps))
        found = processor.post_process_object_detection(outputs, settings.threshold, sizes)
        return float(sum(result["scores"].sum() for result in found))

    return Side(lambda: _run(model, pixels), end_to_end)


def _pixels(settings: Settings) -> torch.Tensor:
    """Noise, the same for all sides: their processors resize images a little differently."""
    shape = (settings.batch, 3, settings.height, settings.width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return pixels.to(settings.device, getattr(torch, settings.dtype))


def _run(model: Callable[..., Any], pixels: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(model(pixel_values=pixels)["logits"].abs().sum())


def serve(settings: Settings) -> None:
    """Makes a side and answers the lines on stdin."""
    with contextlib.suppress(OSError):
        # Where memory runs out it is this process that goes, not the one that writes down the results.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    torch.set_num_threads(settings.threads)
    module, _, function = settings.maker.partition(":")
    side: Side = getattr(importlib.import_module(module), function)(settings)
    runs = {"forward": side.forward, "end to end": side.end_to_end}
    clock = time.process_time if settings.cpu_time else time.perf_counter
    for line in sys.stdin:
        what = line.strip()
        answer: dict[str, float]
        if what == "memory":
            answer = {"megabytes": machine.peak_memory(settings.device)}
        else:
            begin = clock()
            checksum = runs[what]()
            answer = {"seconds": clock() - begin, "checksum": checksum}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    from detrkit.common.terminal import quiet_libraries

    quiet_libraries()
    serve(Settings(**json.loads(sys.argv[1])))
