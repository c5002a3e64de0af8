"""A training run from its recipe to a model folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback

from detrkit.checkpoints.identity import weights_of
from detrkit.checkpoints.loading import read_detection_config
from detrkit.checkpoints.registry import resolve_model
from detrkit.common.errors import DetrkitError, SettingError
from detrkit.common.files import atomic_folder, write_json
from detrkit.common.locks import locked
from detrkit.common.log import logger
from detrkit.common.randomness import same_randomness
from detrkit.common.terminal import say
from detrkit.data.coco import DetectionDataset
from detrkit.data.loading import AspectRatioBatchSampler, DetectionCollator, PreparedDataset
from detrkit.data.scale import training_scale
from detrkit.data.splitting import fingerprint, repeated_images
from detrkit.engines.allocator import keep_memory
from detrkit.evaluation import evaluate_dataset
from detrkit.evaluation.calibrate import quick_settings
from detrkit.hub.card_trained import trained_card
from detrkit.hub.upload import CHECKPOINTS, check_login, push_to_hub
from detrkit.inference.detector import Detector
from detrkit.inference.tiles import TRAINING_SCALE
from detrkit.models.detection import ModelWithHeads
from detrkit.processing.image_processor import DetrImageProcessorBase
from detrkit.results.detection_config import DetectionConfig
from detrkit.training import preparation
from detrkit.training.batch_norm import refreeze_batch_norm
from detrkit.training.callbacks import MissedEvaluation, Progress, Reporter, RunPlan, WeightAverage
from detrkit.training.history import best_row, has_stalled, merge_log
from detrkit.training.introduction import introduction
from detrkit.training.lora import merged
from detrkit.training.preparation import RECIPE_FILE, SPLIT_FILE
from detrkit.training.recipe import TrainingRecipe
from detrkit.training.reports import write_predictions, write_reports
from detrkit.training.trainer import AVERAGE_FILE, DetectionTrainer, last_checkpoint

_PATIENCE_SECONDS = 3 * 3600  # the other processes wait while the main one evaluates


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training run.

    Attributes:
        folder: The model folder, with the best weights.
        metric: "AP", or "PQ" for panoptic data.
        best: The row of the log of the best evaluation: ``epoch``, ``AP``, ... in [0, 1].
        rows: All rows of the log, as in ``metrics.csv``.
    """

    folder: Path
    metric: str
    best: Mapping[str, float]
    rows: list[dict[str, float]]


def train(
    recipe: TrainingRecipe,
    *,
    train_dataset: DetectionDataset | None = None,
    val_dataset: DetectionDataset | None = None,
) -> TrainingResult:
    """Trains a model, and writes it with its reports to the recipe's output folder.

    After each epoch the average of the weights is evaluated and the best so far saved in the folder. A
    checkpoint of the run replaces the last one in the sub-folder ``checkpoints``. On a CPU, a resumed run
    gives the same numbers as an uninterrupted one.

    Args:
        recipe: The settings.
        train_dataset: Training data instead of the recipe's files, for example from a YOLO folder.
        val_dataset: Validation data instead of the recipe's files.

    Raises:
        AnnotationError: The data cannot be used.
        CheckpointError: The model to start from cannot be used.
        SettingError: The recipe does not fit the data, the model or the output folder.
        TrainingError: The loss is not finite.
        DetrkitError: Files cannot be written.
        MissingExtraError: A package that training needs is not installed.
    """
    if recipe.push_to_hub:
        check_login()
    preparation.check_packages(recipe)
    preparation.check_output(recipe)
    with same_randomness():
        if os.environ.get("RANK", "0") != "0":  # one of several processes of one run
            return _train(recipe, train_dataset, val_dataset)
        with locked(recipe.output / ".lock", recipe.output):
            return _train(recipe, train_dataset, val_dataset)


