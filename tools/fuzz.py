"""Coverage-guided fuzzing with atheris (``pip install atheris``), of one target or several in turn::

    python -m tools.fuzz image journal --runs 300000 --corpus /tmp/corpus

Stops at the first finding and writes its bytes into ``findings`` in the corpus folder. With
``--keep-going`` a finding is only counted, by its error and place, and one example of each is kept.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import logging
import os
import sys
import time
import traceback
from pathlib import Path

import atheris

OBSERVED = ["detrkit", "PIL"]

with atheris.instrument_imports(include=OBSERVED):
    from tests.fuzz.targets import TARGETS, Target

_started = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="+", choices=sorted(TARGETS))
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    *others, name = args.targets
    for other in others:  # atheris ends the process, so that each needs one
        if not os.fork():
            name = other
            break
        os.wait()
    target, corpus = TARGETS[name], args.corpus / name
    logging.getLogger("detrkit").setLevel(logging.CRITICAL)  # findings are what is raised, not what is said
    with atheris.instrument_imports(include=OBSERVED):  # what is imported only when it is needed
        for seed in target.seeds():
            target(seed)

    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
    findings = args.corpus / "findings"
    findings.mkdir(exist_ok=True)

    run = _Counting(name, target, findings, args.keep_going, args.runs)
    options = [f"-runs={args.runs}", f"-max_len={target.longest}", "-timeout=30", "-rss_limit_mb=6000"]
    options += [
        f"-artifact_prefix={findings}/{name}-",
        "-print_final_stats=1",
        f"-seed={args.seed or 1}",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run, internal_libfuzzer=True)
    atheris.Fuzz()


class _Counting:
    """Runs a target and keeps an example of each kind of finding."""

    def __init__(self, name: str, target: Target, folder: Path, keep_going: bool, runs: int) -> None:
        self.name, self.target, self.folder, self.keep_going = name, target, folder, keep_going
        self.runs, self.done = runs, 0
        self.kinds: collections.Counter[str] = collections.Counter()

    def __call__(self, data: bytes) -> None:
        self.done += 1
        if self.done % 10_000 == 0:
            rate = self.done / (time.monotonic() - _started)
            print(f"{self.name}: {self.done} executions, {rate:.0f}/s, {dict(self.kinds)}", flush=True)
        try:
            self.target(data)
        except Exception as error:
            if not self.keep_going:
                raise
            kind = _kind(error)
            self.kinds[kind] += 1
            if self.kinds[kind] == 1:
                path = self.folder / f"{self.name}-{hashlib.sha1(data).hexdigest()[:12]}"
                path.write_bytes(data)
                print(f"FINDING {kind} {path}", flush=True)
                traceback.print_exc()


def _kind(error: Exception) -> str:
    """What tells findings apart: the error and the last place in detrkit that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if f"{os.sep}detrkit{os.sep}" in frame.filename]
    last = own[-1] if own else frames[-1]
    return f"{type(error).__name__} {Path(last.filename).name}:{last.name}:{last.lineno}"


if __name__ == "__main__":
    main()
