"""Commands that start at once: a process that has imported what they need forks into each of them.

A fresh interpreter takes seconds to import torch, more than most commands on a few images, and nothing can go
wrong there. ``python -m tools.prepared`` is that process; :class:`Prepared` starts it and talks to it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_IMPORTED = (
    *("torch", "torchvision", "timm", "transformers", "accelerate", "scipy.optimize", "matplotlib.pyplot"),
    *("faster_coco_eval", "onnx", "onnxscript", "torch.onnx"),  # not onnxruntime, which starts a thread
    *("detrkit.cli.detect", "detrkit.cli.segment", "detrkit.cli.convert", "detrkit.cli.evaluate"),
    *("detrkit.cli.train", "detrkit.cli.export", "detrkit.training.run", "detrkit.training.trainer"),
    *("detrkit.inference.detector", "detrkit.evaluation.evaluate", "detrkit.conversion.convert"),
    *("detrkit.engines.export", "detrkit.checkpoints.loading"),
)


class Prepared:
    """Runs one command at a time, each in a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._messages, theirs = os.pipe()
        os.set_blocking(self._messages, False)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tools.prepared"],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            cwd=Path(__file__).parents[1],
            preexec_fn=heed_interrupts,
        )
        os.close(theirs)
        assert self._line() == "ready"

    def start(self, arguments: Sequence[Any], largest_file: int | None = None) -> Command:
        """Starts ``detrkit`` with these arguments, and with a limit on the size of what it writes."""
        request = json.dumps([[str(each) for each in arguments], largest_file])
        self._server.stdin.write(f"{request}\n".encode())
        self._server.stdin.flush()
        return Command(self, int(self._line()))

    def close(self) -> None:
        """Ends the process."""
        self._server.stdin.close()
        self._server.wait()
        os.close(self._messages)

    def _line(self) -> str:
        line = self._server.stdout.readline()
        assert line, f"the prepared process has ended: {self._said().decode(errors='replace')}"
        return line.decode().strip()

    def _ended(self, seconds: float) -> int | None:
        """The status of the command if it ends within this time."""
        readable, _, _ = select.select([self._server.stdout], [], [], seconds)
        return int(self._line()) if readable else None

    def _said(self) -> bytes:
        parts = []
        with contextlib.suppress(BlockingIOError):  # all is read that is there
            while part := os.read(self._messages, 2**16):
                parts.append(part)
        return b"".join(parts)


class Command:
    """A command that was started.

    Attributes:
        status: Its exit status, once it has ended.
        messages: What it said on stderr until then.
    """

    def __init__(self, prepared: Prepared, process: int) -> None:
        self._prepared, self._process, self._begun = prepared, process, time.monotonic()
        self.status: int | None = None
        self.messages = ""

    @property
    def seconds(self) -> float:
        """Time since it was started."""
        return time.monotonic() - self._begun

    def wait(self, until: float) -> int | None:
        """Its status if it ends within so many seconds of its start."""
        while self.status is None and (left := until - self.seconds) > 0:
            self.status = self._prepared._ended(min(left, 0.01))
            self.messages += self._prepared._said().decode(errors="replace")
        return self.status

    def end(self, kind: signal.Signals | None = None) -> int:
        """Its status when it has ended, of itself or by a signal."""
        if kind is not None and self.status is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self._process, kind)
        assert self.wait(1200) is not None, "it does not end"
        return self.status


def heed_interrupts() -> None:
    """Undoes what a shell does to processes in the background."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.SIG_DFL)


def _serve() -> list[str] | None:
    """Forks for each line on stdin; gives a child its arguments, and the parent None when all is done."""
    gc.collect()
    gc.freeze()  # so that collections in a child leave these pages shared
    print("ready", flush=True)
    while line := sys.stdin.readline():
        arguments, largest_file = json.loads(line)
        if child := os.fork():
            print(child, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
            continue
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):
            os.dup2(nothing, number)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        return arguments
    return None


def main() -> None:
    for name in _IMPORTED:
        importlib.import_module(name)
    from detrkit.cli import main as run

    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"  # noqa: PTH208
    arguments = _serve()
    if arguments is not None:
        sys.argv = ["detrkit", *arguments]
        run()


if __name__ == "__main__":
    main()
