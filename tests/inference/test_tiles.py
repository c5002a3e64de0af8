from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detrkit import DetectionConfig, Detections, Detector
from detrkit.checkpoints.loading import load_pretrained
from detrkit.cli import run
from detrkit.engines.export import export_model
from detrkit.errors import SettingError
from detrkit.evaluation import evaluate_detector
from detrkit.inference.tiles import read_tiles, tile_boxes, with_tiles
from tests.conftest import make_picture

SIDE = 80
CHOSEN = {"training_scale": {"image_size": [60, 80], "large_object_side": 24.0}}


@pytest.fixture(scope="module")
def detector(tiny_detr: Path) -> Detector:
    return Detector.from_pretrained(tiny_detr, device="cpu")


@pytest.fixture(scope="module")
def large() -> Image.Image:
    return make_picture(150, 110, seed=3)


def same(a: Detections, b: Detections) -> bool:
    """Whether two results are equal to the last bit."""
    arrays = ("boxes", "scores", "labels")
    equal = all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in arrays)
    masks = (a.masks is None) == (b.masks is None) and (a.masks is None or np.array_equal(a.masks, b.masks))
    return equal and masks and a.names == b.names and (a.image_size, a.source) == (b.image_size, b.source)


sides = st.integers(1, 400)


@given(sides, sides, st.tuples(sides, sides), st.sampled_from([0.0, 0.2, 0.5, 0.9]))
def test_tiles_cover_an_image_and_are_of_one_size_inside_it(
    height: int, width: int, shape: tuple[int, int], overlap: float
) -> None:
    if shape[0] * shape[1] * 400 < height * width:
        return  # tens of thousands
    boxes = np.array(tile_boxes(height, width, shape, overlap))
    covered = np.zeros((height, width), bool)
    for left, top, right, bottom in boxes:
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert boxes.min() >= 0
    assert (boxes[:, 2:] <= (width, height)).all()
    assert len(np.unique(boxes[:, 2:] - boxes[:, :2], axis=0)) == 1
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    starts = np.unique(boxes[:, 0])
    shared = min(shape[1], width) - np.diff(starts)
    assert (shared >= np.floor(min(shape[1], width) * overlap) - 1).all()


def test_an_image_of_the_tiles_size_is_one_tile() -> None:
    assert tile_boxes(60, 80, (60, 80), 0.4) == [(0, 0, 80, 60)]
    assert tile_boxes(60, 81, (60, 80), 0.0) == [(0, 0, 80, 60), (1, 0, 81, 60)]
    assert len(tile_boxes(1440, 1920, (480, 640), 0.0)) == 9


@pytest.mark.parametrize("model", ["tiny_detr", "tiny_conditional_detr", "tiny_panoptic"])
def test_an_image_of_one_tile_gives_the_very_result_of_no_tiles(
    model: str, pictures: list[Path], request: pytest.FixtureRequest
) -> None:
    detector = Detector.from_pretrained(request.getfixturevalue(model), device="cpu")
    detector.detection_config = DetectionConfig(
        overlap=0.6, max_objects=7, calibration={"cat": [(0.0, 0.0), (0.4, 0.7), (1.0, 1.0)]}
    )
    whole = detector(pictures, threshold=0.1, batch_size=2)
    tiled = detector(pictures, threshold=0.1, batch_size=2, tiles=120)
    assert all(same(a, b) for a, b in zip(whole, tiled))
    assert sum(map(len, whole)) > 0
    assert same(detector(pictures[0], threshold=0.1), detector(pictures[0], threshold=0.1, tiles=120))


def test_an_image_of_several_tiles_has_the_objects_of_each_in_its_own_frame(
    detector: Detector, large: Image.Image
) -> None:
    found = detector(large, threshold=0.3, tiles=(110, SIDE))
    boxes = tile_boxes(110, 150, (110, SIDE), 0.2)
    assert len(boxes) == 3
    alone = [detector(large.crop(box), threshold=0.3) for box in boxes]
    expected = np.concatenate(
        [part.boxes + np.array([left, 0, left, 0]) for (left, *_), part in zip(boxes, alone)]
    )
    labels = np.concatenate([part.labels for part in alone])
    for label, box in zip(found.labels, found.boxes):
        assert np.abs(expected[labels == label] - box).max(1).min() < 1e-3
    assert len(found) > max(map(len, alone))
    assert found.image_size == (110, 150)
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("batch_size", [2, 5])
def test_tiles_do_not_depend_on_the_batch(detector: Detector, large: Image.Image, batch_size: int) -> None:
    images = [large, make_picture(70, 60), make_picture(140, 200, seed=5)]
    one = detector(images, threshold=0.2, tiles=SIDE)
    several = detector(images, threshold=0.2, tiles=SIDE, batch_size=batch_size)
    for a, b in zip(one, several):
        assert len(a) == len(b) > 0
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


