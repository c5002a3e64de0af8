"""Training on the Transformers ``Trainer``, with defaults that converge.

Example:
    ```python
    from detrkit.training import TrainingRecipe, train

    recipe = TrainingRecipe(
        model="detr-resnet-50",
        train_images="train",
        train_annotations="instances_train.json",
        val_images="val",
        val_annotations="instances_val.json",
        output="my-detector",
        epochs=30,
    )
    result = train(recipe)
    print(result.best["AP"], result.folder)  # the folder is a model: Detector.from_pretrained(result.folder)
    ```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detrkit.training.recipe import TrainingRecipe as TrainingRecipe

if TYPE_CHECKING:
    from detrkit.training.run import TrainingResult


def train(recipe: TrainingRecipe, **data_sets: Any) -> TrainingResult:
    """Trains a detector as a recipe says; see :func:`detrkit.training.run.train`."""
    from detrkit.training.run import train as run

    return run(recipe, **data_sets)