def _train(
    recipe: TrainingRecipe, train_dataset: DetectionDataset | None, val_dataset: DetectionDataset | None
) -> TrainingResult:
    checkpoint = _checkpoint_to_resume(recipe)
    if not torch.cuda.is_available() or recipe.device == "cpu":
        keep_memory()
    set_seed(recipe.seed)
    train_data, val_data = preparation.read_datasets(recipe, train_dataset, val_dataset)
    fingerprints = {"training": fingerprint(train_data), "validation": fingerprint(val_data)}
    if not recipe.from_scratch:
        fingerprints["model"] = str(weights_of(recipe.model))
    if recipe.backbone_weights is not None:
        fingerprints["backbone"] = preparation.hash_of(recipe.backbone_weights)
    if checkpoint is not None:
        recipe.check_same(recipe.output / RECIPE_FILE, fingerprints)
    model, processor, train_data = preparation.build_model(recipe, train_data)
    preparation.check_classes(model, val_data)
    model.to(memory_format=torch.channels_last)  # convolutions are a sixth faster
    metric = "PQ" if val_data.panoptic_dir is not None else "AP"

    trainer = _make_trainer(recipe, model, processor, train_data, val_data, metric)
    progress = Progress(metric)
    trainer.add_callback(progress)
    if trainer.is_world_process_zero():
        recipe.save(recipe.output / RECIPE_FILE, fingerprints)
        if recipe.val_fraction is not None:
            _write_split(recipe.output / SPLIT_FILE, train_data, val_data)
        for line in introduction(trainer, recipe, train_data, val_data):
            say(line)
    if checkpoint is not None and trainer.averaged is not None:
        trainer.averaged.load_state_dict(torch.load(checkpoint / AVERAGE_FILE, weights_only=True))
    try:
        rows = _run(trainer, recipe, metric, checkpoint)
    finally:
        progress.close()
    best = best_row(rows, metric)
    assert best is not None  # the last epoch is always evaluated
    if trainer.is_world_process_zero():
        detector = Detector.from_pretrained(recipe.output, device=trainer.args.device)
        if val_data.panoptic_dir is None:
            detector.detection_config = _store_settings(detector, train_data, val_data, recipe)
        write_predictions(detector, val_data, recipe.output)
        if recipe.push_to_hub:
            _upload(recipe)
    return TrainingResult(folder=recipe.output, metric=metric, best=best, rows=rows)


def _store_settings(
    detector: Detector, train_data: DetectionDataset, val_data: DetectionDataset, recipe: TrainingRecipe
) -> DetectionConfig:
    """Chooses overlap filter and threshold on the validation data and stores them with the model."""
    batch_size = recipe.eval_batch_size or recipe.batch_size
    start = _filter_of_start(recipe)
    config = quick_settings(detector, val_data, start, batch_size=batch_size, strict=recipe.strict)
    is_chosen = bool(config.chosen)
    config = replace(config, chosen={**config.chosen, TRAINING_SCALE: training_scale(train_data)})
    config.save_pretrained(recipe.output)
    overlap = "no overlap filter" if config.overlap is None else f"overlap filter at IoU {config.overlap:g}"
    if is_chosen:
        say(f"Chosen on the validation images: {config.describe()}, {overlap} (details: detrkit calibrate).")
    if config.overlap != start.overlap:
        say("detrkit evaluate uses the filter; with --raw it reports the AP shown during training.")
    return config


