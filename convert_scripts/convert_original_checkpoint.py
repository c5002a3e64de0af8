"""Converts a checkpoint of an original repository into a folder that ``from_pretrained`` loads.

For example::

    python convert_scripts/convert_original_checkpoint.py detr-r50-e632da11.pth my-detr --model detr-resnet-50

The folder's path goes to stdout; a mistake gives one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from detrkit.checkpoints.registry import REGISTRY, find_checkpoint
from detrkit.common.terminal import quiet_libraries, say
from detrkit.errors import DetrkitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the conversion; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        folder = _convert(options)
    except DetrkitError as error:
        if options.debug:
            traceback.print_exc()
        else:
            say(str(error), title="Error")
        return 2
    print(folder)
    return 0


def _convert(options: argparse.Namespace) -> Path:
    name = find_checkpoint(options.model).name
    # Imported late: PyTorch takes seconds, which --help and a misspelt name should not.
    from detrkit.conversion.convert import convert_checkpoint

    if not options.debug:
        quiet_libraries()
    return convert_checkpoint(options.checkpoint, options.output, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Convert an original DETR checkpoint into a model folder.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file of the original repository (.pth)")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    parser.add_argument("--model", required=True, metavar="NAME", help=f"one of {', '.join(REGISTRY)}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
