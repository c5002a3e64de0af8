"""The help of every command: nothing is cut at any width, examples that run, completion in shells."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from detrkit.cli import app
from detrkit.cli.help import EXAMPLES, EXIT_STATUSES, GENERAL, exit_statuses, grouped, help_text
from tests.cli.conftest import Run


def every_command() -> Iterator[tuple[str, Any]]:
    program = typer.main.get_command(app)
    pending = [("detrkit", program)]
    while pending:
        path, command = pending.pop()
        yield path, command
        pending += [(f"{path} {name}", part) for name, part in getattr(command, "commands", {}).items()]


COMMANDS = dict(every_command())


def test_every_command_is_looked_at() -> None:
    assert {"detrkit", "detrkit detect", "detrkit train", "detrkit data split"} <= COMMANDS.keys()
    assert len(COMMANDS) == 17


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("path", COMMANDS)
def test_help_cuts_no_name_and_no_word(path: str, width: int) -> None:
    command = COMMANDS[path]
    text = help_text(command, path, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    for parameter in command.params:
        if parameter.param_type_name == "option":
            for name in (*parameter.opts, *parameter.secondary_opts):
                assert {name, f"{name},"} & set(words), name
        # The words of its description follow each other, on however many lines.
        description, _, default = (parameter.help or "").replace("`", "").partition("[default")
        flow = " ".join(words)
        assert " ".join(description.split()) in flow
        assert " ".join(default.split()) in flow
    for paragraph in (command.help or "").split("\n\n"):
        assert " ".join(paragraph.replace("`", "").split()) in " ".join(words)


def test_a_word_that_is_wider_than_the_terminal_is_not_cut() -> None:
    def wide(option: int = 1) -> None:
        pass

    program = typer.Typer()
    program.command()(wide)
    command = typer.main.get_command(program)
    command.help = "a" * 70
    assert "a" * 70 in help_text(command, "wide", 60)


@pytest.mark.parametrize("path", COMMANDS)
def test_help_has_two_examples_and_all_exit_statuses(path: str) -> None:
    text = help_text(COMMANDS[path], path, 100)
    examples = text.partition("Examples:\n")[2].partition("\n\n")[0].replace(" \\\n     ", "")
    assert tuple(line.strip() for line in examples.splitlines()) == EXAMPLES[path]
    statuses = text.partition("Exit status:\n")[2]
    for status in exit_statuses(path):
        assert f"  {status} " in statuses


def test_statuses_are_those_that_the_program_returns() -> None:
    assert list(EXIT_STATUSES) == [0, 1, 2, 130, 143]
    assert "SIGTERM" in exit_statuses("detrkit serve")[0]
    assert 143 not in exit_statuses("detrkit demo")


@pytest.mark.parametrize("example", [e for examples in EXAMPLES.values() for e in examples])
def test_examples_have_options_that_exist(example: str) -> None:
    words = shlex.split(example.rpartition("| ")[2])
    assert words.pop(0) == "detrkit"
    command, path = COMMANDS["detrkit"], "detrkit"
    while f"{path} {words[0]}" in COMMANDS:
        path = f"{path} {words.pop(0)}"
        command = COMMANDS[path]
        if not words:
            break
    if "--log-format" in words:  # taken out before the command is read
        start = words.index("--log-format")
        del words[start : start + 2]
    context = command.make_context(path, words)
    assert context.params


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_is_in_a_group(path: str) -> None:
    known = {"--debug", "-h, --help", "--version", "--log-format text|json"}
    known |= {"--install-completion", "--show-completion"}
    assert {names for names, _ in grouped(COMMANDS[path])[GENERAL]} <= known


def test_values_and_limits_are_those_of_the_annotations() -> None:
    entries = dict(entry for group in grouped(COMMANDS["detrkit detect"]).values() for entry in group)
    assert "[0 to 1] [default: as chosen for the model, or 0.5]" in entries["-t, --threshold NUMBER"]
    assert entries["--batch-size N"].endswith("[default: 1]")
    assert entries["--frames first|all"].endswith("[default: first]")
    assert "--save-dir PATH" in entries
    assert "--track" in entries
    assert entries["--exif-orientation, --no-exif-orientation"].endswith("[default: --no-exif-orientation]")
    assert entries["IMAGES..."].endswith("[required]")


def test_a_group_of_commands_alone_prints_its_help(detrkit_here: Run) -> None:
    done = detrkit_here("data")
    assert done.returncode == 0
    assert "detrkit data check dataset/data.yaml" in done.stdout
    assert done.stderr == ""


def test_help_is_printed_without_rich() -> None:
    source = inspect.getsource(inspect.getmodule(help_text))  # type: ignore[arg-type]
    assert "import rich" not in source
    assert "from rich" not in source


COMPLETION = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def test_install_completion_writes_what_the_shell_reads(detrkit: Run, tmp_path: Path) -> None:
    done = detrkit("--install-completion", "bash", environment={"HOME": str(tmp_path), **COMPLETION})
    assert done.returncode == 0, done.stderr
    scripts = [
        path for path in tmp_path.rglob("*") if path.is_file() and "_DETRKIT_COMPLETE" in path.read_text()
    ]
    assert scripts
    assert str(scripts[0]) in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("line", "expected"),
    [("detrkit det", "detect"), ("detrkit detect --thr", "--threshold"), ("detrkit data s", "split")],
)
def test_completion_completes_commands_and_options(detrkit: Run, line: str, expected: str) -> None:
    environment = {
        "_DETRKIT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    done = detrkit(environment=environment)
    assert expected in done.stdout.split(), done.stderr
