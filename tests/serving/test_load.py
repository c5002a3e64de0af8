"""What happens when there is much to do, when the server is not ready, and when something goes wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from detrkit.common.terminal import log_format
from detrkit.errors import CheckpointError
from detrkit.serving.batching import Batcher
from tests.conftest import wait_until
from tests.serving.conftest import NumberReader, Start, number_image
from tests.serving.test_contract import IMAGE, error_of


def test_a_full_queue_is_429_and_loses_nobody(start: Start) -> None:
    running = start(queue_size=3)
    running.reader.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(running.detect, number_image(number)) for number in range(3)]
        wait_until(lambda: running.service.pending == 3)
        refused = running.detect(IMAGE)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "queue is full" in error_of(refused)
        running.reader.gate.set()
        scores = [one.result().json()["objects"][0]["score"] for one in accepted]
    assert scores == pytest.approx([0.0, 0.01, 0.02])
    assert running.service.pending == 0
    assert running.detect(IMAGE).status_code == 200


def test_refused_requests_give_their_place_back(start: Start) -> None:
    running = start(queue_size=1)
    for content in (b"x", IMAGE[:60], bytes(30_000), b"", number_image(66)):
        assert running.detect(content).status_code >= 400
    assert running.service.pending == 0
    assert running.detect(IMAGE).status_code == 200


def test_before_the_models_are_loaded_everything_is_503(start: Start) -> None:
    gate, reader = threading.Event(), NumberReader()

    def load(model: str, settings: object) -> NumberReader:
        assert gate.wait(60)
        return reader

    running = start(reader, load=load, wait=False)
    for answer in (
        running.detect(IMAGE),
        running.client.get("/v1/model"),
        running.client.get("/health/ready"),
    ):
        assert answer.status_code == 503
        assert "loading" in error_of(answer)
        assert answer.headers["retry-after"]
    assert running.client.get("/health/live").status_code == 200
    assert running.client.get("/metrics").status_code == 200
    gate.set()
    wait_until(lambda: running.service.ready)
    assert running.client.get("/health/ready").status_code == 200
    assert running.detect(IMAGE).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_the_service(start: Start) -> None:
    def load(model: str, settings: object) -> NumberReader:
        raise CheckpointError("no such model")

    running = start(load=load)
    assert isinstance(running.service.failure, CheckpointError)
    assert running.service.ended.is_set()


def test_a_server_that_stops_answers_what_it_accepted(start: Start) -> None:
    running = start()
    running.reader.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        accepted = [pool.submit(running.detect, number_image(number)) for number in range(2)]
        wait_until(lambda: running.service.pending == 2)
        running.client.portal.call(running.service.stop)
        late = running.detect(IMAGE)
        assert late.status_code == 503
        assert "stopping" in error_of(late)
        assert running.client.get("/health/ready").status_code == 503
        assert running.client.get("/health/live").status_code == 200
        assert not running.service.ended.is_set()
        running.reader.gate.set()
        assert [one.result().status_code for one in accepted] == [200, 200]
    wait_until(running.service.ended.is_set)


def test_an_error_of_the_model_is_500_and_shows_nothing_of_it(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    running = start()
    answer = running.detect(number_image(66), headers={"x-request-id": "abc"})
    assert answer.status_code == 500
    assert error_of(answer) == "internal error; see the server's log for request abc"
    said = capsys.readouterr().err
    assert "Error: POST /v1/detect 500" in said
    assert "ZeroDivisionError: a secret of the model" in said
    assert "Traceback" not in said
    assert running.detect(IMAGE).status_code == 200


def test_an_image_that_breaks_the_model_breaks_no_other_of_its_batch(start: Start) -> None:
    running = start(settings={"batch_size": 8})
    running.reader.gate.clear()
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(running.detect, IMAGE)
        wait_until(lambda: running.reader.batches)
        others = [pool.submit(running.detect, number_image(number)) for number in (1, 66, 3, 4)]
        wait_until(lambda: running.service.pending == 5)
        running.reader.gate.set()
        assert [one.result().status_code for one in (first, *others)] == [200, 200, 500, 200, 200]


def test_each_request_is_one_line(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    running = start()
    capsys.readouterr()
    running.detect(IMAGE)
    running.detect(b"x", "?threshold=0.5")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/detect 200 in ")
    assert lines[0].endswith(": reader, 40x30, 1 object")
    assert lines[1].startswith("POST /v1/detect 400 in ")
    with log_format("json"):
        running.detect(IMAGE, headers={"x-request-id": "id1"})
        running.client.get("/v1/nothing")
    good, bad = map(json.loads, capsys.readouterr().err.splitlines())
    wanted = {
        "request": "id1",
        "status": 200,
        "model": "reader",
        "bytes": len(IMAGE),
        "width": 40,
        "objects": 1,
    }
    assert wanted.items() <= good.items()
    assert {"ms", "read_ms", "wait_ms", "model_ms", "batch", "client", "time"} <= set(good)
    assert (bad["status"], bad["path"]) == (404, "/v1/nothing")
    assert bad["error"]


def test_images_of_one_size_and_equal_options_share_a_batch(start: Start) -> None:
    running = start(settings={"batch_size": 3})
    running.reader.gate.clear()
    requests = [(1, 40, ""), (2, 50, ""), (3, 40, ""), (4, 40, "?threshold=0.1"), (5, 40, ""), (6, 40, "")]
    requests.append((7, 50, ""))
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(running.detect, number_image(99))
        wait_until(lambda: running.reader.batches)
        pending: list[Future[Any]] = []
        for number, width, query in requests:
            pending.append(pool.submit(running.detect, number_image(number, width), query))
            wait_until(lambda: len(waiting(running)) == len(pending))
        running.reader.gate.set()
        scores = [one.result().json()["objects"][0]["score"] for one in (first, *pending)]
    assert scores == pytest.approx([0.99, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07])
    assert running.reader.batches == [[99], [1, 3, 5], [2, 7], [4], [6]]


def waiting(running: Any) -> list[Any]:
    """The images that are ready and wait for the model."""
    return running.service._backend._batcher._ready


def test_a_client_that_goes_away_is_not_worked_for(start: Start) -> None:
    running = start()
    running.reader.gate.clear()
    app, scope = running.client.app, http_scope()

    async def ask_and_leave() -> None:
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": number_image(7)}])

        async def receive() -> dict[str, Any]:
            if (message := next(messages, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        task = asyncio.ensure_future(app(scope, receive, send))
        while len(waiting(running)) < 1:
            await asyncio.sleep(0.002)
        gone.set()
        await task

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.detect, IMAGE)
        wait_until(lambda: running.reader.batches)
        running.client.portal.call(ask_and_leave)
        assert running.service.pending == 1
        running.reader.gate.set()
        assert first.result().status_code == 200
    assert running.detect(number_image(8)).status_code == 200
    assert running.reader.batches == [[50], [8]]


def test_a_body_that_does_not_arrive_is_408(start: Start) -> None:
    running = start(patience=0.05)

    async def ask() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await running.client.app(http_scope(), receive, send)
        return sent

    assert running.client.portal.call(ask)[0]["status"] == 408
    assert running.service.pending == 0


def http_scope() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/detect",
        "query_string": b"",
        "headers": [(b"content-type", b"image/png")],
        "client": ("test", 1),
        "root_path": "",
    }


def run_batcher(
    numbers: Sequence[int], read: Callable[[int], tuple[Hashable, int]], **settings: Any
) -> tuple[list[int], list[int]]:
    """Doubles numbers in a batcher; gives the results and the sizes of the batches."""
    sizes: list[int] = []

    def double(kind: Hashable, items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        return [2 * item for item in items]

    async def submit_all() -> list[int]:
        batcher: Batcher[int, int] = Batcher(double, **settings)
        batcher.start()
        tasks = [batcher.submit(lambda number=number: read(number)) for number in numbers]
        try:
            return [finished.result for finished in await asyncio.gather(*tasks)]
        finally:
            await batcher.stop()

    return asyncio.run(submit_all()), sizes


def test_an_item_waits_for_those_that_are_being_read() -> None:
    both = threading.Barrier(2, timeout=60)

    def read(number: int) -> tuple[Hashable, int]:
        both.wait()
        return "kind", number

    assert run_batcher([1, 2], read, size=4, max_wait=60) == ([2, 4], [2])


def test_an_item_does_not_wait_longer_than_it_should() -> None:
    done = threading.Event()

    def read(number: int) -> tuple[Hashable, int]:
        if number == 2:
            assert done.wait(60)
        return "kind", number

    def double(kind: Hashable, items: Sequence[int]) -> list[int]:
        done.set()  # the second one is read only once the first one was run
        return [2 * item for item in items]

    async def submit_both() -> list[int]:
        batcher: Batcher[int, int] = Batcher(double, size=4, max_wait=0.01)
        batcher.start()
        first, second = await asyncio.gather(batcher.submit(lambda: read(1)), batcher.submit(lambda: read(2)))
        await batcher.stop()
        return [first.result, second.result]

    assert asyncio.run(submit_both()) == [2, 4]


def test_more_items_than_there_is_room_for_are_all_run() -> None:
    results, sizes = run_batcher(range(200), lambda number: (number % 3, number), size=2, max_wait=0.001)
    assert results == [2 * number for number in range(200)]
    assert sum(sizes) == 200
    assert max(sizes) <= 2


def test_a_run_that_gives_too_few_results_is_an_error_and_no_endless_wait() -> None:
    async def submit() -> None:
        batcher: Batcher[int, int] = Batcher(lambda kind, items: [], size=4, max_wait=0)
        batcher.start()
        with pytest.raises(RuntimeError, match="0 results for 1 images"):
            await asyncio.wait_for(batcher.submit(lambda: ("kind", 1)), 60)
        await batcher.stop()

    asyncio.run(submit())
