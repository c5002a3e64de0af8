"""What fuzzing starts from and what it once found, through its targets; needs no fuzzer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, Target

FINDINGS = sorted((Path(__file__).parent / "findings").iterdir())


@pytest.mark.parametrize("path", FINDINGS, ids=lambda path: path.name)
def test_what_fuzzing_found_gets_a_clear_message_or_passes(path: Path) -> None:
    TARGETS[path.name.partition("-")[0]](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds():
        TARGETS[name](seed)


def test_only_the_errors_of_bad_input_are_let_pass() -> None:
    def stumble(_: bytes) -> None:
        raise IndexError

    with pytest.raises(IndexError):
        Target(stumble)(b"")
