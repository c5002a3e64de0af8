"""Processes that take turns (A B A B ...), so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from detrkit.benchmark.sides import STAGES, Settings
from detrkit.common.progress import with_progress

ALLOCATORS: dict[str, dict[str, str]] = {
    # As a user starts it: detrkit's Detector sets the allocator of its process, the others have the default.
    "as is": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"},
}


@dataclass
class Times:
    """What was measured of one side.

    Attributes:
        name: The side.
        seconds: Stage -> seconds of each run.
        checksums: Stage -> the number that its last run gave.
        megabytes: The most memory held, in 10^6 bytes.
        failure: Why there are no times, or not all.
    """

    name: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    checksums: dict[str, float] = field(default_factory=dict)
    megabytes: float | None = None
    failure: str = ""


class WorkerError(Exception):
    """A process that ended before it answered; says why."""


class Worker:
    """A process that runs one side.

    Args:
        settings: What it runs.
        environment: Variables beside those of this process, from which settings of the allocator are removed.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "detrkit.benchmark.sides", json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**inherited, "OMP_NUM_THREADS": str(settings.threads), **environment},
        )

    def ask(self, what: str) -> dict[str, float]:
        """The answer to a line.

        Raises:
            WorkerError: The process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
            # Libraries may print to stdout too.
            for line in self._process.stdout:
                if line.startswith("{"):
                    answer: dict[str, float] = json.loads(line)
                    return answer
        raise WorkerError(self._failure())

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _failure(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        said = [line.strip() for line in self._errors if line.strip()]
        if status == -9:
            return "killed, probably out of memory"
        return said[-1][:300] if said else f"ended with status {status}"


def in_turns(
    sides: Mapping[str, Settings],
    repeats: int,
    *,
    stages: Sequence[str] = STAGES,
    environment: Mapping[str, str] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Times]:
    """Runs sides in turns, after a first round that warms up and is not counted.

    Args:
        sides: Name -> what it runs. All are in memory at once.
        repeats: Counted rounds of each stage.
        stages: What is run.
        environment: Variables for the processes.
        report: Gets a line for each run; a progress bar shows them when None.

    Returns:
        What was measured of each side, in their order. One that fails leaves the others to go on.
    """
    results = {name: Times(name) for name in sides}
    runs = _run_in_turns(results, sides, repeats, stages, environment or {})
    if report is None:
        runs = with_progress(runs, len(sides) * len(stages) * (repeats + 1), "Measuring")
    for line in runs:
        if report is not None:
            report(line)
    return list(results.values())


def _run_in_turns(
    results: dict[str, Times],
    sides: Mapping[str, Settings],
    repeats: int,
    stages: Sequence[str],
    environment: Mapping[str, str],
) -> Iterator[str]:
    """Fills in the results; tells of each run."""
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        for name, settings in sides.items():
            workers[name] = Worker(settings, environment)
            stack.callback(workers[name].stop)

        def turn(name: str, what: str) -> dict[str, float] | None:
            if results[name].failure:
                return None
            try:
                return workers[name].ask(what)
            except WorkerError as error:
                results[name].failure = str(error)
                return None

        for stage in stages:
            for repeat in range(-1, repeats):
                for name, times in results.items():
                    answer = turn(name, stage)
                    if answer is None:
                        times.seconds.pop(stage, None)
                        yield f"{name}, {stage}: {times.failure}"
                        continue
                    times.checksums[stage] = answer["checksum"]
                    if repeat >= 0:
                        times.seconds.setdefault(stage, []).append(answer["seconds"])
                    count = f"run {repeat + 1} of {repeats}" if repeat >= 0 else "warmed up"
                    yield f"{name}, {stage}, {count}: {answer['seconds']:.3f} s"
        for name, times in results.items():
            answer = turn(name, "memory")
            times.megabytes = None if answer is None else answer["megabytes"]


def disagreement(results: Sequence[Times], tolerance: float = 1e-3) -> dict[str, str]:
    """Sides whose forward pass did not compute the same as that of the first one that made it.

    Returns:
        Name of the side -> what is wrong with it; empty where all agree.
    """
    sums: dict[str, Any] = {r.name: r.checksums["forward"] for r in results if "forward" in r.checksums}
    if not sums:
        return {}
    first, expected = next(iter(sums.items()))
    return {
        name: f"gives different results than {first}"
        for name, value in sums.items()
        if not abs(value - expected) <= tolerance * abs(expected)
    }
