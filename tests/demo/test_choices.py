from __future__ import annotations

from pathlib import Path

import pytest

from detrkit.checkpoints.registry import BUNDLED, REGISTRY
from detrkit.demo.choices import ModelChoices
from detrkit.errors import CheckpointError, DetrkitError, SettingError


class Loader:
    """Notes what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def __call__(self, model: str) -> object:
        self.loaded.append(model)
        return object()


def test_given_models_come_first_then_bundled_ones_then_those_that_need_no_conversion(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    choices = ModelChoices([str(tmp_path / "mine"), "detr-resnet-101", "someone/model"])
    first = ["mine", "detr-resnet-101", "someone/model", *BUNDLED]
    assert choices.labels[: len(first)] == first
    assert len(set(choices.labels)) == len(choices.labels)
    assert set(choices.labels[len(first) :]) == {
        name for name, entry in REGISTRY.items() if entry.hub_id is not None and name not in first
    }
    assert ModelChoices().labels[0] == next(iter([*BUNDLED, *REGISTRY]))


def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / name / "best" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    loader = Loader()
    choices = ModelChoices([*map(str, folders), str(folders[0])], load=loader)
    assert choices.labels[:3] == ["best", "best (2)", choices.labels[2]]
    assert "best (3)" not in choices.labels
    choices.get("best (2)")
    choices.get("best")
    assert loader.loaded == [str(folders[1]), str(folders[0])]


def test_a_misspelt_name_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'detr-resnet-50"):
        ModelChoices(["detr-resnet-5O"])


def test_models_are_loaded_once_when_used_and_the_one_unused_for_longest_makes_room() -> None:
    loader = Loader()
    choices = ModelChoices(["a/a", "b/b", "c/c"], capacity=2, load=loader)
    assert loader.loaded == []
    first = choices.get("a/a")
    choices.get("b/b")
    assert choices.get("a/a") is first
    choices.get("c/c")  # b/b goes
    assert [choices.is_loaded(label) for label in ("a/a", "b/b", "c/c")] == [True, False, True]
    assert loader.loaded == ["a/a", "b/b", "c/c"]


def test_a_model_that_is_not_offered_is_refused() -> None:
    with pytest.raises(SettingError, match="unknown model '/etc'"):
        ModelChoices().get("/etc")
    with pytest.raises(SettingError, match="at least 1"):
        ModelChoices(capacity=0)


def test_a_relative_folder_is_the_folder_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "secret" / "mine"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    choices = ModelChoices([".", str(folder)])
    assert choices.labels[0] == "mine"
    assert "mine (2)" not in choices.labels
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetrkitError) as caught:
        choices.get("mine")
    assert str(caught.value).startswith("mine ")
    assert "config.json" in str(caught.value)


def test_an_error_does_not_tell_where_a_model_lies(tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "mine"
    folder.mkdir(parents=True)
    with pytest.raises(DetrkitError) as caught:
        ModelChoices([str(folder)]).get("mine")
    assert "mine" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_number_of_queries_is_for_the_models_that_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detrkit import Detector

    asked: list[object] = []
    monkeypatch.setattr(Detector, "from_pretrained", lambda model, queries: asked.append(queries))
    choices = ModelChoices([str(tmp_path)], queries=30)
    for label in choices.labels[:2]:
        choices.get(label)
    assert asked == [30, None]
    with pytest.raises(SettingError, match="--queries requires --model"):
        ModelChoices(queries=30)
