from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from detrkit.errors import DetrkitError
from detrkit.results.journal import Journal, match_results, position_by_name

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


@pytest.mark.parametrize(
    "change",
    [
        lambda line: b"no json\n",
        lambda line: b"{}\n",
        lambda line: b"[" * 100_000 + b"\n",
        lambda line: line.replace(b"0.25", b"0.75"),
        lambda line: line[:-3] + b"\n",
        lambda line: b"\0" * 50 + b"\n",
        lambda line: b"\n",
    ],
)
def test_a_damaged_line_is_refused_by_its_number(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    journal = Journal(tmp_path / "j.jsonl", SETTINGS)
    journal.start([{"score": 0.5}, {"score": 0.25}, {"score": 0.125}])
    lines = journal.path.read_bytes().splitlines(keepends=True)
    lines[2] = change(lines[2])
    journal.path.write_bytes(b"".join(lines))
    with pytest.raises(DetrkitError, match=r"line 3 of .*j\.jsonl is damaged"):
        contents(Journal(journal.path, SETTINGS))


def test_what_a_line_holds_must_be_an_entry(tmp_path: Path) -> None:
    Journal(tmp_path / "j.jsonl", SETTINGS).start([{"a": 0}, {"b": 0}])
    with pytest.raises(DetrkitError, match="line 3"):
        contents(Journal(tmp_path / "j.jsonl", SETTINGS, lambda entry: "a" in entry))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_two_cannot_have_a_journal_at_once(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / "j.jsonl", SETTINGS) for _ in range(2))
    first.start([{"a": 0}])
    first.add({"a": 1})
    for begin in (second.hold, second.start):
        with pytest.raises(DetrkitError, match="another process is writing"):
            begin()
    assert len(contents(first)) == 2
    first.close()
    second.start()
    assert contents(second) == []


def test_a_later_day_and_another_name_of_the_model_make_no_difference(tmp_path: Path) -> None:
    Journal(tmp_path / "j.jsonl", {**SETTINGS, "date": "2026-01-01", "weights": "a"}).start()
    later = Journal(tmp_path / "j.jsonl", {**SETTINGS, "date": "2026-01-02", "model": "n", "weights": "a"})
    assert contents(later) == []
    assert later.settings["date"] == "2026-01-01"
    with pytest.raises(DetrkitError, match="made with weights a of model m, not b"):
        contents(Journal(tmp_path / "j.jsonl", {**SETTINGS, "weights": "b"}))


def test_results_belong_to_images_of_the_same_name_and_content() -> None:
    def earlier(name: str, content: str | None) -> tuple[dict, str]:
        return {"image": {"file_name": name}, "fingerprint": content}, f"{name} {content}"

    found, others = match_results(
        [earlier("a", "1"), earlier("b", "old"), earlier("c", None), earlier("d", "4"), earlier("b", "2")],
        position_by_name(["a", "b", "c"]),
        ["1", "2", None].__getitem__,
    )
    assert found == {0: "a 1", 1: "b 2"}
    assert others == ["b old", "c None", "d 4"]


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
