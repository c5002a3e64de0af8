"""The text of ``--help``: options in groups, examples and exit statuses, in lines that fit the terminal.

Lines are wrapped between words and nothing is shortened, however narrow the terminal is.
"""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
import typer.core

# Longer lines are hard to read, shorter ones cannot hold the name of every option.
_WIDEST, _NARROWEST = 100, 44
_COLUMN = 28  # where descriptions begin if there is room for two columns

GENERAL = "General"
"""The group of the options that every command has."""

_GROUPS = {
    "Data": "data split images annotations panoptic_dir predictions limit masks strict val_fraction seed "
    "check_images",
    "Input": "recursive exif_orientation frames every track max_pixels max_bytes allow_private_addresses",
    "Model": "model models engine engines device dtype revision batch_size random_weights threads",
    "Objects": "threshold overlap class_agnostic max_objects tiles raw",
    "Goals": "precision recall confidence scores per_class max_ms",
    "Attention": "detections point layer queries",
    "Measurement": "size repeats transformers",
    "Quantisation": "int8 calibration",
    "Report": "errors layers",
    "Server": "host port share queue_size max_wait_ms",
    "Output": "output save_dir json_file csv_file counts_file as_json sheet to verify resume overwrite",
    "Hub": "push_to_hub hub_id private handler",
    "Ray cluster": "ray ray_workers ray_cpus",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}

EXAMPLES: Mapping[str, tuple[str, str]] = {
    "detrkit": (
        "detrkit detect photo.jpg --save-dir drawings",
        "detrkit detect photos --counts counts.csv --log-format json",
    ),
    "detrkit detect": (
        "detrkit detect photo.jpg --save-dir drawings",
        "detrkit detect photos --recursive --json results.json --resume",
    ),
    "detrkit segment": (
        "detrkit segment photo.jpg --save-dir segments",
        "curl -s https://example.com/photo.jpg | detrkit segment - --save-dir segments",
    ),
    "detrkit evaluate": (
        "detrkit evaluate --model my-model --data dataset/data.yaml --per-class",
        "detrkit evaluate --model detr-resnet-50 --images val2017 --annotations instances_val2017.json",
    ),
    "detrkit calibrate": (
        "detrkit calibrate --model my-model --data dataset/data.yaml --output calibrated",
        "detrkit calibrate --model my-model --data dataset --output fast-model --max-ms 50",
    ),
    "detrkit explain": (
        "detrkit explain photo.jpg --save-dir attention",
        "detrkit explain photo.jpg --save-dir attention --point 320,240 --layer 0",
    ),
    "detrkit train": (
        "detrkit train --model deformable-detr --data dataset/data.yaml --output my-model",
        "detrkit train --model deformable-detr --data dataset/data.yaml --output my-model --resume",
    ),
    "detrkit models": ("detrkit models", "detrkit models --json"),
    "detrkit convert": (
        "detrkit convert detr-r50-e632da11.pth my-detr --model detr-resnet-50",
        "detrkit convert r50.pth my-detr --model conditional-detr-resnet-50 --push-to-hub --private",
    ),
    "detrkit benchmark": (
        "detrkit benchmark --model detr-resnet-50 --transformers",
        "detrkit benchmark --model my-model --engines torch,onnx,openvino --size 480x640 --csv speed.csv",
    ),
    "detrkit export": (
        "detrkit export my-onnx --model my-model --to onnx",
        "detrkit export my-int8 --model my-model --to openvino --int8 --calibration photos",
    ),
    "detrkit demo": ("detrkit demo", "detrkit demo --model my-model --port 8080"),
    "detrkit serve": (
        "detrkit serve --model my-model --port 8080",
        "detrkit serve --model cells=blood-cells --model coco=detr-resnet-50 --host 0.0.0.0",
    ),
    "detrkit data": (
        "detrkit data check dataset/data.yaml --sheet sheet.jpg",
        "detrkit data convert dataset/data.yaml coco-dataset --to coco",
    ),
    "detrkit data check": (
        "detrkit data check dataset/data.yaml --sheet sheet.jpg",
        "detrkit data check annotations.json --images photos --strict",
    ),
    "detrkit data split": (
        "detrkit data split annotations.json two-parts --images photos",
        "detrkit data split voc-dataset two-parts --to yolo --val-fraction 0.1",
    ),
    "detrkit data convert": (
        "detrkit data convert dataset/data.yaml coco-dataset --to coco",
        "detrkit data convert annotations.json yolo-dataset --to yolo --images photos",
    ),
}
"""Two command lines for each command."""

