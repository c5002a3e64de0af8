from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detrkit import Detector
from detrkit.benchmark import machine
from detrkit.benchmark.models import SURVIVORS, save_random, threshold_of
from detrkit.benchmark.report import append_csv, make_rows
from detrkit.benchmark.sides import Settings, detrkit_side, transformers_side
from detrkit.benchmark.turns import Times, disagreement, in_turns
from detrkit.checkpoints.cost import Cost
from detrkit.checkpoints.loading import read_model_files
from detrkit.errors import CheckpointError, DetrkitError


def settings(model: Path | str, **changes: object) -> Settings:
    values = {"maker": "", "model": str(model), "height": 64, "width": 96, "batch": 1, "threads": 1}
    return Settings(**{**values, "threshold": 0.0, **changes})


@pytest.mark.parametrize("fixture", ["tiny_detr", "tiny_deformable_detr"])
def test_both_sides_compute_the_same(fixture: str, request: pytest.FixtureRequest) -> None:
    ours, theirs = (
        make(settings(request.getfixturevalue(fixture), batch=2))
        for make in (detrkit_side, transformers_side)
    )
    assert ours.forward() == pytest.approx(theirs.forward(), rel=1e-4)
    assert ours.end_to_end() == pytest.approx(theirs.end_to_end(), rel=1e-2)
    assert ours.end_to_end() > 0


def test_the_threshold_of_a_panoptic_model_lets_some_queries_live(
    tiny_panoptic: Path, tiny_detr: Path
) -> None:
    common = {"maker": "", "model": "", "height": 64, "width": 96, "batch": 2, "threads": 1}
    assert threshold_of(str(tiny_detr), common) == 0
    threshold = threshold_of(str(tiny_panoptic), common)
    assert 0 < threshold < 1
    one = settings(tiny_panoptic, threshold=threshold)
    assert detrkit_side(one).end_to_end() >= 1
    detector = Detector.from_pretrained(tiny_panoptic, device="cpu")
    detector.processor.size = one.size
    assert len(detector(one.images[0], threshold, masks=False)) == SURVIVORS


def test_a_process_that_fails_is_told_and_the_others_go_on(tiny_detr: Path, tmp_path: Path) -> None:
    maker = "detrkit.benchmark.sides:detrkit_side"
    sides = {"good": settings(tiny_detr, maker=maker), "bad": settings(tmp_path / "none", maker=maker)}
    lines: list[str] = []
    good, bad = in_turns(sides, 2, stages=["forward"], report=lines.append)
    assert len(good.seconds["forward"]) == 2
    assert good.failure == ""
    assert good.megabytes > 100
    assert "none" in bad.failure
    assert bad.seconds == {}
    assert len(lines) == 6


def test_rows_say_ratios_and_the_share_of_the_limit() -> None:
    ours = Times("ours", {"forward": [1.0, 2.0, 3.0]}, megabytes=10.4)
    theirs = Times("theirs", {"forward": [4.0, 4.0, 9.0]}, failure="killed")
    cost = Cost(parameters=1, macs=3 * 10**9, sampling_macs=10**9, bytes=4, height=64, width=96)
    first, second = make_rows(
        [ours, theirs], settings("m", batch=2), cost, 16.0, reference="theirs", about={"model": "m"}
    )
    assert first["median_s"] == 2
    assert first["images_per_s"] == 1
    assert (first["ratio"], first["ratio_low"], first["ratio_high"]) == (2, 2, 4)
    # Two images of four billion multiply-adds: 16 billion operations, a second of the machine's.
    assert first["share_of_limit"] == 0.5
    assert (first["peak_mb"], first["model"]) == (10, "m")
    assert (second["ratio"], second["failure"]) == (1, "killed")


def test_sides_that_compute_something_else_are_named() -> None:
    results = [
        Times(name, checksums={"forward": value}) for name, value in zip("abc", (100.0, 100.01, 101.0))
    ]
    # A side that never ran is none to compare with.
    assert disagreement([Times("failed"), *results]) == {"c": "gives different results than a"}
    assert disagreement([*results[:2], Times("d", checksums={"forward": math.nan})]).keys() == {"d"}
    assert disagreement([]) == {}


def test_rows_are_added_to_a_file_of_the_same_columns_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    append_csv(path, [{"a": 1, "b": None}])
    append_csv(path, [{"a": "x,y", "b": 2}])
    assert list(csv.DictReader(path.open())) == [{"a": "1", "b": ""}, {"a": "x,y", "b": "2"}]
    with pytest.raises(DetrkitError, match="different columns"):
        append_csv(path, [{"a": 1}])


def test_the_machine_is_measured_and_described() -> None:
    assert machine.matrix_rate(1, runs=1) > 0
    assert machine.peak_memory() > 100
    columns = machine.columns(3)
    assert columns["threads"] == 3
    assert columns["torch"]


def test_time_of_other_programs_is_counted_and_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [100.0]  # seconds of processors
    monkeypatch.setattr(machine, "time", SimpleNamespace(monotonic=itertools.count(0, 10).__next__))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: others[0])
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    watch, smaller = machine.Watch(4), machine.Watch(2)
    others[0] += 30  # within 20 seconds
    assert watch.others() == pytest.approx(1.5)
    # Two processors were left for others to use.
    assert smaller.others() == 0


def test_a_disturbed_measurement_says_by_what() -> None:
    assert machine.disturbances(0.1, 2, (100, 95), 0.1) == []
    busy, slower, apart = machine.disturbances(1.0, 2, (100, 60), 0.5)
    assert "1.0 of the 2 processors it needs" in busy
    assert "from 100 to 60 GFLOP/s" in slower
    assert "50%" in apart


def test_a_multiply_add_is_two_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count()
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(machine, "_MATRIX", 64)
    # Each product takes a second of this clock.
    assert machine.matrix_rate(1, runs=1) == pytest.approx(2 * 64**3 / 1e9)


def test_seconds_of_the_processor_are_counted_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=2)
    monkeypatch.setattr(machine, "time", SimpleNamespace(process_time=lambda: next(ticks)))
    monkeypatch.setattr(machine, "_MATRIX", 64)
    assert machine.matrix_rate(1, runs=1, cpu_time=True) == pytest.approx(64**3 / 1e9)


def test_slow_products_are_not_repeated() -> None:
    products: list[torch.Tensor] = []
    seconds = itertools.count(step=6)

    def product() -> torch.Tensor:
        products.append(torch.ones(1, 1))
        return products[-1]

    assert machine._fastest(product, 10, lambda: next(seconds)) == 6
    assert len(products) == 1


def test_random_weights_need_a_released_architecture(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="detr-resnet-50"):
        save_random("detr-resnet-5O", tmp_path)


@pytest.mark.slow
def test_a_released_architecture_with_random_weights_is_a_model_folder(tmp_path: Path) -> None:
    save_random("deformable-detr", tmp_path, num_queries=20)
    files = read_model_files(str(tmp_path))
    assert files.model_class == "DeformableDetrForObjectDetection"
    assert files.config.num_queries == 20
