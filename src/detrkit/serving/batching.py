"""Dynamic batching: images that are ready at the same time go through a model together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from detrkit.inference.batching import WAITING_GROUPS

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(eq=False)
class Job(Generic[_Item, _Result]):
    """An item on its way through the model.

    Attributes:
        kind: What items that are run together have in common.
        item: What is run.
        ready_at: When it was ready to be run.
        outcome: What it gave, when its batch began, and how many were in that.
    """

    kind: Hashable
    item: _Item
    ready_at: float
    outcome: asyncio.Future[tuple[_Result, float, int]]


@dataclass
class Times:
    """Where a request spent its time, in seconds.

    Attributes:
        read: Reading and resizing the image.
        wait: Waiting for others and for the model.
        model: In the model, together with the others of its batch.
        batch: How many images went through the model together.
    """

    read: float = 0.0
    wait: float = 0.0
    model: float = 0.0
    batch: int = 0


@dataclass(frozen=True)
class Finished(Generic[_Result]):
    """A result and how long it took."""

    result: _Result
    times: Times = field(default_factory=Times)


class Batcher(Generic[_Item, _Result]):
    """Reads items in threads and runs those of one kind together, in one thread.

    All methods belong to the event loop's thread. An item waits for others only while some are being read,
    and no longer than ``max_wait``: a client that is alone never waits.
    """

    def __init__(
        self,
        run: Callable[[Hashable, Sequence[_Item]], Sequence[_Result]],
        *,
        size: int,
        max_wait: float,
    ) -> None:
        """Makes a batcher; ``start`` starts it.

        Args:
            run: Gives the result of each item of a batch of one kind; it is called in a thread.
            size: The most items of a batch.
            max_wait: Seconds that an item waits for others that are being read.
        """
        self._run, self._size, self._max_wait = run, size, max_wait
        self._ready: list[Job[_Item, _Result]] = []  # in the order in which they got ready
        self._coming = 0  # items that are being read
        self._changed = asyncio.Event()
        # Items that were read take memory. More than can soon be run wait as they were sent.
        self._room = asyncio.Semaphore(WAITING_GROUPS * size)
        threads = max(2, min(8, os.cpu_count() or 1))
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="detrkit-read")
        self._runner = ThreadPoolExecutor(1, thread_name_prefix="detrkit-model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts to run what is submitted."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Ends the threads, what they are doing being done."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._runner.shutdown(wait=False, cancel_futures=True)

    async def submit(self, read: Callable[[], tuple[Hashable, _Item]]) -> Finished[_Result]:
        """Reads an item, runs it and gives its result; whoever is cancelled meanwhile is not run.

        Args:
            read: Gives the item and its kind; it is called in a thread.

        Raises:
            Exception: What ``read`` or ``run`` raise for this item.
        """
        loop, times = asyncio.get_running_loop(), Times()
        async with self._room:
            start = loop.time()
            self._coming += 1
            try:
                kind, item = await loop.run_in_executor(self._readers, read)
            finally:
                self._coming -= 1
                self._changed.set()
            job: Job[_Item, _Result] = Job(kind, item, loop.time(), loop.create_future())
            times.read = job.ready_at - start
            self._ready.append(job)
            result, began, times.batch = await job.outcome
        times.wait = began - job.ready_at
        times.model = loop.time() - began
        return Finished(result, times)

    async def _work(self) -> None:
        while True:
            batch = self._next()
            if batch:
                await self._run_batch(batch)
                continue
            self._changed.clear()
            timeout = self._ready[0].ready_at + self._max_wait - self._now() if self._ready else None
            try:
                await asyncio.wait_for(self._changed.wait(), timeout)
            except asyncio.TimeoutError:
                continue

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _next(self) -> list[Job[_Item, _Result]]:
        """The batch to run now; empty while it is worth waiting."""
        self._ready = [job for job in self._ready if not job.outcome.done()]
        if not self._ready:
            return []
        groups: dict[Hashable, list[Job[_Item, _Result]]] = {}
        for job in self._ready:
            groups.setdefault(job.kind, []).append(job)
        first = groups[self._ready[0].kind]  # holds up everything behind it
        if self._coming and self._ready[0].ready_at + self._max_wait > self._now():
            first = next((group for group in groups.values() if len(group) >= self._size), [])
        batch = first[: self._size]
        self._ready = [job for job in self._ready if job not in batch]
        return batch

    async def _run_batch(self, batch: Sequence[Job[_Item, _Result]]) -> None:
        loop, began = asyncio.get_running_loop(), self._now()
        items = [job.item for job in batch]
        try:
            results = await loop.run_in_executor(self._runner, self._run, batch[0].kind, items)
            if len(results) != len(items):  # somebody would wait for ever
                raise RuntimeError(f"{len(results)} results for {len(items)} images")
        except Exception as error:
            if len(batch) > 1:  # which of them is to blame, the others need not pay for
                for job in batch:
                    await self._run_batch([job])
                return
            if not batch[0].outcome.done():
                batch[0].outcome.set_exception(error)
            return
        for job, result in zip(batch, results):
            if not job.outcome.done():
                job.outcome.set_result((result, began, len(batch)))
