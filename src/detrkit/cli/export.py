"""``detrkit export``: a model as a folder that onnxruntime or OpenVINO runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detrkit.cli.console import Debug, complain, quiet_libraries


def export(
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Hub id, folder, or a name from: detrkit models.")
    ],
    to: Annotated[str, typer.Option("--to", help="onnx or openvino.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch before the folder is kept.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Export a model for onnxruntime or OpenVINO.

    The folder holds the model with free batch size, height and width, its config and its image processor, and
    works as `--model` of the other commands. Needs the extra `export`.
    """
    from detrkit.checkpoints.registry import resolve_model

    name = resolve_model(model)  # a misspelt name should not wait for torch
    if not debug:
        quiet_libraries()
    from detrkit.checkpoints.loading import load_pretrained
    from detrkit.engines.export import check_format, export_model

    check_format(to)
    loaded, processor = load_pretrained(name, revision)
    exported = export_model(loaded, output, to, processor=processor, verify=verify)
    if verify:
        largest = max(exported.differences.values())
        complain(f"On images of three sizes the results differ from PyTorch's by at most {largest:.1g}.")
    complain(f"Wrote {output}. Try: detrkit detect IMAGE --model {output}")
