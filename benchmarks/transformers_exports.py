"""Transformers' models exported by its users' means, as a side of ``engines.py``.

    python benchmarks/transformers_exports.py MODEL FOLDER HEIGHT WIDTH BATCH

writes MODEL (a folder) to FOLDER as ``model.onnx`` for images of one size, which suits an optimiser best.
onnxruntime and OpenVINO both read it, set up as detrkit sets them up.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from detrkit.benchmark.sides import Settings, Side, around_transformers, load_transformers
from detrkit.engines.exported import runtime
from detrkit.models.outputs import SegmentationOutput

OUTPUTS = ("logits", "pred_boxes", "pred_masks")


def export(model_folder: str, folder: Path, height: int, width: int, batch: int) -> None:
    settings = Settings(
        maker="", model=model_folder, height=height, width=width, batch=batch, threads=1, threshold=0.0
    )
    model, _ = load_transformers(settings)

    class Tensors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = self.model(pixel_values=pixel_values)
            return tuple(found[name] for name in OUTPUTS if name in found)

    folder.mkdir(parents=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Tensors().eval(),
            (torch.randn(batch, 3, height, width),),
            input_names=["pixel_values"],
            opset_version=18,
            dynamo=True,
            verbose=False,
        )
    program.save(folder / "model.onnx")
    (folder / "model.txt").write_text(model_folder, encoding="utf-8")


def make(settings: Settings) -> Side:
    """The side: ``settings.model`` is a folder that ``export`` wrote."""
    import transformers

    from detrkit.checkpoints.loading import read_model_files

    folder = Path(settings.model)
    original = (folder / "model.txt").read_text(encoding="utf-8")
    family = read_model_files(original).family
    processor = getattr(transformers, family.processor).from_pretrained(original)
    run = runtime(settings.engine).load(folder / "model.onnx")

    def model(pixel_values: torch.Tensor, **_: object) -> SegmentationOutput:
        values = run({"pixel_values": pixel_values.numpy()})
        return SegmentationOutput(**{n: torch.from_numpy(value) for n, value in zip(OUTPUTS, values)})

    return around_transformers(model, processor, settings)


if __name__ == "__main__":
    export(sys.argv[1], Path(sys.argv[2]), *(int(number) for number in sys.argv[3:6]))
