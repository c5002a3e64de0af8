"""Commands that are disturbed at random moments, and what they leave behind.

``python -m tools.kills --kills 100 --full-disks 50 --pairs 20`` disturbs them that often, spread over the
commands: by SIGINT, SIGTERM and SIGKILL, by a disk without space, and by a second process that writes the
same output while one of the two is killed. After each, no file may be half-written under its final name, the
inputs must be what they were, and what ended by itself may leave no temporary files. Where a command can be
resumed, it is, until it is through; the results must then be those of a run that nothing disturbed, in a
fresh interpreter. The others begin in one that has imported what they need (``tools/prepared.py``). A disk
without space is a small file system in memory; where none can be mounted, a limit on the size of a file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from detrkit.common.files import content_hash
from tools.killed_jobs import Job, check_settled, jobs
from tools.prepared import Command, Prepared, heed_interrupts

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
_SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
_PAGE = 4096


def contents(folder: Path) -> dict[str, bytes]:
    """The files under final names; what begins with a dot was being written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if "/." not in f"/{name}"}


def _temporary(folder: Path) -> set[Path]:
    """The files and folders that were being written."""
    return set(folder.rglob(".*"))


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed.

    Attributes:
        files: What it wrote, by name.
        begin: Seconds after which it began to write, or a little less.
        duration: Seconds that it took.
    """

    files: dict[str, bytes]
    begin: float
    duration: float

    @classmethod
    def of(cls, job: Job, folder: Path, prepared: Prepared) -> Whole:
        """Runs a command in a fresh interpreter for its files, and in a prepared one for its times."""
        fresh, again = folder / "fresh", folder / "prepared"
        fresh.mkdir(parents=True)
        again.mkdir()
        alone = subprocess.run(
            [sys.executable, "-m", "detrkit", *map(str, job.arguments(fresh))],
            env={**os.environ, **ENVIRONMENT},
            capture_output=True,
            text=True,
            preexec_fn=heed_interrupts,
        )
        _check_end(job, alone.returncode, alone.stderr)
        command, first_change = prepared.start(job.arguments(again)), None
        while command.wait(command.seconds + 0.01) is None:
            if first_change is None and any(again.rglob("*")):
                first_change = command.seconds
        duration, wanted = command.seconds, contents(fresh)
        _check_end(job, command.end(), command.messages)
        assert job.compared(contents(again)) == job.compared(wanted), "two undisturbed runs differ"
        # Before it writes anything a command cannot leave anything; most kills are to fall later.
        return cls(wanted, 0.8 * (first_change or duration), duration)


@dataclass
class Disturber:
    """Disturbs a command and looks at what it leaves.

    Attributes:
        job: The command.
        whole: What it gives undisturbed.
        work: Folder for its outputs.
        prepared: Where it is started; a second one for a second process.
        choose: Chooses moments.
        say: Takes a line about each disturbance.
        check_inputs: Raises an AssertionError if an input is not what it was.
    """

    job: Job
    whole: Whole
    work: Path
    prepared: tuple[Prepared, Prepared]
    choose: random.Random
    say: Callable[[str], None]
    check_inputs: Callable[[], None] = lambda: None

    def kills(self, times: int) -> Counter[str]:
        """Kills the command so many times; gives how the kills fell.

        Raises:
            AssertionError: A kill left something it must not leave, or the end is not that of an undisturbed
                run.
        """
        job, tally = self.job, Counter[str]()
        out, done, resumed = self._folder(), set[str](), False
        begin, duration = self.whole.begin / self.whole.duration, self.whole.duration
        while tally["killed"] < times:
            before = _temporary(out)
            command = self._start(out, resume=resumed)
            moment = self.choose.uniform(begin, 1.02) * duration
            kind = None if command.wait(moment) is not None else self.choose.choice(_SIGNALS)
            taken = command.seconds
            ended = command.end(kind) == job.status or kind is None
            found = self._look(out, command, None if ended else kind, before)
            if ended or kind is None:
                _check_end(job, command.status, command.messages)
                assert job.compared(found) == job.compared(self.whole.files)
                tally["finished"] += 1
                if kind is None and not resumed:  # the machine may have become less busy
                    duration = taken
                shutil.rmtree(out)
                out, done, resumed = self._folder(), set(), False
                continue
            tally.update(["killed", kind.name, *(["while resumed"] if resumed else [])])
            earlier, done = done, job.progress(found)
            assert done >= earlier, "finished work was lost"
            tally["with files"] += bool(found)
            if job.resume is None and self.choose.random() < 0.5:
                shutil.rmtree(out)
                out.mkdir()
            resumed = job.resume is not None and any(out.iterdir())
            self.say(f"{tally['killed']} of {times}, {kind.name} after {moment:.1f} s: {len(found)} files")
        if times:
            self._go_through(out, resume=resumed)
        return tally

    def full_disks(self, times: int) -> Counter[str]:
        """Runs the command so many times with less space than its files take, then again with enough.

        Raises:
            AssertionError: As for :meth:`kills`, or the command did not end with one clear line.
        """
        job, tally = self.job, Counter[str]()
        total = sum(-(-len(data) // _PAGE) for data in self.whole.files.values())
        for number in range(times):
            out = self._folder()
            pages = self.choose.randint(1, max(1, total - 1))
            with _small_disk(out, pages * _PAGE) as (limit, enlarge):
                command = self._start(out, resume=False, largest_file=limit)
                full = command.end() != job.status
                tally["full" if full else "enough"] += 1
                if full:
                    last = command.messages.strip().splitlines()[-1]
                    assert command.status == 2, (command.status, command.messages)
                    assert any(word in last for word in ("No space left", "File too large", "disk")), last
                found = self._look(out, command, None, set())
                tally["with files"] += bool(full and found)
                enlarge()
                self._go_through(out, resume=bool(full and job.resume is not None and any(out.iterdir())))
            shutil.rmtree(out)
            self.say(f"{number + 1} of {times} with {pages * _PAGE} bytes: {len(found)} files")
        return tally

    def pairs(self, times: int) -> Counter[str]:
        """Starts a second process on the output of a first one, and kills one of them.

        Raises:
            AssertionError: As for :meth:`kills`, or the one that was refused did not say so in one line.
        """
        tally = Counter[str]()
        for number in range(times):
            out = self._folder()
            first = self._start(out, resume=False)
            first.wait(self.choose.uniform(0.5 * self.whole.begin, self.whole.duration))
            resume = self.job.resume is not None and any(out.iterdir())
            second = self._start(out, resume=resume, prepared=1)
            second.wait(self.choose.uniform(0, self.whole.duration))
            pair = {"first": first, "second": second}
            victim = self.choose.choice(list(pair))
            tally[f"{victim} killed"] += pair[victim].end(signal.SIGKILL) == -signal.SIGKILL
            for name, command in pair.items():
                status = command.end()
                assert status in (self.job.status, 2, -signal.SIGKILL), (status, command.messages)
                if status == 2:
                    last = command.messages.strip().splitlines()[-1]
                    assert "another process is writing" in last or "--resume" in last, last
                    tally[f"{name} refused"] += 1
                self._look(out, command, None, _temporary(out))
            self._go_through(out, resume=self.job.resume is not None and any(out.iterdir()))
            shutil.rmtree(out)
            self.say(f"{number + 1} of {times} pairs: {[command.status for command in pair.values()]}")
        return tally

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(prefix="out ", dir=self.work))

    def _start(
        self, out: Path, *, resume: bool, largest_file: int | None = None, prepared: int = 0
    ) -> Command:
        arguments = [*self.job.arguments(out), *((self.job.resume or []) if resume else [])]
        return self.prepared[prepared].start(arguments, largest_file)

    def _look(
        self, out: Path, command: Command, kind: signal.Signals | None, before: set[Path]
    ) -> dict[str, bytes]:
        """What an unfinished run left under final names, after checking it."""
        assert "Traceback" not in command.messages, command.messages
        self.check_inputs()
        found = contents(out)
        check_settled(self.job, found, self.whole.files)
        if kind in (signal.SIGINT, signal.SIGTERM):
            # At the very end, all being written, a signal ends the process at once.
            assert command.status in (128 + kind, -kind), (kind, command.status, command.messages)
            assert command.status < 0 or "Interrupted" in command.messages, command.messages
        if command.status != -signal.SIGKILL:
            assert _temporary(out) <= before, _temporary(out) - before
        return found

    def _go_through(self, out: Path, *, resume: bool) -> None:
        command = self._start(out, resume=resume)
        _check_end(self.job, command.end(), command.messages)
        assert self.job.compared(contents(out)) == self.job.compared(self.whole.files)


def _check_end(job: Job, status: int, messages: str) -> None:
    assert status == job.status, (status, messages)
    assert "Traceback" not in messages, messages
    assert all(text in messages for text in job.says), messages


@contextlib.contextmanager
def _small_disk(folder: Path, size: int) -> Iterator[tuple[int | None, Callable[[], None]]]:
    """A file system of a size in a folder: a limit on files if there can be none, and what makes it large."""
    options = f"size={size + 8 * _PAGE}"  # folders take space too
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        yield size, lambda: None
        return
    try:
        yield None, lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True) and None
    finally:
        subprocess.run(["umount", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="In all, shared by the commands.")
    parser.add_argument("--full-disks", type=int, default=0, help="In all, shared by the commands.")
    parser.add_argument("--pairs", type=int, default=0, help="Two writers, in all, shared by the commands.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", help="Some of the commands; all by default.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="detrkit-kills-") as work, contextlib.ExitStack() as ending:
        known = jobs(Path(work))
        names, findings = args.commands or list(known), 0
        inputs = _hashes(Path(work))

        def check_inputs() -> None:
            assert _hashes(Path(work), inputs) == inputs, "an input has changed"

        prepared = [ending.enter_context(contextlib.closing(Prepared(ENVIRONMENT))) for _ in range(2)]
        for number, name in enumerate(names):
            place = Path(work) / name
            started = time.monotonic()
            whole = Whole.of(known[name], place, prepared[0])
            disturber = Disturber(
                known[name],
                whole,
                place,
                (prepared[0], prepared[1]),
                random.Random(f"{args.seed} {name}"),
                lambda line, name=name: print(f"{name}: {line}", file=sys.stderr, flush=True),
                check_inputs,
            )
            for kind, disturb, total in (
                ("killed", disturber.kills, args.kills),
                ("full disks", disturber.full_disks, args.full_disks),
                ("two writers", disturber.pairs, args.pairs),
            ):
                try:
                    tally = disturb(total // len(names) + (number < total % len(names)))
                    print(f"{name}, {kind}: {dict(tally)}", flush=True)
                except AssertionError:
                    findings += 1
                    print(f"{name}, {kind}: FINDING", flush=True)
                    traceback.print_exc()
            print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
            shutil.rmtree(place)
    sys.exit(min(findings, 1))


def _hashes(work: Path, names: Iterable[Path] | None = None) -> dict[Path, str | None]:
    """The files below a folder, or these, with what is the same while they are."""
    paths = [path for path in work.rglob("*") if path.is_file()] if names is None else list(names)
    return {path: content_hash(path) if path.is_file() else None for path in paths}


if __name__ == "__main__":
    main()