def test_more_objects_than_queries_are_possible_and_the_most_are_kept_once(
    detector: Detector, large: Image.Image
) -> None:
    every = detector(large, threshold=0, tiles=40)
    assert len(every) > detector.model.config.num_queries
    assert len(detector(large, threshold=0, tiles=40, max_objects=15)) == 15
    assert same(detector(large, threshold=0, tiles=40, max_objects=15), every[:15])


def test_tiles_of_an_image_that_takes_long_are_counted(
    detector: Detector,
    large: Image.Image,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from detrkit.inference import tiles

    detector(large, tiles=SIDE)
    assert "tiles" not in capsys.readouterr().err
    monkeypatch.setattr(tiles, "_SECONDS_BETWEEN_LINES", -1.0)
    detector(large, tiles=SIDE)
    lines = [line for line in capsys.readouterr().err.splitlines() if "tiles" in line]
    count = len(tile_boxes(110, 150, (SIDE, SIDE), 0.2))
    assert lines == [f"image: {done} of {count} tiles" for done in range(1, count + 1)]


def test_scores_are_calibrated_once(detector: Detector, large: Image.Image) -> None:
    plain = detector(large, threshold=0, tiles=SIDE)
    curve = [(0.0, 0.0), (0.5, 0.9), (1.0, 1.0)]
    config = DetectionConfig(calibration=dict.fromkeys(("cat", "remote", "couch"), curve))
    best = detector.with_config(config)(large, threshold=0, tiles=SIDE, max_objects=1)
    label = best.names[0]
    top = max(score for score, name in zip(plain.scores, plain.names) if name == label)
    expected = top if label == "N/A" else np.interp(top, *np.array(curve).T)
    assert best.scores[0] == pytest.approx(expected, abs=1e-6)


def test_masks_stand_where_their_tiles_were(tiny_panoptic: Path, large: Image.Image) -> None:
    detector = Detector.from_pretrained(tiny_panoptic, device="cpu")
    found = detector(large, threshold=0.2, tiles=(110, SIDE))
    assert found.masks is not None
    assert found.masks.shape == (len(found), 110, 150)
    boxes = tile_boxes(110, 150, (110, SIDE), 0.2)
    alone = [detector(large.crop(box), threshold=0.2) for box in boxes]
    for box, mask in zip(found.boxes, found.masks):
        matches = [
            np.array_equal(mask[:, left:right], own.mask) and mask.sum() == own.mask.sum()
            for (left, _, right, _), part in zip(boxes, alone)
            for own in part
            if np.allclose(own.box + np.array([left, 0, left, 0]), box, atol=1e-3)
        ]
        assert any(matches)
    assert detector(large, threshold=0.2, tiles=SIDE, masks=False).masks is None


def test_stored_tiles_are_used_unless_a_call_says_otherwise(
    tiny_detr: Path, large: Image.Image, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_detr, folder)
    DetectionConfig(tile_size=SIDE, tile_overlap=0.3).save_pretrained(folder)
    plain = Detector.from_pretrained(tiny_detr, device="cpu")
    stored = Detector.from_pretrained(folder, device="cpu")
    tiled = plain.with_config(DetectionConfig(tile_overlap=0.3))(large, threshold=0.2, tiles=SIDE)
    assert same(stored(large, threshold=0.2), tiled)
    assert same(next(stored.stream([large], threshold=0.2)), tiled)
    assert same(stored(large, threshold=0.2, tiles=0), plain(large, threshold=0.2))
    assert len(tiled) != len(plain(large, threshold=0.2))


def test_auto_takes_the_size_of_the_training_and_an_overlap_for_its_large_objects() -> None:
    def unused() -> object:
        raise AssertionError

    config = with_tiles(DetectionConfig(chosen=CHOSEN), "auto", unused)
    assert (config.tile_shape, config.tile_overlap) == ((60, 80), 0.4)
    wide = with_tiles(DetectionConfig(chosen=CHOSEN, tile_overlap=0.45), "auto", unused)
    assert wide.tile_overlap == 0.45
    huge = {"training_scale": {"image_size": [60, 80], "large_object_side": 59.0}}
    assert with_tiles(DetectionConfig(chosen=huge), "auto", unused).tile_overlap == 0.5
    none = {"training_scale": {"image_size": [60, 80], "large_object_side": None}}
    assert with_tiles(DetectionConfig(chosen=none), "auto", unused).tile_overlap == 0.2


class Processor:
    def __init__(self, size: object, do_resize: bool = True) -> None:
        self.size, self.do_resize = size, do_resize


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ({"shortest_edge": 64, "longest_edge": 100}, (64, 64)),
        ({"height": 48, "width": 64}, (48, 64)),
        ({"longest_edge": 90}, (90, 90)),
    ],
)
def test_auto_falls_back_to_the_size_that_the_processor_resizes_to(
    size: dict[str, int], shape: tuple[int, int]
) -> None:
    assert with_tiles(DetectionConfig(), "auto", lambda: Processor(size)).tile_shape == shape


