"""A batch of prepared images through a model: its outputs in float32, where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from detrkit.engines.interface import RunnableModel, has_masks
from detrkit.engines.placement import is_cuda
from detrkit.inference.predictions import OutputReader, Prediction, no_masks
from detrkit.inference.prepared import PreparedImage, to_arrays, to_device

if TYPE_CHECKING:
    import torch

    from detrkit.engines.allocator import Excess
    from detrkit.processing.image_processor import DetrImageProcessorBase

# Images of one processed size, and what is called with their pixels.
Batch: TypeAlias = Sequence[PreparedImage]
Callee: TypeAlias = Callable[..., Any]

# What a prediction keeps of the outputs.
_RESULT_FIELDS = ("logits", "pred_boxes", "pred_masks")


@dataclass(frozen=True)
class ModelRunner:
    """Runs a model on batches: an exported one as it is on arrays, any other by :class:`TorchRunner`.

    Attributes:
        model: The model.
        excess: Gives memory back that a CPU's allocator holds too much of.
    """

    model: RunnableModel
    excess: Excess | None

    @property
    def without_masks(self) -> Callee:
        """The model, without the mask head that it may have."""
        return self.model.detector if has_masks(self.model) else self.model

    @property
    def by_layer(self) -> Callee:
        """What gives logits and boxes of each decoder layer, of a model that runs on the engine "torch"."""
        model: Any = self.without_masks
        return model.predict_layers

    def masks_above(self, threshold: float) -> Callee:
        """The model, with masks of the queries above a threshold."""
        if not has_masks(self.model):
            raise no_masks()
        return partial(self.model.segment, threshold=threshold)

    def outputs(self, batch: Batch, callee: Callee) -> Any:
        """What one of these two gives for images of one processed size, by name."""
        outputs = self._run(batch, callee)
        if self.excess is not None:
            self.excess.check((len(batch), batch[0].frame.padded_size))
        return outputs

    def _run(self, batch: Batch, callee: Callee) -> Any:
        return callee(**to_arrays(batch))

    def predictions(
        self, batch: Batch, reader: OutputReader, min_threshold: float, *, masks: bool, attentions: bool
    ) -> Iterator[Prediction]:
        """The predictions of images of one processed size; see :meth:`detrkit.Detector.predict`."""
        for item in batch:
            reader.config.check_whole(item.frame.image_size, item.frame.source)
        callee = self.without_masks
        if attentions:
            callee = partial(callee, output_attentions=True, return_dict=True)
        elif masks:
            # Thresholds act on calibrated scores; those of segments do not.
            rule = reader.rule(reader.config.with_options(threshold=min_threshold))
            callee = self.masks_above(min(rule.least_score, min_threshold))
        outputs = self.outputs(batch, callee)
        if not attentions:  # predictions may be kept in numbers: without the model's features
            outputs = {name: outputs[name] for name in _RESULT_FIELDS if outputs.get(name) is not None}
        for row, item in enumerate(batch):
            own = outputs if len(batch) == 1 else {name: v[row : row + 1] for name, v in outputs.items()}
            yield Prediction(own, item.frame, min_threshold, reader)


@dataclass(frozen=True)
class TorchRunner(ModelRunner):
    """Runs a model of PyTorch.

    Attributes:
        processor: The model's image processor.
        device: Where the model runs.
        dtype: Type of the pixels that it takes.
    """

    processor: DetrImageProcessorBase
    device: torch.device
    dtype: torch.dtype

    def _run(self, batch: Batch, callee: Callee) -> Any:
        import torch

        scaling = self.processor.pixel_scaling if is_cuda(self.device) else None
        inputs = to_device(batch, self.device, self.dtype, scaling)
        with torch.inference_mode():
            outputs = callee(**inputs)
        # Half precision would round box corners to whole pixels and more. A GPU that is asked for each of
        # these few numbers takes longer than a CPU that has them all; masks stay where they are.
        place = outputs["logits"].device if outputs.get("pred_masks") is not None else "cpu"
        for name in ("logits", "pred_boxes"):
            outputs[name] = outputs[name].float().to(place)
        return outputs
