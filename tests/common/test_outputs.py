"""What a command may write over: its own earlier results, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detrkit.common.locks import hold
from detrkit.common.outputs import (
    DOCUMENT_MARK,
    Output,
    check_outputs,
    document_output,
    image_output,
    unique_names,
)
from detrkit.errors import DetrkitError
from tests.conftest import make_picture


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.json"
    path.write_bytes(DOCUMENT_MARK + b'detect"}}')
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    path = tmp_path / "foreign.json"
    path.write_text('{"info": {"year": 2017}}')
    return path


def refused(outputs: list[Output], inputs: list[Path], message: str, **options: bool) -> None:
    before = [output.path.read_bytes() for output in outputs if output.path.is_file()]
    with pytest.raises(DetrkitError, match=message):
        check_outputs(outputs, inputs, **options)
    assert [output.path.read_bytes() for output in outputs if output.path.is_file()] == before


def test_own_results_empty_files_and_new_names_are_written(own: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"  # such as mktemp makes
    empty.touch()
    paths = [own, empty, tmp_path / "new" / "out.json", Path(os.devnull), Path("-")]
    check_outputs([document_output("--json", path) for path in paths], [])
    assert not (tmp_path / "new").exists()


def test_a_file_that_detrkit_did_not_write_is_kept_unless_asked(foreign: Path) -> None:
    outputs = [document_output("--json", foreign)]
    refused(outputs, [], r"foreign\.json, which detrkit did not write; .*--overwrite")
    check_outputs(outputs, [], overwrite=True)


def test_an_input_is_kept_whatever_is_asked(own: Path, foreign: Path, tmp_path: Path) -> None:
    link, hard = tmp_path / "link.json", tmp_path / "hard.json"
    link.symlink_to(own)
    os.link(own, hard)
    for path in (own, link, hard):
        for named in (own, link, hard):
            refused([document_output("--json", path)], [named], "overwrite the input", overwrite=True)
    refused([document_output("--json", foreign)], [tmp_path], "overwrite the input", overwrite=True)
    check_outputs([document_output("--json", own)], [tmp_path])  # the result of an earlier run


def test_files_without_a_mark_are_known_by_the_one_beside_them(tmp_path: Path) -> None:
    outputs = [
        Output("OUTPUT", tmp_path / name, b"made by us", "README.md") for name in ("a.bin", "README.md")
    ]
    (tmp_path / "a.bin").write_bytes(b"weights")
    refused(outputs, [], "did not write")
    (tmp_path / "README.md").write_bytes(b"made by us")
    check_outputs(outputs, [])
    refused(outputs, [tmp_path / "a.bin"], "overwrite the input", overwrite=True)


def test_one_file_for_two_outputs_is_refused(tmp_path: Path) -> None:
    outputs = [document_output("--json", tmp_path / "a.json"), document_output("--csv", tmp_path / "A.json")]
    refused(outputs, [], "--csv and --json would both write")


def test_a_write_protected_file_is_kept(own: Path) -> None:
    own.chmod(0o444)
    refused([document_output("--json", own)], [], "write-protected")


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg"])
def test_drawings_bear_a_mark_and_photos_do_not(tmp_path: Path, suffix: str) -> None:
    from detrkit.cli.output import save_image

    photo, drawing = tmp_path / f"photo{suffix}", tmp_path / f"drawing{suffix}"
    make_picture(60, 40).save(photo)
    save_image(make_picture(60, 40), drawing)
    check_outputs([image_output("--save-dir", drawing)], [])
    refused([image_output("--save-dir", photo)], [], "did not write")


def test_names_are_unique_where_file_systems_do_not_tell_case_or_accents_apart() -> None:
    assert unique_names(["a.png", "A.png", "a-2.png", "b.png"]) == ["a.png", "A-2.png", "a-2-2.png", "b.png"]
    assert unique_names(["\u00e9.png", "e\u0301.png"]) == ["\u00e9.png", "e\u0301-2.png"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_a_lock_is_held_by_one_until_it_is_closed_and_survives_no_removal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    first = hold(path, Path("out.json"))
    with pytest.raises(DetrkitError, match=r"another process is writing out\.json"):
        hold(path, Path("out.json"))
    path.unlink()
    hold(path, Path("out.json")).close()
    first.close()
    hold(path, Path("out.json")).close()
