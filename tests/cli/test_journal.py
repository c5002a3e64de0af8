from __future__ import annotations

from pathlib import Path

import pytest

from detrkit.cli.journal import Journal
from detrkit.errors import DetrkitError

SETTINGS = {"model": "m", "threshold": 0.5}


def test_entries_are_read_back_in_their_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "j.jsonl", SETTINGS)
    assert journal.read() == []
    journal.start([{"a": 0}])
    journal.add({"a": 1})
    journal.add({"a": "\n"})
    assert Journal(journal.path, SETTINGS).read() == [{"a": 0}, {"a": 1}, {"a": "\n"}]


def test_a_line_that_was_cut_off_is_no_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start()
    for i in range(3):
        journal.add({"a": i})
    whole = journal.path.read_bytes()
    last = whole.rindex(b"{")
    for end in range(last, len(whole)):
        journal.path.write_bytes(whole[:end])
        assert journal.read() == [{"a": 0}, {"a": 1}]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start()
    with pytest.raises(DetrkitError, match=r"made with threshold 0\.5, not 0\.7"):
        Journal(journal.path, {**SETTINGS, "threshold": 0.7}).read()


def test_starting_forgets_and_removing_deletes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start([{"a": 0}])
    journal.start()
    assert journal.read() == []
    journal.remove()
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(DetrkitError, match="cannot read"):
        Journal(tmp_path, SETTINGS).read()
    with pytest.raises(DetrkitError, match="cannot write"):
        Journal(tmp_path, SETTINGS).start()
