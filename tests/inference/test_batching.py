from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detrkit.inference.batching import WAITING_GROUPS, map_in_threads, read_ahead, run_in_groups
from tests.conftest import make_picture, wait_until


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("detrkit-read-ahead")]


@given(st.integers(0, 30), st.integers(1, 5))
def test_items_come_in_their_order(count: int, depth: int) -> None:
    assert list(read_ahead(iter(range(count)), depth)) == list(range(count))


def test_items_are_made_in_another_thread_and_no_more_than_the_depth() -> None:
    made: list[str] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(threading.current_thread().name)
            yield number

    ahead = read_ahead(items(), depth=3)
    assert next(ahead) == 0
    wait_until(lambda: len(made) >= 4)
    time.sleep(0.05)  # time for one too many
    assert made == ["detrkit-read-ahead"] * 4
    ahead.close()


def test_an_error_comes_in_its_place_and_as_it_was_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("three")

    ahead = read_ahead(items(), depth=5)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="three"):
        next(ahead)
    with pytest.raises(TypeError):
        next(read_ahead(5, depth=1))  # type: ignore[arg-type]


def test_an_iterator_that_is_left_ends_its_thread_and_its_source() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.set()

    ahead = read_ahead(items(), depth=2)
    next(ahead)
    assert len(reader_threads()) == 1
    ahead.close()
    assert reader_threads() == []
    assert ended.wait(120)


def test_an_interrupt_ends_the_thread() -> None:
    def interrupted() -> None:
        for _ in read_ahead(iter(range(1000)), depth=2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    wait_until(lambda: not reader_threads())
    assert reader_threads() == []


class Group:
    """Runs groups of (kind, number) and notes them."""

    def __init__(self) -> None:
        self.groups: list[Sequence[tuple[str, int]]] = []

    def __call__(self, items: Sequence[tuple[str, int]]) -> Iterator[int]:
        self.groups.append(items)
        return (number for _, number in items)


@given(st.text("abc", max_size=60), st.integers(1, 5))
def test_results_keep_the_order_and_groups_their_kind_and_size(kinds: str, size: int) -> None:
    run, pulled = Group(), []

    def items() -> Iterator[tuple[str, int]]:
        for number, kind in enumerate(kinds):
            pulled.append(number)
            yield kind, number

    for given_before, result in enumerate(run_in_groups(items(), run, lambda item: item[0], size)):
        assert result == given_before
        assert len(pulled) - given_before <= WAITING_GROUPS * size
    assert len(pulled) == len(kinds)
    assert sum(map(len, run.groups)) == len(kinds)
    for group in run.groups:
        assert len(group) <= size
        assert len({kind for kind, _ in group}) == 1


def test_groups_are_filled_where_the_company_is_near() -> None:
    run = Group()
    list(run_in_groups([("ab"[i % 2], i) for i in range(16)], run, lambda item: item[0], 4))
    assert [len(group) for group in run.groups] == [4, 4, 4, 4]


def test_the_group_of_the_first_item_in_line_runs_when_too_many_wait() -> None:
    run = Group()
    kinds = "zyzabcdefghij"  # 12 of them, four groups' worth, wait before "j" comes
    items = [(kind, number) for number, kind in enumerate(kinds)]
    assert list(run_in_groups(items, run, lambda item: item[0], 3)) == list(range(13))
    assert [[number for _, number in group] for group in run.groups][:3] == [[0, 2], [1], [3]]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's process files")
def test_memory_does_not_grow_with_the_number_of_images(tiny_detr: Path) -> None:
    from detrkit import Detector

    detector = Detector.from_pretrained(tiny_detr, device="cpu")
    sizes = [(400, 300), (300, 400), (400, 267), (333, 333), (375, 500)]

    def images() -> Iterator[object]:
        for number in range(2000):
            yield make_picture(*sizes[number * number % 5], seed=number % 50)

    resident = []
    for _ in detector.stream(images(), batch_size=4):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    early, late = np.median(resident[200:400]), np.median(resident[-200:])
    assert late - early < 20  # MB; one image takes 0.3 as it is prepared, 2000 would take 600


@given(st.integers(0, 30), st.integers(1, 4))
def test_results_of_several_threads_come_in_the_order_of_the_items(count: int, threads: int) -> None:
    assert list(map_in_threads(lambda item: 2 * item, range(count), threads)) == [2 * i for i in range(count)]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_comes_after_the_results_before_it(threads: int) -> None:
    def fail_at_four(item: int) -> int:
        if item == 4:
            raise KeyError("four")
        return item

    results = map_in_threads(fail_at_four, range(10), threads)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="four"):
        next(results)
    assert reader_threads() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_the_items_comes_after_the_results_before_it(threads: int) -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise KeyError("four")

    results = map_in_threads(str, items(), threads)
    assert [next(results) for _ in range(4)] == ["0", "1", "2", "3"]
    with pytest.raises(KeyError, match="four"):
        next(results)


def test_threads_work_no_further_ahead_than_twice_their_number() -> None:
    begun: list[int] = []
    results = map_in_threads(lambda item: begun.append(item) or item, range(100), 3)
    assert next(results) == 0
    wait_until(lambda: len(begun) >= 6)
    assert begun == [0, 1, 2, 3, 4, 5]
    results.close()
    assert reader_threads() == []
