"""Training Deformable DETR with detrkit and with Transformers, step by step beside each other.

Both sides begin with the same weights and see the same batches, with the same optimiser, schedule and
clipping; batch norm learns on both. Each trains with its ``Trainer`` and its own defaults otherwise, in a
process of its own as its user would run it, and they take turns after every step, so that what else the
machine does meets both alike. Loss terms and seconds of each step (its batch's loading included) go into a
CSV file; at the end both models are evaluated by the same code.

    python benchmarks/training_run.py --data ../shared/data/bccd --steps 300
    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 python benchmarks/training_run.py  # tuned for both
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any
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
    parser.add_argument("--image-size", type=int, default=240, help="shorter edge in pixels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument(
        "--auxiliary-loss",
        action="store_true",
        help="switch the losses of the earlier decoder layers on in Transformers too, where they are off",
    )
    parser.add_argument("--no-evaluation", action="store_true")
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder))


def make_recipe(args: argparse.Namespace) -> TrainingRecipe:
    return TrainingRecipe(
        model="deformable-detr",
        from_scratch=True,
        backbone="resnet18",
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        queries=100,
        image_size=args.image_size,
        max_image_size=args.image_size * 4 // 3,
        batch_size=args.batch_size,
        train_images=args.data / "train",
        train_annotations=args.data / "annotations/instances_train.json",
        val_images=args.data / "val",
        val_annotations=args.data / "annotations/instances_val.json",
        output="unused",
        workers=0,
    )


def run(args: argparse.Namespace, folder: Path) -> None:
    recipe = make_recipe(args)
    transformers.set_seed(recipe.seed)
    train_data, val_data = preparation.read_datasets(recipe, None, None)
    model, processor, _ = preparation.build_model(recipe, train_data)
    model.save_pretrained(folder / "start")

    context = torch.multiprocessing.get_context("spawn")
    gates = {side: context.Semaphore(int(side == SIDES[0])) for side in SIDES}
    queue = context.Queue()
    processes = [
        context.Process(target=train_side, args=(side, args, folder, gates, queue)) for side in SIDES
    ]
    for process in processes:
        process.start()
    logs = dict(queue.get() for _ in SIDES)
    for process in processes:
        process.join()

    write(logs, args.output)
    medians = {side: statistics.median(logs[side]["seconds"][3:]) for side in SIDES}  # the first ones warm up
    print(
        f"{args.steps} steps, batch {args.batch_size}, shorter edge {args.image_size}, "
        f"{args.threads} threads; median seconds per step: "
        + ", ".join(f"{side} {seconds:.3f}" for side, seconds in medians.items())
        + f", ratio {medians['transformers'] / medians['detrkit']:.2f}"
    )
    for name in () if args.no_evaluation else ("detrkit", "detrkit averaged", "transformers"):
        processor.save_pretrained(folder / name)
        stats = evaluate_detector(
            Detector.from_pretrained(folder / name), val_data.images_dir, val_data.document, masks=False
        ).stats
        print(f"{name}: AP {100 * stats['AP']:.1f}, AP50 {100 * stats['AP50']:.1f}")


def train_side(side: str, args: argparse.Namespace, folder: Path, gates: dict, queue: Any) -> None:
    """One process: trains one side and puts its log into the queue."""
    quiet()
    torch.set_num_threads(args.threads)
    recipe = make_recipe(args)
    train_data, _ = preparation.read_datasets(recipe, None, None)
    ours, processor, train_data = preparation.build_model(recipe, train_data)
    rates = preparation.learning_rates(recipe, ours)
    sampler = AspectRatioBatchSampler(train_data.sizes, recipe.batch_size, seed=recipe.seed, drop_last=True)
    log: dict[str, list] = {"terms": [], "seconds": []}
    options = {
        "args": transformers.TrainingArguments(
            output_dir=str(folder / f"{side} run"),
            max_steps=args.steps,
            per_device_train_batch_size=recipe.batch_size,
            max_grad_norm=recipe.clip_norm,
            weight_decay=recipe.weight_decay,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
        ),
        "train_dataset": PreparedDataset(train_data, processor, recipe.augmentation, seed=recipe.seed),
        "data_collator": DetectionCollator(processor),
    }
    make = make_ours if side == "detrkit" else make_theirs
    trainer = make(recipe, args, folder / "start", ours, rates, sampler, log, options)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.add_callback(EpochOrder(sampler))
    trainer.add_callback(Turn(log, gates[side], gates[SIDES[1 - SIDES.index(side)]]))
    trainer.train()
    trainer.model.save_pretrained(folder / side)
    if side == "detrkit":
        trainer.best_weights.save_pretrained(folder / "detrkit averaged")
    queue.put((side, log))


def make_ours(recipe, args, start, model, rates, sampler, log, options) -> DetectionTrainer:
    keep_memory()
    model = type(model).from_pretrained(start)
    preparation.choose_trained(model, recipe)
    model.to(memory_format=torch.channels_last)

    class Ours(DetectionTrainer):
        compute_loss = recording(DetectionTrainer, log)

    trainer = Ours(
        model=model,
        recipe_rates=rates,
        schedule=recipe.schedule,
        warmup=recipe.warmup,
        ema_decay=recipe.ema_decay,
        multi_scale=0.0,
        sampler=sampler,
        measure=dict,
        **options,
    )
    trainer.add_callback(WeightAverage(partial(trainer.averaged.update_parameters, trainer.model)))
    return trainer


def make_theirs(recipe, args, start, model, rates, sampler, log, options) -> transformers.Trainer:
    # Batch norm that learns on this side too; random features through frozen norms teach nothing.
    with mock.patch.object(modeling_deformable_detr, "replace_batch_norm"):
        model = transformers.DeformableDetrForObjectDetection.from_pretrained(
            start, auxiliary_loss=args.auxiliary_loss
        )

    class Theirs(transformers.Trainer):
        compute_loss = recording(transformers.Trainer, log)

        def get_train_dataloader(self) -> torch.utils.data.DataLoader:
            return torch.utils.data.DataLoader(
                self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
            )

    optimizer = torch.optim.AdamW(parameter_groups(model, *rates), weight_decay=recipe.weight_decay)
    factor = learning_rate_factor(recipe.schedule, args.steps, round(recipe.warmup * args.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return Theirs(model=model, optimizers=(optimizer, schedule), **options)


def recording(trainer_class: type, log: dict[str, list]):
    """The trainer's ``compute_loss``, which also logs."""

    def compute_loss(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = trainer_class.compute_loss(trainer, model, inputs, True)
        log["terms"].append([value.item() for value in (loss, *(outputs.loss_dict[term] for term in TERMS))])
        return (loss, outputs) if return_outputs else loss

    return compute_loss


class EpochOrder(RunPlan):
    """The order of the batches, without evaluations and checkpoints."""

    def __init__(self, sampler: AspectRatioBatchSampler) -> None:
        super().__init__(sampler, eval_every=1, save_every=None, metric="AP", patience=None)

    def on_epoch_end(self, *args: object, **kwargs: object) -> None:
        pass


class Turn(transformers.TrainerCallback):
    """Measures each step, and lets the other process go on after it."""

    def __init__(self, log: dict[str, list], mine: Any, other: Any) -> None:
        self.log, self.mine, self.other = log, mine, other

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self._wait()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.log["seconds"].append(time.perf_counter() - self.start)
        self.other.release()
        self._wait()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.other.release()

    def _wait(self) -> None:
        self.mine.acquire()
        self.start = time.perf_counter()


def write(logs: dict[str, dict[str, list]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = ("loss", *TERMS, "seconds")
        writer.writerow(["step", *(f"{side} {name}" for name in names for side in SIDES)])
        for step in range(len(logs[SIDES[0]]["seconds"])):
            rows = [[*logs[side]["terms"][step], logs[side]["seconds"][step]] for side in SIDES]
            writer.writerow([step + 1, *(f"{value:.6g}" for pair in zip(*rows) for value in pair)])


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