EXIT_STATUSES: Mapping[int, str] = {
    0: "success",
    1: "detrkit failed",
    2: "an error in the command, its settings, the model or the data; one line on stderr explains it",
    130: "interrupted by Ctrl-C (SIGINT)",
    143: "ended by SIGTERM",
}
"""What the exit statuses of every command mean."""

_OF_IMAGES = {
    1: "some images could not be read and were left out, or detrkit failed",
    2: f"{EXIT_STATUSES[2]}; also if no image could be read",
}
_OWN_STATUSES: Mapping[str, Mapping[int, str]] = {
    "detrkit detect": _OF_IMAGES,
    "detrkit segment": _OF_IMAGES,
    "detrkit explain": {1: "some images of --queries could not be read, or detrkit failed"},
    "detrkit benchmark": {1: "an engine could not be measured, or detrkit failed"},
    "detrkit serve": {
        0: "stopped by Ctrl-C (SIGINT) or SIGTERM, after all accepted requests were answered",
        130: "stopped at once by a second Ctrl-C (SIGINT)",
        143: "stopped at once by a second signal, SIGTERM",
    },
    "detrkit demo": {130: "stopped by Ctrl-C (SIGINT) or SIGTERM", 143: ""},
}


def print_help(context: typer.Context) -> None:
    """Ends a group of commands that is called without one: with its help."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


class Command(typer.core.TyperCommand):
    """A command whose help fits the terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: D102 - click's
        formatter.write(help_text(self, ctx.command_path))


class Group(typer.core.TyperGroup):
    """A group of commands whose help fits the terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: D102 - click's
        formatter.write(help_text(self, ctx.command_path))


def help_text(command: Any, path: str, width: int | None = None) -> str:
    """The help of a command.

    Args:
        command: The command or group of commands.
        path: How a user calls it, such as "detrkit detect".
        width: Number of columns; those of the terminal by default.
    """
    width = shutil.get_terminal_size().columns if width is None else width
    width = max(_NARROWEST, min(width, _WIDEST))
    parts = [_wrap(f"Usage: {usage(command, path)}", width, "  ")]
    parts += [_wrap(paragraph, width) for paragraph in paragraphs(command.help)]
    inner = {name: part for name, part in getattr(command, "commands", {}).items() if not part.hidden}
    if inner:
        commands = ((name, paragraphs(part.help)[0]) for name, part in inner.items())
        parts.append("Commands:\n" + _columns(commands, width))
    for group, entries in grouped(command).items():
        parts.append(f"{group}:\n" + _columns(entries, width))
    if path in EXAMPLES:
        lines = (wrap_command(line, width - 2).split("\n") for line in EXAMPLES[path])
        parts.append("Examples:\n" + "\n".join(f"  {part}" for line in lines for part in line))
    statuses = [(str(status), meaning) for status, meaning in exit_statuses(path).items()]
    parts.append("Exit status:\n" + _columns(statuses, width, column=8))
    return "\n\n".join(parts) + "\n"


def exit_statuses(path: str) -> dict[int, str]:
    """What the exit statuses of a command mean.

    Args:
        path: How a user calls it, such as "detrkit detect".
    """
    meanings = {**EXIT_STATUSES, **_OWN_STATUSES.get(path, {})}
    return {status: meaning for status, meaning in meanings.items() if meaning}


def paragraphs(text: str | None) -> list[str]:
    """The paragraphs of a command's description, each on one line, without marks of Markdown."""
    found = [" ".join(part.split()).replace("`", "") for part in (text or "").split("\n\n")]
    return [part for part in found if part] or [""]


def grouped(command: Any) -> dict[str, list[tuple[str, str]]]:
    """The arguments and options of a command by group: how each is written, and what it does."""
    found: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{group: [] for group in _GROUPS}}
    kinds = _kinds(command)
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        kind = kinds.get(parameter.name, _Kind())
        found.setdefault(_group_of(parameter), []).append(
            (_written(parameter, kind), _description(parameter, kind))
        )
    general = [*found.pop(GENERAL, []), ("-h, --help", "Show this message and exit.")]
    return {group: entries for group, entries in {**found, GENERAL: general}.items() if entries}


