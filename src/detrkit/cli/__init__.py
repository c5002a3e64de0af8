"""The command line: ``detrkit COMMAND``, one module a command.

Results go to stdout or to files, messages and progress to stderr. The exit status is 0 after success, 1 if
some of the images could not be used or detrkit itself failed, 2 after a user's mistake, 130 after an
interrupt, 143 after SIGTERM. Commands import torch only when they run, so that help and the list of models
appear at once.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import typer

from detrkit import __version__
from detrkit.cli import (
    benchmark,
    calibrate,
    convert,
    data,
    demo,
    detect,
    evaluate,
    explain,
    export,
    models,
    segment,
    serve,
    train,
)
from detrkit.cli.help import Command, Group, print_help
from detrkit.cli.options import name_ray_address
from detrkit.common.errors import DetrkitError
from detrkit.common.terminal import (
    Terminated,
    interrupt_status,
    libraries_as_they_were,
    log_format,
    log_in_one_line,
    say,
    warnings_in_one_line,
)
from detrkit.common.without_torch import explained, require_torch


class _InterruptedError(BaseException):
    """An interrupt of a command, its cause; of no kind that typer knows."""


class _Program(Group):
    """All commands; typer itself would end one that is interrupted without a word, always with status 130."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """As typer, but for interrupts."""
        try:
            return super().make_context(*args, **options)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error

    def invoke(self, ctx: Any) -> Any:
        """As typer, but for interrupts."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _InterruptedError from error


app = typer.Typer(
    name="detrkit",
    cls=_Program,
    help="Object detection and panoptic segmentation with DETR, Conditional DETR and Deformable DETR.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _with_torch(name: str, command: Callable[..., Any]) -> Callable[..., Any]:
    """A command that says before any work that it needs PyTorch, where that is not installed."""

    @functools.wraps(command)
    def run_command(**options: Any) -> Any:
        require_torch(f"detrkit {name}")
        return command(**options)

    return run_command


for _name, _command in (
    ("detect", detect.detect),
    ("segment", segment.segment),
    ("evaluate", evaluate.evaluate),
    ("calibrate", calibrate.calibrate),
    ("explain", _with_torch("explain", explain.explain)),
    ("train", _with_torch("train", train.train)),
    ("models", models.models),
    ("convert", _with_torch("convert", convert.convert)),
    ("benchmark", _with_torch("benchmark", benchmark.benchmark)),
    ("export", _with_torch("export", export.export)),
    ("demo", demo.demo),
    ("serve", serve.serve),
):
    app.command(_name, cls=Command)(_command)
app.add_typer(data.app, name="data")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"detrkit {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    messages: Annotated[
        Literal["text", "json"],
        typer.Option(
            "--log-format",
            help="Format of the messages on stderr, one per line. Also accepted after the command.",
        ),
    ] = "text",
) -> None:
    print_help(context)


def main() -> None:
    """Runs the command line on ``sys.argv`` and ends the process with its exit status."""
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    status = run(sys.argv[1:])
    # All is written. An interrupt while Python shuts down would only print a traceback.
    for kind, ours in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, _terminate)):
        if signal.getsignal(kind) is ours:
            signal.signal(kind, signal.SIG_DFL)
    sys.exit(status)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def run(arguments: list[str]) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments after the program's name.

    Returns:
        The exit status.
    """
    debug = "--debug" in arguments
    arguments, form = _log_format_first(arguments)
    in_one_line = contextlib.nullcontext() if debug else warnings_in_one_line()
    with _any_file_name(), log_format(form), in_one_line, libraries_as_they_were():
        return _run(name_ray_address(arguments), debug)


@contextlib.contextmanager
def _any_file_name() -> Iterator[None]:
    """Within the block, what the terminal's encoding lacks is escaped; a file name need not be valid."""
    with contextlib.ExitStack() as restored:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                restored.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        yield


def _run(arguments: list[str], debug: bool) -> int:
    try:
        with _interrupts_that_are_not_lost(), log_in_one_line():
            return app(arguments, prog_name="detrkit", standalone_mode=False) or 0
    except (KeyboardInterrupt, _InterruptedError, typer.Abort) as error:
        say("Interrupted. Run the same command again.")
        return interrupt_status(error if isinstance(error, KeyboardInterrupt) else error.__cause__)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, ImportError):
            error = explained(error, "this command") or error
        return _report(error)


def _log_format_first(arguments: list[str]) -> tuple[list[str], str]:
    """The arguments with ``--log-format`` before the command, and its value."""
    for i, argument in enumerate(arguments):
        if argument == "--":
            break
        name, equals, value = argument.partition("=")
        if name == "--log-format" and (equals or i + 1 < len(arguments)):
            end = i + 1 if equals else i + 2
            value = value if equals else arguments[i + 1]
            return [name, value, *arguments[:i], *arguments[end:]], value
    return arguments, "text"


@contextlib.contextmanager
def _interrupts_that_are_not_lost() -> Iterator[None]:
    """Repeats an interrupt that arrives where Python cannot raise, such as in a weak reference's callback.

    Python would print a traceback there and carry on.
    """
    before, of_errors = sys.unraisablehook, sys.excepthook

    def interrupt_after(hook_is_running: _thread.LockType, number: signal.Signals) -> None:
        hook_is_running.acquire()
        _thread.interrupt_main(number)

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        # An interrupt within this hook would be lost like the first one, so another thread waits for its end.
        hook_is_running = _thread.allocate_lock()
        hook_is_running.acquire()
        number = signal.SIGTERM if issubclass(unraisable.exc_type, Terminated) else signal.SIGINT
        _thread.start_new_thread(interrupt_after, (hook_is_running, number))
        hook_is_running.release()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = before, of_errors  # typer sets the latter


# What other programs call an option, by its name here.
_OTHER_NAMES = {
    "--learning-rate": ("--lr", "--lr0"),
    "--backbone-learning-rate": ("--lr-backbone",),
    "--batch-size": ("--batch", "--bs"),
    "--image-size": ("--imgsz", "--img-size"),
    "--weight-decay": ("--wd",),
    "--workers": ("--num-workers",),
    "--output": ("--output-dir", "--project"),
    "--ema-decay": ("--ema",),
    "--clip-norm": ("--clip-max-norm",),
    "--gradient-accumulation": ("--grad-accum", "--accumulate"),
    "--queries": ("--num-queries",),
    "--threshold": ("--conf", "--score-threshold"),
    "--overlap": ("--iou", "--nms"),
    "--model": ("--weights", "--checkpoint"),
}


def _message_of(error: Any) -> str:
    """The message of one of click's errors, with the name here of an option of other programs."""
    unknown = str(getattr(error, "option_name", "")).replace("_", "-")
    command = getattr(getattr(error, "ctx", None), "command", None)
    known = {name for parameter in getattr(command, "params", []) for name in parameter.opts}
    for name, others in _OTHER_NAMES.items():
        if unknown in others and name in known:
            return f"No such option: {unknown}; did you mean {name}?"
    return str(error.format_message())


def _report(error: Exception) -> int:
    """Prints an error on one line of stderr; returns the exit status."""
    # Some versions of typer contain their own copy of click, so its errors are recognised by a method.
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "detrkit"
        say(f"{_message_of(error)} (see {command} --help)", title="Error")
        return 2
    if isinstance(error, DetrkitError):
        say(str(error), title="Error")
        return 2
    say(f"{type(error).__name__}: {error} (run again with --debug for the details)", title="Error")
    return 1
