"""Callbacks of a training run: when to log, evaluate and save, the best model, the messages."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from detrkit.common.terminal import say
from detrkit.common.text import percent
from detrkit.data.loading import AspectRatioBatchSampler
from detrkit.training.history import best_row, evaluations, has_stalled, merge_log

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


_LINE_SECONDS = 60.0


class RunPlan(TrainerCallback):
    """Sets the epoch of the sampler, and decides when to log, evaluate, save and stop.

    Every checkpoint follows a row of the log, so that the rows of a resumed run are means over the same steps
    as those of an uninterrupted run.

    Args:
        sampler: The order of the batches.
        eval_every: Number of epochs between evaluations.
        save_every: Number of steps between additional checkpoints; None for one after each epoch only.
        metric: The metric that determines the best model.
        patience: Number of evaluations without improvement after which to stop; None for never.
    """

    def __init__(
        self,
        sampler: AspectRatioBatchSampler,
        *,
        eval_every: int,
        save_every: int | None,
        metric: str,
        patience: int | None,
    ) -> None:
        self.sampler, self.eval_every, self.save_every = sampler, eval_every, save_every
        self.metric, self.patience = metric, patience

    def on_epoch_begin(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Sets the epoch of the sampler."""
        self.sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Saves every ``save_every`` steps, except at the end of an epoch."""
        ends_epoch = float(state.epoch or 0).is_integer()
        control.should_save = bool(
            self.save_every and state.global_step % self.save_every == 0 and not ends_epoch
        )
        control.should_log = control.should_log or control.should_save

    def on_epoch_end(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Logs, evaluates and saves."""
        epoch = round(state.epoch or 0)
        control.should_log = control.should_save = True
        control.should_evaluate = epoch % self.eval_every == 0 or epoch == args.num_train_epochs

    def on_evaluate(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Stops a run that no longer improves."""
        if has_stalled(merge_log(state.log_history), self.metric, self.patience):
            control.should_training_stop = True


class MissedEvaluation(TrainerCallback):
    """Evaluates before a resumed run goes on, if it was ended between a checkpoint and its evaluation."""

    def __init__(self, evaluate: Callable[[], None], eval_every: int, metric: str) -> None:
        self.evaluate, self.eval_every, self.metric = evaluate, eval_every, metric

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Evaluates if the last epoch was not."""
        epoch = float(state.epoch or 0)
        due = epoch % self.eval_every == 0 or epoch == args.num_train_epochs
        rows = merge_log(state.log_history)
        if rows and epoch.is_integer() and due and self.metric not in rows[-1]:
            self.evaluate()


class WeightAverage(TrainerCallback):
    """Updates the averaged weights after each step, by a call without arguments."""

    def __init__(self, update: Callable[[], None]) -> None:
        self.update = update

    def on_optimizer_step(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Updates the average."""
        self.update()


class Reporter(TrainerCallback):
    """Writes the reports of a run while it is in progress.

    Both functions get the rows of the log: ``save_best`` after each evaluation with a new best ``metric``, to
    write the model; ``write_reports`` with each checkpoint, to write table and curves.
    """

    def __init__(
        self,
        metric: str,
        save_best: Callable[[list[dict[str, float]]], None],
        write_reports: Callable[[list[dict[str, float]]], None],
    ) -> None:
        self.metric, self.save_best, self.write_reports = metric, save_best, write_reports

    def on_evaluate(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Saves the model if it is the best so far."""
        if not state.is_world_process_zero:
            return
        rows = merge_log(state.log_history)
        if best_row(rows, self.metric) is evaluations(rows, self.metric)[-1]:
            self.save_best(rows)

    def on_save(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Writes the reports so far."""
        if state.is_world_process_zero:
            self.write_reports(merge_log(state.log_history))


class Progress(TrainerCallback):
    """A progress bar on a terminal, or a line every minute, and one line with the metric for each epoch."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self._bar: Bar | None = None
        self._loss: float | None = None  # until the first log
        self._rate = 0.0
        self._epoch_start = 0.0
        self._start: tuple[float, int] | None = None
        self._last_line = (0.0, 0)

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Shows the bar if stderr is a terminal."""
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._bar.add_task("Training", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_epoch_begin(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Starts the clock."""
        self._epoch_start = time.monotonic()

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Advances the bar; without one, prints a line every minute."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=state.global_step)
            return
        now = time.monotonic()
        if state.global_step == 1 or self._start is None:
            self._start = self._last_line = now, state.global_step
        elif state.is_world_process_zero and now - self._last_line[0] >= _LINE_SECONDS:
            self._last_line = now, state.global_step
            speed = (now - self._start[0]) / max(1, state.global_step - self._start[1])
            rate = f"learning rate {self._rate:.2g}, " if self._loss is not None else ""
            left = _duration(speed * (state.max_steps - state.global_step))
            say(f"Step {state.global_step} of {state.max_steps}: {self._loss_text()}{rate}{left} left")

    def on_log(
        self, args: Arguments, state: State, control: Control, logs: dict[str, float], **kwargs: object
    ) -> None:
        """Keeps the loss and the rate for the next line."""
        self._loss, self._rate = logs.get("loss", self._loss), logs.get("learning_rate", self._rate)

    def on_evaluate(
        self, args: Arguments, state: State, control: Control, metrics: dict[str, float], **kwargs: object
    ) -> None:
        """Prints the metric of the epoch."""
        if not state.is_world_process_zero:
            return
        best = best_row(merge_log(state.log_history), self.metric)
        assert best is not None  # this evaluation is in the log
        line = (
            f"Epoch {round(state.epoch or 0)} of {round(args.num_train_epochs)}: {self._loss_text()}"
            f"{self.metric} {percent(metrics[f'eval_{self.metric}'])} "
            f"(best {percent(best[self.metric])} after epoch {round(best['epoch'])}), "
            f"{time.monotonic() - self._epoch_start:.0f} s"
        )
        if self._bar is not None:
            self._bar.console.print(line)
        else:
            say(line)

    def _loss_text(self) -> str:
        """The last logged loss; nothing before the first log, where 0 would be wrong."""
        return f"loss {self._loss:.3f}, " if self._loss is not None else ""

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: object) -> None:
        """Removes the bar."""
        self.close()

    def close(self) -> None:
        """Removes the bar, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3 h 5 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