def _make_trainer(
    recipe: TrainingRecipe,
    model: ModelWithHeads,
    processor: DetrImageProcessorBase,
    train_data: DetectionDataset,
    val_data: DetectionDataset,
    metric: str,
) -> DetectionTrainer:
    """The trainer with its callbacks, except for the progress bar; ``metric`` determines the best model."""
    arguments = _training_arguments(recipe)
    examples = PreparedDataset(
        train_data,
        processor,
        recipe.augmentation,
        seed=recipe.seed,
        mosaic=recipe.mosaic,
        strict=recipe.strict,
        copies=repeated_images(train_data, recipe.repeat_rare, seed=recipe.seed),
    )
    sampler = AspectRatioBatchSampler(
        examples.sizes,
        recipe.batch_size,
        seed=recipe.seed,
        drop_last=len(train_data) >= recipe.batch_size,  # as in the original; small batches spoil live norms
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    trainer = DetectionTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=DetectionCollator(processor),
        processing_class=processor,
        recipe_rates=preparation.learning_rates(recipe, model),
        schedule=recipe.schedule,
        warmup=recipe.warmup,
        ema_decay=recipe.ema_decay,
        multi_scale=recipe.multi_scale,
        sampler=sampler,
        measure=partial(
            _measure,
            recipe=recipe,
            processor=processor,
            dataset=val_data,
            settings=_filter_of_start(recipe),
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        RunPlan(
            sampler,
            eval_every=recipe.eval_every,
            save_every=recipe.save_every,
            metric=metric,
            patience=recipe.patience,
        )
    )
    if trainer.averaged is not None:
        trainer.add_callback(WeightAverage(partial(trainer.averaged.update_parameters, trainer.model)))
    trainer.add_callback(MissedEvaluation(trainer.evaluate_missed, recipe.eval_every, metric))
    trainer.add_callback(
        Reporter(
            metric,
            partial(_save_best, trainer, recipe, val_data),
            lambda rows: write_reports(recipe.output, rows, metric),
        )
    )
    return trainer


def _run(
    trainer: DetectionTrainer, recipe: TrainingRecipe, metric: str, checkpoint: Path | None
) -> list[dict[str, float]]:
    """Trains, from a checkpoint if there is one; returns the rows of the log."""
    if checkpoint is not None:
        from transformers import TrainerState

        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        rows = merge_log(state.log_history)
        complete = (state.epoch or 0) >= recipe.epochs and metric in rows[-1]
        if complete or has_stalled(rows, metric, recipe.patience):
            logger.warning("The run in %s is complete; nothing is left to train.", recipe.output)
            return rows
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return merge_log(trainer.state.log_history)


def _filter_of_start(recipe: TrainingRecipe) -> DetectionConfig:
    """The overlap filter of the model that training starts from, which the trained model keeps.

    So the AP in training is what ``detrkit evaluate`` gives for either. Thresholds are chosen anew.
    """
    if recipe.from_scratch:
        return DetectionConfig()
    start = read_detection_config(resolve_model(recipe.model))
    return DetectionConfig(overlap=start.overlap, class_agnostic=start.class_agnostic)


def _measure(
    model: ModelWithHeads,
    recipe: TrainingRecipe,
    processor: DetrImageProcessorBase,
    dataset: DetectionDataset,
    settings: DetectionConfig,
) -> dict[str, float]:
    """The metrics of a model in training, as from ``detrkit evaluate``."""
    device = model.device
    # A detector folds batch norm into the convolutions and can no longer be trained.
    detector = Detector(refreeze_batch_norm(merged(model)), processor, device=device)
    detector.detection_config = settings
    batch_size = recipe.eval_batch_size or (1 if model.config.dilation else recipe.batch_size)
    evaluation = evaluate_dataset(
        detector,
        dataset,
        batch_size=batch_size,
        masks=dataset.return_masks and dataset.panoptic_dir is None,
        strict=recipe.strict,
    )
    numbers = dict(evaluation.stats)
    if evaluation.masks is not None:
        numbers |= {f"mask_{name}": value for name, value in evaluation.masks.stats.items()}
    # COCO gives -1 where no object is of a size.
    return {name: value for name, value in numbers.items() if value >= 0 or name in ("AP", "PQ")}


def _save_best(
    trainer: DetectionTrainer,
    recipe: TrainingRecipe,
    dataset: DetectionDataset,
    rows: list[dict[str, float]],
) -> None:
    """Writes the model that was just evaluated, with its processor and card."""
    model = trainer.best_weights if recipe.lora is None else merged(trainer.best_weights)
    card = trained_card(
        recipe.output.resolve().name,
        model.config.to_dict(),
        recipe.to_dict(),
        rows[-1],
        dataset=Path(dataset.source).name,
        images=len(dataset),
    )
    with atomic_folder(recipe.output) as folder:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _checkpoint_to_resume(recipe: TrainingRecipe) -> Path | None:
    folder = recipe.output / CHECKPOINTS
    begun = (recipe.output / RECIPE_FILE).exists()
    if not recipe.resume:
        trained = (recipe.output / "model.safetensors").exists() and not recipe.overwrite
        if begun and (trained or last_checkpoint(folder) is not None):
            raise SettingError(
                f"{recipe.output} already contains a run; add --resume, or choose another folder"
            )
        return None
    if not begun:
        logger.warning("%s contains no run to resume; starting from the beginning.", recipe.output)
        return None
    recipe.check_same(recipe.output / RECIPE_FILE)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None:
        logger.warning("The run in %s has no checkpoint yet; starting from the beginning.", recipe.output)
    return checkpoint


def _training_arguments(recipe: TrainingRecipe) -> TrainingArguments:
    on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
    if recipe.device not in (None, "cpu") and on_cpu:
        raise SettingError(f"--device {recipe.device} is not available on this machine; use cpu")
    available = get_available_reporting_integrations()
    missing = [name for name in recipe.report_to if name not in available]
    if missing:
        raise SettingError(
            f"--report-to {missing[0]} is unknown or not installed; available: "
            f"{', '.join(available) or 'none'}"
        )
    wants_bf16 = recipe.precision == "bf16"
    if recipe.precision == "auto":
        wants_bf16 = not on_cpu and torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return TrainingArguments(
            output_dir=str(recipe.output / CHECKPOINTS),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.clip_norm,
            logging_steps=recipe.log_every,
            logging_nan_inf_filter=False,
            save_strategy="no",  # RunPlan says when
            save_total_limit=1,
            report_to=recipe.report_to or "none",
            disable_tqdm=True,
            seed=recipe.seed,
            bf16=wants_bf16,
            use_cpu=on_cpu,
            dataloader_num_workers=preparation.resolve_workers(
                recipe, int(os.environ.get("WORLD_SIZE", "1"))
            ),
            remove_unused_columns=False,
            ddp_timeout=_PATIENCE_SECONDS,
            # A mask head is not run for a batch without objects.
            ddp_find_unused_parameters=recipe.masks,
        )
    except (ValueError, ImportError) as error:
        raise SettingError(f"these options do not fit together: {error}") from error


def _write_split(path: Path, train_data: DetectionDataset, val_data: DetectionDataset) -> None:
    """Writes which images a run trains and validates on."""
    splits = {"train": train_data, "val": val_data}
    names = {
        split: [image["file_name"] for image in dataset.document["images"]]
        for split, dataset in splits.items()
    }
    write_json(names, path)


def _upload(recipe: TrainingRecipe) -> None:
    try:
        push_to_hub(recipe.output, recipe.hub_id)
    except DetrkitError as error:
        raise DetrkitError(f"the model is in {recipe.output}, but could not be uploaded: {error}") from error