def _group_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or _GROUP_OF.get(parameter.name, GENERAL)


@dataclass(frozen=True)
class _Kind:
    """The values that a parameter takes: what stands for them, and their limits."""

    value: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def limits(self) -> str:
        if self.low is not None and self.high is not None:
            return f" [{self.low:g} to {self.high:g}]"
        return f" [{self.low:g} or more]" if self.low is not None and self.low > 1 else ""


_VALUES = {int: "N", float: "NUMBER", str: "TEXT", Path: "PATH"}


def _kinds(command: Any) -> dict[str, _Kind]:
    """The kinds of a command's parameters, from the annotations of its function.

    Versions of typer differ in what they keep of these.
    """
    kinds: dict[str, _Kind] = {}
    if command.callback is None:
        return kinds
    for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
        if get_origin(parameter.annotation) is Annotated:
            hint, info = get_args(parameter.annotation)[:2]
            kinds[name] = _Kind(info.metavar or _value_of(hint), info.min, info.max)
    return kinds


def _value_of(hint: Any) -> str:
    """What stands for a value of a type; empty for an option that is on or off."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    inner = [part for part in get_args(hint) if part is not type(None)]
    return _value_of(inner[0]) if inner else _VALUES.get(hint, "")


def _written(parameter: Any, kind: _Kind) -> str:
    """All names of an option with its value, or the name of an argument."""
    if parameter.param_type_name == "argument":
        return f"{kind.value}{'...' if parameter.nargs == -1 else ''}"
    names = ", ".join(sorted((*parameter.opts, *parameter.secondary_opts), key=_dashes))
    return f"{names} {kind.value}".rstrip()


def _dashes(name: str) -> int:
    """Orders ``-m`` before ``--model``, and keeps the order of others."""
    return len(name) - len(name.lstrip("-"))


def _description(parameter: Any, kind: _Kind) -> str:
    """What an option or argument does, with its limits and default."""
    text, mark, default = " ".join((parameter.help or "").replace("`", "").split()).partition(" [default")
    text += kind.limits + mark + default
    if parameter.required:
        return f"{text} [required]"
    value = parameter.default
    if mark or value is None or callable(value) or value in ([], ()):
        return text
    if not kind.value:
        if not parameter.secondary_opts:
            return text
        value = (parameter.opts if value else parameter.secondary_opts)[0]
    return f"{text} [default: {value}]".strip()


def usage(command: Any, path: str) -> str:
    """The usage line of a command: what it requires, and that it has options."""
    kinds, words = _kinds(command), [path]
    for parameter in command.params:
        if parameter.required and parameter.param_type_name != "argument":
            words.append(f"{max(parameter.opts, key=len)} {kinds[parameter.name].value}")
    words.append("[OPTIONS]")
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            words.append(_written(parameter, kinds[parameter.name]))
    if hasattr(command, "commands"):
        words.append("COMMAND ...")
    return " ".join(words)


def _columns(entries: Iterable[tuple[str, str]], width: int, column: int = _COLUMN) -> str:
    """Names and their descriptions: beside each other if there is room, otherwise below."""
    return "\n".join(line for name, text in entries for line in _entry(name, text, width, column))


def _entry(name: str, text: str, width: int, column: int) -> Iterator[str]:
    beside = width >= 80 or column < _COLUMN
    indent = " " * (column if beside else 8)
    start = f"  {name}"
    if beside and len(start) + 2 <= column:
        yield _wrap(start.ljust(column) + text, width, indent)
    else:
        yield start
        yield _wrap(indent + text, width, indent)


def wrap_command(line: str, width: int) -> str:
    """A command line in lines that a shell reads as one."""
    return _wrap(line, width, "    ", " \\")


def _wrap(text: str, width: int, indent: str = "", mark: str = "") -> str:
    """Text in lines, which break between words only; the mark ends each line that is continued."""
    lines = textwrap.wrap(
        text,
        width - len(mark),
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
    )
    return f"{mark}\n".join(lines)
