from __future__ import annotations

from pathlib import Path

import pytest

from detrkit.errors import DetrkitError
from detrkit.results.journal import Journal

SETTINGS = {"model": "m", "threshold": 0.5}


def contents(journal: Journal) -> list[dict]:
    return [entry for _, entry in journal.entries()]


def test_entries_are_read_back_in_their_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "new" / "j.jsonl", SETTINGS)
    assert contents(journal) == []
    journal.start([{"a": 0}])
    journal.add({"a": 1})
    journal.add({"a": "\n"})
    assert contents(Journal(journal.path, SETTINGS)) == [{"a": 0}, {"a": 1}, {"a": "\n"}]


def test_a_line_that_was_cut_off_is_no_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start()
    for i in range(3):
        journal.add({"a": i})
    whole = journal.path.read_bytes()
    last = whole.rindex(b"{")
    for end in range(last, len(whole)):
        journal.path.write_bytes(whole[:end])
        assert contents(journal) == [{"a": 0}, {"a": 1}]


def test_what_was_cut_off_does_not_spoil_the_next_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start([{"a": 0}])
    with journal.path.open("ab") as file:
        file.write(b'{"a": 1')
    later = Journal(journal.path, SETTINGS)
    assert contents(later) == [{"a": 0}]
    later.add({"a": 2})
    assert contents(later) == [{"a": 0}, {"a": 2}]


def test_entries_are_found_by_their_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    places = [*journal.start([{"a": "é"}, {"a": "\n"}]), journal.add({"a": 2}), journal.add({"a": 3})]
    assert [journal.at(place) for place in places] == contents(journal)
    assert [place for place, _ in journal.entries()] == places


def test_other_settings_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start()
    with pytest.raises(DetrkitError, match=r"made with threshold 0\.5, not 0\.7"):
        contents(Journal(journal.path, {**SETTINGS, "threshold": 0.7}))


def test_starting_forgets_and_removing_deletes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start([{"a": 0}])
    journal.start()
    assert contents(journal) == []
    journal.remove()
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(DetrkitError, match="cannot read"):
        contents(Journal(tmp_path, SETTINGS))
    with pytest.raises(DetrkitError, match="cannot write"):
        Journal(tmp_path, SETTINGS).start()
