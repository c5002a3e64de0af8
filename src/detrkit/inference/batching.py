"""Many items on their way through a model: read ahead in a thread, run in groups, given back in order."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

# Up to this many groups' worth of items wait for others that they can be run with, before a smaller group is
# run: long enough for most shapes of a mixed folder, short enough for the memory.
WAITING_GROUPS = 4
# How long to wait for the thread of a reader that nobody listens to any more; it ends at its next item.
_PATIENCE = 5.0

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_ahead(items: Iterable[_Item], depth: int) -> Iterator[_Item]:
    """Iterates in a background thread, so that the next items are made while the last one is used.

    The thread starts with the first item that is asked for and ends with the iterator, however that ends.

    Args:
        items: What to iterate over.
        depth: Maximum number of items that are made before they are asked for.

    Returns:
        An iterator of the items in their order. An error of ``items`` is raised in its place.
    """
    made: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    room = threading.Semaphore(depth)
    abandoned = threading.Event()

    def make() -> None:
        try:
            iterator = iter(items)
            while room.acquire() and not abandoned.is_set():
                made.put((next(iterator), None))
        except BaseException as error:  # StopIteration too: whatever it is, the caller is to meet it
            made.put((None, error))

    thread = threading.Thread(target=make, name="detrkit-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        abandoned.set()
        room.release()
        thread.join(_PATIENCE)


def newest(items: Iterable[_Item]) -> Iterator[_Item]:
    """Iterates in a background thread, and gives the last item that was made by the time of asking.

    Items that nobody asked for in time are dropped, so that whoever is slower than a camera does not fall
    behind it.

    Args:
        items: What to iterate over.

    Returns:
        An iterator of the items. An error of ``items`` is raised after the last one.
    """
    changed = threading.Condition()
    last: list[_Item] = []
    ended: list[BaseException] = []
    abandoned = threading.Event()

    def make() -> None:
        error: BaseException = StopIteration()
        try:
            for item in items:
                with changed:
                    last[:] = [item]
                    changed.notify()
                if abandoned.is_set():
                    break
        except BaseException as raised:  # the caller is to meet it, whatever it is
            error = raised
        with changed:
            ended.append(error)
            changed.notify()

    thread = threading.Thread(target=make, name="detrkit-newest", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: last or ended)
                if not last:
                    break
                item = last.pop()
            yield item
        if not isinstance(ended[0], StopIteration):
            raise ended[0]
    finally:
        abandoned.set()
        thread.join(_PATIENCE)


def map_in_threads(
    function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int
) -> Iterator[_Result]:
    """Applies a function to items in several threads and gives the results in the order of the items.

    Args:
        function: What to apply; it is called in several threads at once.
        items: Its arguments, iterated over in the caller's thread. Twice as many as there are threads are
            worked on ahead of the result that is asked for.
        threads: How many.

    Returns:
        An iterator of the results. An error of ``function`` or ``items`` is raised in its place.
    """
    if threads == 1:
        yield from map(function, items)
        return
    iterator = iter(items)
    pending: deque[Future[_Result]] = deque()
    stop: Exception | None = None
    pool = ThreadPoolExecutor(threads, thread_name_prefix="detrkit-read-ahead")
    try:
        while pending or stop is None:
            while stop is None and len(pending) < 2 * threads:
                try:
                    pending.append(pool.submit(function, next(iterator)))
                except Exception as error:  # StopIteration too; the results before it come first
                    stop = error
            if pending:
                yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if stop is not None and not isinstance(stop, StopIteration):
        raise stop


def run_in_groups(
    items: Iterable[_Item],
    run: Callable[[Sequence[_Item]], Iterable[_Result]],
    kind: Callable[[_Item], Hashable],
    size: int,
) -> Iterator[_Result]:
    """Runs items together with others of their kind and gives the results in the order of the items.

    Args:
        items: What to run. Only a few groups of them are held at a time.
        run: Gives one result for each item of a group.
        kind: What items of a group have in common.
        size: The most items of a group.

    Returns:
        An iterator of the results, each as soon as it and all before it are there.
    """
    waiting: dict[Hashable, list[tuple[int, _Item]]] = {}
    finished: dict[int, _Result] = {}
    following = 0  # position of the next result to give

    def finish(group: list[tuple[int, _Item]]) -> None:
        positions, members = zip(*group)
        finished.update(zip(positions, run(members)))

    for position, item in enumerate(items):
        group = waiting.setdefault(kind(item), [])
        group.append((position, item))
        if len(group) == size:
            finish(waiting.pop(kind(item)))
        if position + 1 - following >= WAITING_GROUPS * size and following not in finished:
            # The first item in line holds up the results of all behind it.
            first = min(waiting, key=lambda name: waiting[name][0][0])
            finish(waiting.pop(first))
        while following in finished:
            yield finished.pop(following)
            following += 1
    for group in waiting.values():
        finish(group)
    for position in sorted(finished):
        yield finished[position]
