"""``detrkit convert``: an original checkpoint to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detrkit.cli.console import Debug, complain, quiet_libraries


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint file of the original repository (.pth).")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="Which released checkpoint it is: see detrkit models."
        ),
    ],
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of an original repository to a model folder.

    The folder holds config.json, preprocessor_config.json, model.safetensors and a model card.
    """
    from detrkit.checkpoints.registry import find_checkpoint

    name = find_checkpoint(model).name  # a misspelt name should not wait for torch
    if not debug:
        quiet_libraries()
    from detrkit.checkpoints.conversion import convert_checkpoint

    folder = convert_checkpoint(checkpoint, output, name)
    complain(f"Wrote {folder}. Try: detrkit detect IMAGE --model {folder}")
