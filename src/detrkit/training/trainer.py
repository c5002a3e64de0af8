"""The Transformers ``Trainer``, adapted to detectors."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerControl

from detrkit.common.errors import DetrkitError, TrainingError
from detrkit.common.files import atomic_file
from detrkit.data.loading import AspectRatioBatchSampler, Batch
from detrkit.models.detection import ModelWithHeads
from detrkit.models.outputs import ObjectDetectionOutput
from detrkit.training.optimization import AveragedWeights, learning_rate_factor, parameter_groups

AVERAGE_FILE = "averaged_weights.pt"
STATE_FILE = "trainer_state.json"

_LITTLE_SPACE = 2**20  # bytes
_MULTIPLE = 32  # pixels; the stride of a backbone's last feature map


class DetectionTrainer(Trainer):
    """Trains a detector on prepared examples and evaluates the average of its weights.

    Args:
        recipe_rates: Learning rate, and learning rate of the backbone.
        schedule: As for :func:`~detrkit.training.optimization.learning_rate_factor`.
        warmup: Fraction of the run in which the learning rate rises.
        ema_decay: Decay of the average of the weights, ``averaged``; 0 disables averaging (None).
        multi_scale: Maximum relative change of a batch's size.
        sampler: The order of the batches of this process.
        measure: Evaluates a model; returns metrics by name.
        **options: Options of the ``Trainer``; ``train_dataset`` is a
            :class:`~detrkit.data.loading.PreparedDataset`.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None
    control: TrainerControl

    def __init__(
        self,
        *,
        recipe_rates: tuple[float, float],
        schedule: str,
        warmup: float,
        ema_decay: float,
        multi_scale: float,
        sampler: AspectRatioBatchSampler,
        measure: Callable[[ModelWithHeads], dict[str, float]],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.recipe_rates, self.schedule, self.warmup = recipe_rates, schedule, warmup
        self.multi_scale, self.sampler, self.measure = multi_scale, sampler, measure
        self.averaged = AveragedWeights(self.model, ema_decay) if ema_decay else None
        self._term_sums: dict[str, torch.Tensor] = {}
        self._batches = 0
        self._saved_step: int | None = None

    @property
    def best_weights(self) -> ModelWithHeads:
        """The model that is evaluated and saved: with averaged weights, if they are averaged."""
        return self.model if self.averaged is None else self.averaged.module

    def get_train_dataloader(self) -> DataLoader:
        """Batches in the order of the sampler, which distributes them among the processes."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.args.device.type == "cuda",
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the groups of :func:`parameter_groups`."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, *self.recipe_rates)
            self.optimizer = torch.optim.AdamW(groups, weight_decay=self.args.weight_decay, fused=True)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's schedule, the same for all groups."""
        if self.lr_scheduler is None:
            factor = learning_rate_factor(
                self.schedule, num_training_steps, round(self.warmup * num_training_steps)
            )
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ObjectDetectionOutput]:
        """The model's loss; keeps its terms for the log.

        Raises:
            TrainingError: The loss is not finite.
        """
        if self.multi_scale:
            inputs = self._rescaled(inputs)
        try:
            outputs = model(**inputs)
        except FloatingPointError as error:
            raise TrainingError(
                f"step {self.state.global_step + 1}: matching costs are {error}; try a lower learning rate"
            ) from error
        terms = {name: value.detach() for name, value in outputs.loss_dict.items()}
        if not torch.isfinite(outputs.loss):
            bad = [name for name, value in terms.items() if not torch.isfinite(value)]
            images = ", ".join(str(int(label["image_id"])) for label in inputs["labels"])
            raise TrainingError(
                f"step {self.state.global_step + 1}, images {images}: not finite: "
                f"{', '.join(bad) or 'the sum of the losses'}; try a lower learning rate, or fp32"
            )
        for name, value in terms.items():
            if not name[-1].isdigit():  # not the losses of the earlier decoder layers
                self._term_sums[name] = self._term_sums.get(name, 0) + value
        self._batches += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss terms since the last call to a row with the loss."""
        if "loss" in logs and self._batches:
            means = torch.stack([value.float() for value in self._term_sums.values()]) / self._batches
            means = self.accelerator.reduce(means, reduction="mean")
            logs |= dict(zip(self._term_sums, means.tolist()))
            self._term_sums, self._batches = {}, 0
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluates the averaged weights in the main process, and sends the metrics to the others.

        The checkpoint is written first, so that an evaluation that fails does not lose the epoch.
        """
        if self.control.should_save:
            self._save_checkpoint(self.model, None)
        found = [self.measure(self.best_weights) if self.is_world_process_zero() else {}]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found[0].items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluate_missed(self) -> None:
        """Evaluates the weights of the checkpoint that training goes on from, and completes it."""
        self._saved_step = self.state.global_step
        self.evaluate()
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Also saves the averaged weights; removes a checkpoint that cannot be written completely.

        The Trainer writes the state last, so a checkpoint with a state is complete. Older checkpoints are
        removed after that. A checkpoint that was written before its evaluation only gets the new state.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_step == self.state.global_step:
            if self.args.should_save:
                with atomic_file(folder / STATE_FILE) as temporary:
                    self.state.save_to_json(str(temporary))
            return
        try:
            if self.averaged is not None and self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.averaged.state_dict(), folder / AVERAGE_FILE)
            super()._save_checkpoint(model, trial)
            self._saved_step = self.state.global_step
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_whole(folder):
                raise
            # torch does not say why it could not write.
            full = isinstance(error, RuntimeError) and shutil.disk_usage(folder.parent).free < _LITTLE_SPACE
            shutil.rmtree(folder, ignore_errors=True)
            reason = os.strerror(errno.ENOSPC) if full else error
            raise DetrkitError(
                f"cannot write the checkpoint {folder} ({reason}); make room on the disk, then resume from "
                "the last checkpoint"
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # before the state marks the checkpoint as complete

    def _rescaled(self, inputs: Batch) -> Batch:
        """The batch in a different size, which depends only on seed and step."""
        draw = np.random.default_rng((self.args.seed, self.state.global_step)).uniform(-1, 1)
        pixels = inputs["pixel_values"]
        size = [
            max(1, round(side * (1 + draw * self.multi_scale) / _MULTIPLE)) * _MULTIPLE
            for side in pixels.shape[-2:]
        ]
        resized = inputs.copy()
        resized["pixel_values"] = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        if "pixel_mask" in inputs:
            mask = inputs["pixel_mask"]
            resized["pixel_mask"] = F.interpolate(mask[None].float(), size=size)[0].to(mask.dtype)
        return resized


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written completely."""
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in a folder; removes incomplete ones of a killed run."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        if not re.fullmatch("checkpoint-[0-9]{1,18}", path.name):
            continue  # not the Trainer's
        if not is_whole(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            found[int(path.name.rpartition("-")[2])] = path
    return found[max(found)] if found else None
