"""Training Deformable DETR with detrkit and with Transformers, step by step beside each other.

Both sides begin with the same weights and see the same batches, with the same optimiser, schedule and
clipping; batch norm learns on both. Each trains with its ``Trainer`` and its own defaults otherwise, in one process,
taking turns after every step. Loss terms and seconds of each step go into a CSV file; at the end both models
are evaluated by the same code.

    python benchmarks/training_run.py --data ../shared/data/bccd --steps 300
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import torch
import transformers
from transformers.models.deformable_detr import modeling_deformable_detr

from detrkit import Detector
from detrkit.data.loading import AspectRatioBatchSampler, DetectionCollator, PreparedDataset
from detrkit.engines.allocator import keep_memory
from detrkit.evaluation import evaluate_detector
from detrkit.training import TrainingRecipe, preparation
from detrkit.training.callbacks import RunPlan, WeightAverage
from detrkit.training.optimization import learning_rate_factor, parameter_groups
from detrkit.training.trainer import DetectionTrainer

SIDES = ("detrkit", "transformers")
TERMS = ("loss_ce", "loss_bbox", "loss_giou")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bccd"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument(
        "--auxiliary-loss",
        action="store_true",
        help="switch the losses of the earlier decoder layers on in Transformers too, where they are off",
    )
    parser.add_argument("--no-evaluation", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()  # for both sides: one process
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    recipe = TrainingRecipe(
        model="deformable-detr",
        from_scratch=True,
        backbone="resnet18",
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        queries=100,
        image_size=240,
        max_image_size=320,
        batch_size=args.batch_size,
        train_images=args.data / "train",
        train_annotations=args.data / "annotations/instances_train.json",
        val_images=args.data / "val",
        val_annotations=args.data / "annotations/instances_val.json",
        output="unused",
        workers=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        run(recipe, args, Path(folder))


def run(recipe: TrainingRecipe, args: argparse.Namespace, folder: Path) -> None:
    transformers.set_seed(recipe.seed)
    train_data, val_data = preparation.read_datasets(recipe, None, None)
    ours, processor, train_data = preparation.build_model(recipe, train_data)
    ours.save_pretrained(folder / "start")
    # Batch norm that learns on the other side too; random features through frozen norms teach nothing.
    with mock.patch.object(modeling_deformable_detr, "replace_batch_norm"):
        theirs = transformers.DeformableDetrForObjectDetection.from_pretrained(
            folder / "start", auxiliary_loss=args.auxiliary_loss
        )
    ours.to(memory_format=torch.channels_last)

    log = Log()
    turns = Turns()
    rates = preparation.learning_rates(recipe, ours)

    def options(side: str) -> dict:
        return {
            "args": transformers.TrainingArguments(
                output_dir=str(folder / side),
                max_steps=args.steps,
                per_device_train_batch_size=recipe.batch_size,
                max_grad_norm=recipe.clip_norm,
                weight_decay=recipe.weight_decay,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                dataloader_num_workers=0,
                remove_unused_columns=False,
            ),
            "train_dataset": PreparedDataset(train_data, processor, recipe.augmentation, seed=recipe.seed),
            "data_collator": DetectionCollator(processor),
        }

    def batches() -> AspectRatioBatchSampler:
        return AspectRatioBatchSampler(train_data.sizes, recipe.batch_size, seed=recipe.seed)

    class Ours(DetectionTrainer):
        compute_loss = log.recording(DetectionTrainer, "detrkit")

    class Theirs(transformers.Trainer):
        compute_loss = log.recording(transformers.Trainer, "transformers")
        sampler = batches()

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=self.sampler, collate_fn=self.data_collator
            )

    our_trainer = Ours(
        model=ours,
        recipe_rates=rates,
        schedule=recipe.schedule,
        warmup=recipe.warmup,
        ema_decay=recipe.ema_decay,
        multi_scale=0.0,
        sampler=batches(),
        measure=dict,
        **options("detrkit"),
    )
    our_trainer.add_callback(WeightAverage(lambda: our_trainer.averaged.update_parameters(our_trainer.model)))
    optimizer = torch.optim.AdamW(parameter_groups(theirs, *rates), weight_decay=recipe.weight_decay)
    factor = learning_rate_factor(recipe.schedule, args.steps, round(recipe.warmup * args.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    their_trainer = Theirs(model=theirs, optimizers=(optimizer, schedule), **options("transformers"))
    trainers = dict(zip(SIDES, (our_trainer, their_trainer)))
    for side, trainer in trainers.items():
        trainer.add_callback(EpochOrder(trainer.sampler))
        trainer.add_callback(turns.callback(side, log))
    threads = [
        threading.Thread(target=turns.run, args=(side, trainer.train)) for side, trainer in trainers.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    log.write(args.output)
    medians = {side: statistics.median(log.seconds[side][3:]) for side in SIDES}  # the first ones warm up
    print(
        f"{args.steps} steps, batch {recipe.batch_size}, {args.threads} threads, seconds per step (median): "
        + ", ".join(f"{side} {seconds:.3f}" for side, seconds in medians.items())
        + f", ratio {medians['transformers'] / medians['detrkit']:.2f}"
    )
    if args.no_evaluation:
        return
    for side, model in (
        ("detrkit", our_trainer.model),
        ("detrkit, averaged weights", our_trainer.best_weights),
        ("transformers", theirs),
    ):
        model.save_pretrained(folder / "end")
        processor.save_pretrained(folder / "end")
        stats = evaluate_detector(
            Detector.from_pretrained(folder / "end"), val_data.images_dir, val_data.document, masks=False
        ).stats
        print(f"{side}: AP {100 * stats['AP']:.1f}, AP50 {100 * stats['AP50']:.1f}")


class EpochOrder(RunPlan):
    """The order of the batches, without evaluations and checkpoints."""

    def __init__(self, sampler: AspectRatioBatchSampler) -> None:
        super().__init__(sampler, eval_every=1, save_every=None, metric="AP", patience=None)

    def on_epoch_end(self, *args: object, **kwargs: object) -> None:
        pass


class Log:
    """Loss terms and seconds of every step of both sides."""

    def __init__(self) -> None:
        self.terms: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}

    def recording(self, trainer_class: type, side: str):
        def compute_loss(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = trainer_class.compute_loss(trainer, model, inputs, True)
            values = [loss, *(outputs.loss_dict[term] for term in TERMS)]
            self.terms[side].append([value.item() for value in values])
            return (loss, outputs) if return_outputs else loss

        return compute_loss

    def write(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            names = ("loss", *TERMS, "seconds")
            writer.writerow(["step", *(f"{side} {name}" for name in names for side in SIDES)])
            for step in range(len(self.seconds[SIDES[0]])):
                columns = [[self.terms[side][step][i] for side in SIDES] for i in range(len(TERMS) + 1)]
                columns.append([self.seconds[side][step] for side in SIDES])
                writer.writerow([step + 1, *(f"{value:.6g}" for column in columns for value in column)])


class Turns:
    """Lets two threads go on in turns: what else the machine does meets both alike."""

    def __init__(self) -> None:
        self._gates = {side: threading.Semaphore(0) for side in SIDES}
        self._gates[SIDES[0]].release()

    def run(self, side: str, train) -> None:
        self._gates[side].acquire()
        try:
            train()
        finally:
            self._pass_on(side)

    def callback(self, side: str, log: Log) -> transformers.TrainerCallback:
        turns = self

        class Turn(transformers.TrainerCallback):
            """Measures a step, its batch's loading included, and waits for the other side's."""

            def on_train_begin(self, *args: object, **kwargs: object) -> None:
                self.start = time.perf_counter()

            def on_step_end(self, *args: object, **kwargs: object) -> None:
                log.seconds[side].append(time.perf_counter() - self.start)
                turns._pass_on(side)
                turns._gates[side].acquire()
                self.start = time.perf_counter()

        return Turn()

    def _pass_on(self, side: str) -> None:
        self._gates[SIDES[1 - SIDES.index(side)]].release()


if __name__ == "__main__":
    main()