def test_auto_without_anything_to_go_by_asks_for_a_size() -> None:
    for processor in (Processor(None), Processor({"shortest_edge": 64}, do_resize=False)):
        with pytest.raises(SettingError, match="give the size of the tiles"):
            with_tiles(DetectionConfig(), "auto", lambda processor=processor: processor)
    damaged = DetectionConfig(chosen={"training_scale": {"image_size": "large"}})
    with pytest.raises(SettingError, match="training_scale in the model's detection settings is damaged"):
        with_tiles(damaged, "auto", lambda: Processor(None))


def test_sizes_of_tiles_that_make_no_sense_are_refused(detector: Detector, large: Image.Image) -> None:
    for text in ("-5", "1x2x3", "big", "640x", "6.5", ""):
        with pytest.raises(SettingError, match="--tiles must be auto, a side"):
            read_tiles(text)
    for tiles in ("large", -1, (3, 0), (1, 2, 3), 2.5):
        with pytest.raises(SettingError, match="tile"):
            detector(large, tiles=tiles)  # type: ignore[arg-type]
    assert [read_tiles(text) for text in ("640", "480X640", "auto", "0", None)] == [
        640,
        (480, 640),
        "auto",
        0,
        None,
    ]


def test_every_engine_finds_the_same_in_tiles(tiny_detr: Path, large: Image.Image, tmp_path: Path) -> None:
    detector = Detector.from_pretrained(tiny_detr, device="cpu")
    model, processor = load_pretrained(str(tiny_detr), None)
    export_model(model, tmp_path / "onnx", "onnx", processor=processor, verify=False)
    exported = Detector.from_pretrained(tmp_path / "onnx")
    a, b = (one(large, threshold=0.2, tiles=SIDE) for one in (detector, exported))
    assert len(a) == len(b) > 0
    np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-2)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-4)


def test_detect_and_evaluate_take_tiles(
    tiny_detr: Path, large: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_detr, folder)
    config = DetectionConfig(threshold=0.2, chosen=CHOSEN)
    config.save_pretrained(folder)
    images = tmp_path / "images"
    images.mkdir()
    large.save(images / "large.png")
    document, options = tmp_path / "found.json", ["--model", str(folder), "--device", "cpu"]
    assert run(["detect", str(images), "--tiles", "auto", "--json", str(document), *options]) == 0
    written = json.loads(document.read_text())
    assert (written["info"]["tile_size"], written["info"]["tile_overlap"]) == ([60, 80], 0.4)
    found = Detector.from_pretrained(folder, device="cpu")(large, tiles="auto")
    assert len(written["annotations"]) == len(found) > 0
    resumed = ["detect", str(images), "--tiles", "0", "--json", str(document), "--resume", *options]
    assert run(resumed) == 2  # other tiles, other results
    assert "tile_size" in capsys.readouterr().err
    truth = {
        "images": [{"id": 1, "file_name": "large.png", "width": 150, "height": 110}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "bbox": [9, 9, 30, 30], "area": 900, "iscrowd": 0}
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    metrics = tmp_path / "metrics.json"
    arguments = [
        "--images",
        str(images),
        "--annotations",
        str(tmp_path / "truth.json"),
        "--json",
        str(metrics),
    ]
    assert run(["evaluate", "--tiles", "auto", *arguments, *options]) == 0
    assert json.loads(metrics.read_text())["settings"]["tile_size"] == [60, 80]
    detector = Detector.from_pretrained(folder, device="cpu").with_config(replace(config, tile_size=SIDE))
    raw = evaluate_detector(detector, images, tmp_path / "truth.json", raw=True)
    assert raw.detection_config is not None
    assert raw.detection_config.tile_size is None
