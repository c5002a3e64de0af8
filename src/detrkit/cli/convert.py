"""``detrkit convert``: converts an original checkpoint to a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detrkit.cli import options
from detrkit.common.errors import SettingError
from detrkit.common.outputs import Output, check_outputs
from detrkit.common.terminal import quiet_libraries, say
from detrkit.hub import upload as hub

_FILES = ("config.json", "preprocessor_config.json", "model.safetensors", "README.md")
_MARK = b"library_name: detrkit"  # in the card


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="Checkpoint file of the original repository (.pth).")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="Name of the released checkpoint, from: detrkit models."
        ),
    ],
    push_to_hub: Annotated[
        bool, typer.Option("--push-to-hub", help="Upload the folder to the Hugging Face Hub.")
    ] = False,
    hub_id: Annotated[
        str | None,
        typer.Option(help="Repository on the Hub.  [default: the name of OUTPUT, under your account]"),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    handler: Annotated[
        bool, typer.Option("--handler", help="Also upload a handler.py for Inference Endpoints.")
    ] = False,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Convert a checkpoint of an original repository to a model folder.

    The folder contains config.json, preprocessor_config.json, model.safetensors and a model card.
    """
    from detrkit.checkpoints.registry import find_checkpoint

    name = find_checkpoint(model).name  # a misspelt name should not wait for torch
    if (output / "recipe.json").exists():
        raise SettingError(f"{output} contains a training run; choose another folder")
    check_outputs(
        [Output("OUTPUT", output / file, _MARK, "README.md") for file in _FILES],
        [checkpoint],
        overwrite=overwrite,
    )
    if push_to_hub:
        hub.check_login()  # nor should a missing login
    elif hub_id is not None or private or handler:
        raise SettingError("--hub-id, --private and --handler require --push-to-hub")
    if not debug:
        quiet_libraries()
    from detrkit.conversion.convert import convert_checkpoint

    folder = convert_checkpoint(checkpoint, output, name)
    say(f"Wrote {folder}. Try: detrkit detect IMAGE --model {folder}")
    if push_to_hub:
        # An account's own setting decides unless a private repository is asked for.
        address = hub.push_to_hub(folder, hub_id, private=private or None, handler=handler)
        say(f"Uploaded to {address}.")
