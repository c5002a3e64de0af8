"""The search for the best setting within a time, its times made up: what is chosen depends on no machine."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detrkit import Detector
from detrkit.benchmark import speed_settings
from detrkit.benchmark.speed_points import Reading, measure, readable_images, time_per_image
from detrkit.benchmark.speed_search import Forecast, SpeedSearch, best_first
from detrkit.benchmark.speed_settings import RunOptions, Setting, VariableModel
from detrkit.data.checks import check_dataset
from detrkit.data.coco import DetectionDataset
from detrkit.errors import CheckpointError, ImageError, SettingError
from detrkit.evaluation.calibrate import Calibration, calibrate_detector
from detrkit.evaluation.choosing import Wishes
from tests.evaluation.test_layers import images as images  # the fixture
from tests.evaluation.test_layers import truth_of
from tests.tiny import FAMILIES

OWN_SIDE = 107  # the longest edge of the tiny models' images
BASIC = Wishes(scores="none", per_class=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["deformable_detr_two_stage"].save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(folder: Path, images: Path) -> DetectionDataset:
    return check_dataset(truth_of(Detector.from_pretrained(folder, device="cpu"), images)).dataset


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> VariableModel:
    monkeypatch.setattr(speed_settings, "SIZES", (1.0, 0.5))
    monkeypatch.setattr(speed_settings, "_QUERIES", (0.5, 1))
    return VariableModel(str(folder), device="cpu")


@pytest.fixture(scope="module")
def calibration(folder: Path, dataset: DetectionDataset) -> Calibration:
    return calibrate_detector(Detector.from_pretrained(folder, device="cpu"), dataset, BASIC)


def made_up_ms(longest_edge: int, layers: int, queries: int) -> float:
    """More for a larger input, more layers and more queries; 72 ms for the tiny model as it is."""
    return 40 * longest_edge / OWN_SIDE + 10 * layers + queries


def made_up_timer(setting: Setting, images: Sequence[Path], upright: bool) -> float:
    return made_up_ms(round(setting.size * OWN_SIDE), setting.layers, setting.queries)


def made_up_layers(search: SpeedSearch, setting: Setting) -> list[float]:
    side, counts = round(setting.size * OWN_SIDE), range(1, setting.layers + 1)
    return [made_up_ms(side, layers, setting.queries) / 100 for layers in counts]


@pytest.fixture
def search(
    model: VariableModel,
    dataset: DetectionDataset,
    calibration: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., SpeedSearch]:
    """Gives a search for a limit; every AP, forecast or measured, is a hundredth of the time."""
    monkeypatch.setattr(VariableModel, "detector", lambda _, setting: setting)  # none is run
    monkeypatch.setattr(SpeedSearch, "_layers", made_up_layers)

    def make(max_ms: float, slower: float = 1.0, **options: object) -> SpeedSearch:
        def measured(folder: Path, *_: object) -> tuple[Calibration, float]:
            config = json.loads((folder / "config.json").read_text())
            side = json.loads((folder / "preprocessor_config.json").read_text())["size"]["longest_edge"]
            ms = made_up_ms(side, config["decoder_layers"], config["two_stage_num_proposals"])
            ap = {**calibration.ap["after"], "AP": ms / 100}
            return replace(calibration, ap={**calibration.ap, "after": ap}), slower * ms

        given = {"engine": "torch", "timer": made_up_timer, "measure": measured, "wishes": BASIC}
        return SpeedSearch(model=model, dataset=dataset, max_ms=max_ms, **{**given, **options})

    return make


def test_the_candidates_are_the_best_that_may_fit_each_faster_than_those_before() -> None:
    names = "abcdef"
    settings = {name: Setting(size=1.0, layers=1, queries=place) for place, name in enumerate(names)}
    values = {"a": (90, 0.9), "b": (50, 0.5), "c": (50, 0.6), "d": (60, 0.55), "e": (20, 0.6), "f": (5, 0.1)}
    forecasts = [Forecast(settings[name], *values[name]) for name in names]
    assert best_first(forecasts, 70) == [settings["e"], settings["f"]]
    assert best_first(forecasts, 90) == [settings["a"], settings["e"], settings["f"]]
    assert best_first(forecasts, 1) == [settings["f"]]


@pytest.mark.parametrize(
    ("max_ms", "changes", "edges"),
    [(54, {"size": 0.5}, (32, 54)), (57, {"layers": 1, "queries": 6}, (64, 107))],
)
def test_what_fits_is_stored_as_a_model_that_runs_so(
    max_ms: int,
    changes: dict[str, float],
    edges: tuple[int, int],
    search: Callable[..., SpeedSearch],
    calibration: Calibration,
    tmp_path: Path,
) -> None:
    speeds = search(max_ms).run()
    aps = [point.ap for point in speeds.points]
    assert aps == sorted(aps, reverse=True)
    assert speeds.points[0].setting == speeds.model.own
    assert speeds.chosen is next(point for point in speeds.points if point.ms <= max_ms)
    assert speeds.chosen.setting == replace(speeds.model.own, **changes)  # type: ignore[arg-type]

    about = speeds.found.config.chosen["speed"]
    assert (about["max_ms"], about["input"]) == (max_ms, f"{edges[0]}x{edges[1]}")
    assert speeds.found.config.chosen["data"] == calibration.config.chosen["data"]
    assert json.loads(json.dumps(about)) == about
    detector = Detector.from_pretrained(speeds.chosen.folder.path, device="cpu")
    assert dict(detector.processor.size) == {"shortest_edge": edges[0], "longest_edge": edges[1]}
    assert detector.config.decoder_layers == speeds.chosen.setting.layers
    assert detector.config.object_queries == speeds.chosen.setting.queries

    rows = list(csv.DictReader(speeds.save(tmp_path).open(encoding="utf-8")))
    assert [row["chosen"] for row in rows] == ["01"[point is speeds.chosen] for point in speeds.points]
    assert speeds.table().row_count == len(speeds.points)


def test_the_model_as_it_is_stays_where_it_fits(search: Callable[..., SpeedSearch]) -> None:
    speeds = search(72).run()
    assert speeds.chosen.setting == speeds.model.own


def test_where_nothing_fits_the_fastest_that_was_measured_is_named(
    search: Callable[..., SpeedSearch],
) -> None:
    with pytest.raises(SettingError, match=r"no setting takes at most 5 ms .* takes \d+\.\d ms: input 32x54"):
        search(5).run()


def test_a_measurement_above_the_limit_does_not_count_whatever_was_forecast(
    search: Callable[..., SpeedSearch],
) -> None:
    speeds = search(53, slower=1.1).run()  # the 52 ms of a forecast are 57
    assert speeds.chosen.ms <= 53
    assert max(point.ms for point in speeds.points if point.setting.size == 0.5) > 53


def test_a_setting_that_cannot_have_what_is_asked_is_left_out(
    search: Callable[..., SpeedSearch], capsys: pytest.CaptureFixture[str]
) -> None:
    one = search(54)
    usual = one.measure

    def measured(folder: Path, *arguments: object) -> tuple[Calibration, float]:
        found, ms = usual(folder, *arguments)  # type: ignore[arg-type]
        if 52 < ms < 54:
            raise SettingError("no threshold has a recall of 0.99")
        return found, ms

    speeds = replace(one, measure=measured).run()
    assert speeds.chosen.ms < 52
    assert "Left out: no threshold has a recall of 0.99" in capsys.readouterr().err


@pytest.mark.parametrize(("aps", "kept"), [([0.1, 0.5], {2}), ([0.4, 0.5], {1, 2})])
def test_decoder_layers_that_did_not_learn_to_detect_are_left_out(
    search: Callable[..., SpeedSearch],
    aps: list[float],
    kept: set[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(SpeedSearch, "_layers", lambda *_: aps)
    points = search(1000).run().points
    assert {point.setting.layers for point in points} == kept
    assert ("auxiliary losses" in capsys.readouterr().err) == (kept == {2})


def test_only_what_a_model_can_have_is_varied(folder: Path, tmp_path: Path) -> None:
    two_stage = VariableModel(str(folder), device="cpu")
    assert list(two_stage.queries) == [6, 12, 24]
    assert list(two_stage.layers) == [1, 2]
    detr = VariableModel(str(FAMILIES["detr"].save(tmp_path / "detr")), device="cpu")
    assert list(detr.queries) == [12]
    assert list(detr.layers) == [1, 2]
    masks = VariableModel(str(FAMILIES["detr"].save(tmp_path / "masks", masks=True)), device="cpu")
    assert list(masks.layers) == [2]
    with pytest.raises(SettingError, match="positions that the model has to propose"):
        two_stage.load(replace(two_stage.own, size=0.5, queries=500))


def test_a_forecast_runs_the_setting(folder: Path) -> None:
    model = VariableModel(str(folder), device="cpu")
    detector = model.detector(Setting(size=0.5, layers=1, queries=6))
    assert dict(detector.processor.size) == {"shortest_edge": 32, "longest_edge": 54}
    assert (detector.config.decoder_layers, detector.config.object_queries) == (1, 6)
    assert detector.detection_config == model.detection_config


def test_only_engines_that_run_here_are_tried(folder: Path) -> None:
    model = VariableModel(str(folder), device="cpu")
    assert model.engines("torch") == [("torch", "float32")]
    assert model.engines(None)[0] == ("torch", "float32")
    assert VariableModel(str(folder), device="cpu", dtype="bfloat16").engines(None) == [("torch", "bfloat16")]
    with pytest.raises(SettingError, match="unknown engine"):
        model.engines("tensorflow")
    with pytest.raises(SettingError, match="'float32' only"):
        VariableModel(str(folder), device="cpu", dtype="bfloat16").engines("onnx")


def test_times_are_taken_of_readable_images(folder: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes((images / "0.png").read_bytes())
    entries = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(("broken", "good", "lost"))]
    document = {"images": entries, "annotations": [], "categories": []}
    dataset = DetectionDataset(document=document, images_dir=tmp_path, source="some images")
    assert readable_images(dataset, None, 10) == [tmp_path / "good.png"]
    assert readable_images(dataset, 2, 10) == [tmp_path / "good.png"]
    with pytest.raises(ImageError, match="none of 1 images"):
        readable_images(dataset, 1, 10)
    detector = Detector.from_pretrained(folder, device="cpu")
    assert time_per_image(detector, [tmp_path / "good.png"], False) > 0


@pytest.mark.slow
def test_a_setting_is_measured_in_a_process_of_its_own(
    folder: Path, dataset: DetectionDataset, tmp_path: Path
) -> None:
    options: RunOptions = {"engine": "torch", "device": "cpu"}
    found, ms = measure(folder, options, dataset, BASIC, Reading())
    here = calibrate_detector(Detector.from_pretrained(folder, device="cpu"), dataset, BASIC)
    assert found.config == here.config
    np.testing.assert_array_equal(found.raw.scores, here.raw.scores)
    assert ms > 0
    with pytest.raises(CheckpointError, match="lost"):  # a mistake comes back as what it is
        measure(tmp_path / "lost", options, dataset, BASIC, Reading())
