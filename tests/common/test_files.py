"""Writes appear whole or not at all."""

import gc
import itertools
import os
import sys
import threading

import pytest

from detrkit.common import files
from detrkit.common.files import atomic_file, atomic_folder, check_writable
from detrkit.errors import DetrkitError


def leftovers(folder) -> list[str]:
    return [p.name for p in folder.glob(".*")]


def interrupt_after(write, text: str) -> None:
    write(text)
    raise KeyboardInterrupt


def test_a_file_appears_when_the_block_succeeds_and_not_before(tmp_path):
    target = tmp_path / "new" / "out.json"
    with atomic_file(target) as temporary:
        temporary.write_text("42")
        assert not target.exists()
        assert temporary.suffix == ".json"
    assert target.read_text() == "42"
    assert leftovers(target.parent) == []


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as temporary:
        interrupt_after(temporary.write_text, "half")
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == []


class InterruptAtLine:
    """Interrupts at the so-manieth line that runs in a module."""

    def __init__(self, module, number: int) -> None:
        self.file, self.left = module.__file__, number

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename != self.file:
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("name", ["out.json", "folder"])
def test_an_interrupt_at_any_line_leaves_nothing_temporary(tmp_path, name):
    before = sys.gettrace()
    for number in itertools.count():
        target = tmp_path / str(number) / name
        interrupt = InterruptAtLine(files, number)
        try:
            sys.settrace(interrupt)
            with atomic_folder(target) if name == "folder" else atomic_file(target) as temporary:
                sys.settrace(before)
                (temporary / "a" if name == "folder" else temporary).write_text("whole")
                sys.settrace(interrupt)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        gc.collect()
        assert leftovers(tmp_path / str(number)) == []
        if interrupt.left >= 0:
            break
    assert number > 5
    assert target.exists()


def test_files_have_the_mode_that_open_gives(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_file(tmp_path / "ours") as temporary:
        temporary.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    with atomic_file(pipe) as temporary:
        temporary.write_text("through")
    reader.join()
    assert got == ["through"]
    assert pipe.is_fifo()


def test_what_is_in_the_way_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DetrkitError, match="folder"), atomic_file(tmp_path / "folder") as temporary:
        temporary.write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(DetrkitError, match="it is a file"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(DetrkitError, match="cannot write"), atomic_file(tmp_path / "file" / "below"):
        pass


def test_a_folder_appears_whole(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:
        interrupt_after((temporary / "config.json").write_text, "{}")
    assert not target.exists()
    with atomic_folder(target) as temporary:
        (temporary / "config.json").write_text("{}")
    assert (target / "config.json").read_text() == "{}"
    assert leftovers(tmp_path) == []


def test_other_files_of_an_existing_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with atomic_folder(tmp_path) as temporary:
        (temporary / "config.json").write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_place_to_write_into_is_checked_and_left_as_it_was(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(DetrkitError, match=r"file/inside .*Not a directory.*choose another place"):
        check_writable(tmp_path / "file" / "inside")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no /dev/fd")
def test_a_pipe_that_has_no_name_is_written_to():
    read, write = os.pipe()
    try:
        with atomic_file(f"/dev/fd/{write}") as temporary:
            temporary.write_text("42")
        assert os.read(read, 100) == b"42"
    finally:
        os.close(read)
        os.close(write)


def test_a_folder_in_an_atomic_folder_is_moved_into_the_one_that_is_there(tmp_path):
    target = tmp_path / "folder"
    (target / "inner").mkdir(parents=True)
    for name in ("kept", "replaced"):
        (target / "inner" / name).write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "inner").mkdir()
        for name in ("replaced", "new"):
            (temporary / "inner" / name).write_text("new")
    found = {path.name: path.read_text() for path in (target / "inner").iterdir()}
    assert found == {"kept": "old", "replaced": "new", "new": "new"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".folder-")]
