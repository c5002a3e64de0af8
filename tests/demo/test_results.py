from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detrkit import Detector
from detrkit.cli import run
from detrkit.demo import results
from detrkit.demo.results import Result, ResultStore, read_upload
from detrkit.errors import DetrkitError, ImageError, SettingError
from detrkit.inference.running import ModelRunner
from tests.conftest import make_picture, read_json


@pytest.fixture(scope="module")
def segmenter(tiny_panoptic: Path) -> Detector:
    return Detector.from_pretrained(tiny_panoptic, device="cpu")


@pytest.fixture
def result(segmenter: Detector, pictures: list[Path]) -> Result:
    return Result.of(str(pictures[0]), "wide.jpg", segmenter, "tiny")


def test_the_documents_are_those_of_the_command_line(
    result: Result, tiny_panoptic: Path, pictures: list[Path], tmp_path: Path
) -> None:
    options = ["--model", str(tiny_panoptic), "--device", "cpu", "--threshold", "0.3"]
    found = tmp_path / "found.json"
    assert run(["detect", str(pictures[0]), *options, "--json", str(found)]) == 0
    document = result.boxes(0.3).document
    wanted = read_json(found)
    assert len(document["annotations"]) >= 2
    assert {key: document[key] for key in ("images", "categories")} == {
        key: wanted[key] for key in ("images", "categories")
    }
    for ours, theirs in zip(document["annotations"], wanted["annotations"], strict=True):
        assert ours["category_id"] == theirs["category_id"]
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=1e-2)

    assert run(["segment", str(pictures[0]), *options, "--save-dir", str(tmp_path / "segments")]) == 0
    wanted = read_json(tmp_path / "segments" / "panoptic.json")
    for image in wanted["images"]:
        del image["drawing"]
    document = result.segments(0.3).document
    assert document.keys() == wanted.keys()
    assert {key: document[key] for key in ("images", "categories")} == {
        key: wanted[key] for key in ("images", "categories")
    }
    ours, theirs = document["annotations"][0], wanted["annotations"][0]
    assert ours["file_name"] == theirs["file_name"]
    assert [s["category_id"] for s in ours["segments_info"]] == [
        s["category_id"] for s in theirs["segments_info"]
    ]


def test_pictures_have_the_images_size_and_show_what_was_found(result: Result) -> None:
    plain = np.asarray(read_upload(result.path, result.name))
    for view in (result.boxes(0.3), result.segments(0.3)):
        assert view.drawing.size == (120, 80)
        assert (np.asarray(view.drawing) != plain).any()
    assert (np.asarray(result.boxes(1.0).drawing) == plain).all()


def test_a_higher_threshold_shows_fewer_without_running_the_model(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "outputs", None)
    counts = [len(result.boxes(threshold).document["annotations"]) for threshold in (0.1, 0.5, 0.9)]
    assert counts[0] > counts[1] > 0
    rows = [result.boxes(threshold).details.count('<th scope="row">') for threshold in (0.1, 0.5, 0.9)]
    assert rows == counts
    assert "Lower the threshold" in result.boxes(1.0).details
    assert "Lower the threshold" in result.segments(1.0).details


def test_names_of_classes_cannot_change_the_page(result: Result) -> None:
    names, kept = result.detector.names, dict(result.detector.names)
    names.update(dict.fromkeys(names, "<script>alert(1)</script>"))
    try:
        details = result.boxes(0.1).details + result.segments(0.3).details
    finally:
        names.update(kept)
    assert "<script>" not in details
    assert "&lt;script&gt;" in details


def test_attention_is_asked_for_once_and_drawn_for_the_chosen_objects(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.look_inside()
    monkeypatch.setattr(ModelRunner, "outputs", None)
    result.look_inside()
    objects = result.attending(0.3)
    assert len(objects) == len(result.boxes(0.3).document["annotations"]) >= 2
    assert objects[0].startswith("1: ")
    together, alone = result.attention_of(range(len(objects))), result.attention_of([1])
    assert together.drawing.size == alone.drawing.size == (120, 80)
    assert (np.asarray(together.drawing) != np.asarray(alone.drawing)).any()
    assert alone.details.count("<li>") == 1
    assert alone.document is None
    first = result.attention_of(range(min(len(objects), 8)))
    assert (np.asarray(result.attention_together(0.3).drawing) == np.asarray(first.drawing)).all()
    with pytest.raises(SettingError, match="lower the threshold"):
        result.attention_together(1.0)


def test_a_photo_is_turned_as_its_browser_shows_it(segmenter: Detector, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(120, 80).save(tmp_path / "turned.jpg", exif=exif)
    view = Result.of(str(tmp_path / "turned.jpg"), "turned.jpg", segmenter, "tiny").boxes(0.3)
    assert view.drawing.size == (80, 120)
    assert (view.document["images"][0]["width"], view.document["images"][0]["height"]) == (80, 120)


def test_what_is_wrong_with_an_image_is_told_by_the_visitors_name_for_it(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "text.jpg").write_text("no image")
    (folder / "half.jpg").write_bytes(pictures[0].read_bytes()[:700])
    (folder / "empty.jpg").touch()
    make_picture(121, 80).save(folder / "large.png")
    monkeypatch.setattr(results, "MAX_PIXELS", 120 * 80)
    cases = {
        "text.jpg": "not an image",
        "half.jpg": "damaged",
        "empty.jpg": "empty",
        "gone.jpg": "no such file",
        "large.png": "shrink the image",
    }
    for name, said in cases.items():
        with pytest.raises(ImageError, match=said) as caught:
            read_upload(str(folder / name), name)
        assert str(caught.value).startswith(f"{name}: ")
        assert "secret" not in str(caught.value)


def test_the_store_keeps_the_latest_results_under_names_nobody_can_guess(result: Result) -> None:
    store = ResultStore(capacity=2)
    first, second = store.put(result), store.put(result)
    store.get(first)
    third = store.put(result)  # the second goes
    assert len({first, second, third}) == 3
    assert len(first) >= 20
    assert len(store) == 2
    with pytest.raises(DetrkitError, match="choose it again"):
        store.get(second)
    store.discard(first)
    store.discard(None)
    assert len(store) == 1


def test_the_store_lets_go_of_models_that_are_not_to_be_kept(result: Result) -> None:
    store = ResultStore()
    kept, gone = store.put(result), store.put(dataclasses.replace(result, model="other"))
    store.retain({"tiny"}.__contains__)
    assert store.get(kept) is result
    with pytest.raises(DetrkitError, match="choose it again"):
        store.get(gone)
