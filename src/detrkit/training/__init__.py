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

from typing import TYPE_CHECKING

from detrkit.common.lazy import lazy_names

if TYPE_CHECKING:
    from detrkit.training.recipe import TrainingRecipe as TrainingRecipe
    from detrkit.training.run import train as train
else:
    __all__, __getattr__, __dir__ = lazy_names(__name__)
