"""``detrkit train``: fine-tunes a checkpoint or trains a new model."""

from __future__ import annotations

import dataclasses
import inspect
import os
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from detrkit.cli.options import Debug
from detrkit.common.terminal import interrupt_status, quiet_libraries, say
from detrkit.training.recipe import TrainingRecipe, flag_of


def train(debug: bool = False, **options: Any) -> None:
    """Train a detector on a COCO-format data set.

    Fine-tunes a checkpoint to the classes of the data set, or trains a new model with `--from-scratch`. The
    model is evaluated on the validation images after each epoch, and the best one is kept in the output
    folder, which every command takes as `--model`. `--resume` continues an interrupted run.
    """
    recipe = TrainingRecipe(**options)
    if not recipe.from_scratch:
        from detrkit.checkpoints.registry import resolve_model

        resolve_model(recipe.model)  # before any work: a misspelt name, with a suggestion
    if not debug:
        quiet_libraries()
    from detrkit.training.run import train as run

    try:
        result = run(recipe)
    except KeyboardInterrupt as error:
        say("Interrupted. Run the same command with --resume to continue from the last checkpoint.")
        raise typer.Exit(interrupt_status(error)) from None
    if os.environ.get("RANK", "0") != "0":  # one of several processes that torchrun started
        return
    numbers = ", ".join(
        f"{name} {100 * value:.1f}" for name, value in result.best.items() if name in ("AP", "AP50", "PQ")
    )
    say(
        f"Best model, after epoch {result.best['epoch']:.0f}: {numbers}. It is in {result.folder}; try: "
        f"detrkit detect IMAGE --model {result.folder}"
    )


def _signature() -> inspect.Signature:
    """The options: one for each field of the recipe, with its default, limits and help."""
    hints = get_type_hints(TrainingRecipe)
    parameters = []
    for field in fields(TrainingRecipe):
        settings = field.metadata
        names = [flag_of(field.name)]
        if field.name == "model":
            names.append("-m")
        if hints[field.name] == bool | None:
            names = [f"{names[0]}/--no-{names[0][2:]}"]
        option = typer.Option(
            *names,
            help=settings["help"],
            rich_help_panel=settings["group"],
            min=settings["min"],
            max=settings["max"],
        )
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
                annotation=Annotated[hints[field.name], option],
            )
        )
    parameters.append(
        inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    )
    return inspect.Signature(parameters)


train.__signature__ = _signature()  # type: ignore[attr-defined]
train.__annotations__ = {name: p.annotation for name, p in train.__signature__.parameters.items()}  # type: ignore[attr-defined]
