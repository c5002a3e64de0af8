from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from detrkit.engines import openvino_engine
from detrkit.engines.openvino_engine import _Graphs


class Clock:
    """Time that passes only when something is done: 1 s in the graph for all sizes, 10 s to make one."""

    def __init__(self) -> None:
        self.now = 0.0
        self.made: list[str] = []

    def compile(self, model: str) -> Any:
        self.now += 10
        self.made.append(model)

        def graph(inputs: Mapping[str, np.ndarray], share_inputs: bool) -> Any:
            self.now += 1.0 if model == "all" else 0.8
            return SimpleNamespace(to_tuple=lambda: (model,))

        return graph


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(openvino_engine.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(openvino_engine, "_specialised", lambda model, inputs, kind: str(kind.shapes[0][-1]))
    return clock


def pictures(width: int) -> dict[str, np.ndarray]:
    return {"pixel_values": np.zeros((1, 3, 2, width)), "pixel_mask": np.ones((1, 2, width))}


def test_the_first_size_that_comes_again_gets_a_graph_at_once(clock: Clock) -> None:
    graphs = _Graphs(clock.compile, "all")
    assert [graphs.run(pictures(5))[0] for _ in range(5)] == ["all", "all", "5", "5", "5"]


def test_another_size_gets_one_when_it_would_have_paid(clock: Clock) -> None:
    graphs = _Graphs(clock.compile, "all")
    for _ in range(3):
        graphs.run(pictures(5))
    # 10 s to make, a fifth of each second saved
    assert [graphs.run(pictures(6))[0] for _ in range(60)] == 50 * ["all"] + 10 * ["6"]


def test_sizes_that_seldom_come_again_get_none(clock: Clock) -> None:
    graphs = _Graphs(clock.compile, "all")
    for _ in range(20):
        for width in range(1, 40):
            graphs.run(pictures(width))
    assert len(clock.made) == 2


def test_a_graph_that_had_to_go_must_pay_anew(clock: Clock) -> None:
    graphs = _Graphs(clock.compile, "all")
    for width in range(1, 6):
        for _ in range(60):
            graphs.run(pictures(width))
    assert clock.made == ["all", "1", "2", "3", "4", "5"]
    assert graphs.run(pictures(1))[0] == "all"
    assert graphs.run(pictures(5))[0] == "5"
    assert graphs.run(pictures(2))[0] == "2"


def test_what_is_known_of_sizes_stays_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_engine, "_SIZES_KEPT", 3)
    graphs = _Graphs(clock.compile, "all")
    for width in [1, 1, 2, 3, 4, 5]:
        graphs.run(pictures(width))
    assert len(graphs._calls) == len(graphs._seconds) == 3
    assert graphs.run(pictures(1))[0] == "all"  # its two calls are forgotten


def test_a_size_that_openvino_makes_no_graph_for_stays_with_the_one_for_all(clock: Clock) -> None:
    def compile_graph(model: str) -> Any:
        graph = clock.compile(model)
        if model == "6":
            raise RuntimeError("the window is larger than the image")
        return graph

    graphs = _Graphs(compile_graph, "all")
    assert [graphs.run(pictures(6))[0] for _ in range(60)] == 60 * ["all"]
    assert clock.made == ["all", "6"]
    assert [graphs.run(pictures(5))[0] for _ in range(4)] == ["all", "all", "5", "5"]
