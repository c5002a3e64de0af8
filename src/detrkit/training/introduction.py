"""What a training run is about to do, in a few lines."""

from __future__ import annotations

from collections.abc import Iterator

from detrkit.common.terminal import count
from detrkit.data.coco import DetectionDataset
from detrkit.data.loading import PreparedDataset
from detrkit.training.lora import adapted_layers
from detrkit.training.recipe import TrainingRecipe
from detrkit.training.trainer import DetectionTrainer

_CLASSES = 10


def introduction(
    trainer: DetectionTrainer, recipe: TrainingRecipe, train: DetectionDataset, val: DetectionDataset
) -> Iterator[str]:
    """Lines on the data, the steps, the device, what is trained, and where the results go."""
    for what, dataset in (("Training", train), ("Validation", val)):
        classes = sorted(dataset.class_counts.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} {number}" for name, number in classes[:_CLASSES])
        more = f" and {len(classes) - _CLASSES} more classes" if len(classes) > _CLASSES else ""
        objects = count(sum(number for _, number in classes), "object")
        yield f"{what}: {count(len(dataset), 'image')} with {objects} ({listed}{more})."
    if recipe.repeat_rare:
        yield _repetition(trainer.train_dataset, recipe.repeat_rare)
    steps = len(trainer.sampler) // recipe.gradient_accumulation or 1
    parameters = list(trainer.model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in parameters)
    rate, backbone_rate = trainer.recipe_rates
    yield (
        f"{count(recipe.epochs, 'epoch')} of {count(steps, 'step')} with {recipe.batch_size} images each, on "
        f"{trainer.args.device} in {'bf16' if trainer.args.bf16 else 'fp32'}; learning rate {rate:g}, "
        f"backbone {backbone_rate:g}."
    )
    frozen = "" if trained == whole else f"; {(whole - trained) / 1e6:.1f} million are frozen"
    if recipe.lora is not None:
        layers = count(len(adapted_layers(trainer.model)), "linear layer")
        frozen += f", and {layers} learn by adapters of rank {recipe.lora} (LoRA)"
    yield (
        f"{trained / 1e6:.1f} million parameters are trained{frozen}. Model, metrics and charts go to "
        f"{recipe.output}."
    )


def _repetition(examples: PreparedDataset, threshold: float) -> str:
    """What ``--repeat-rare`` comes to."""
    images, shown = len(examples.dataset), len(examples)
    if shown == images:
        return f"--repeat-rare {threshold:g} repeats no image; a larger fraction may."
    return (
        f"Images with classes that under {100 * threshold:g} % of the images have are repeated: an epoch "
        f"shows {shown} images, {shown - images} of them again."
    )
