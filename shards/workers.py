"""Processes that prepare batches of records; results come back in order, and never too many at once."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection

from shards.prepare import Batch, Preparation, Preparer

WAITING_BYTES = 96 << 20
"""Of results that wait for an earlier one: workers stay busy, and the parent stays small."""


@dataclass(frozen=True)
class Task:
    """Some records in the order of packing."""

    numbers: list[int]
    lines: list[bytes]
    images: list[bytes | str | None]
    """Pictures that only the parent can fetch; None where the worker does."""


def prepare_all(
    tasks: Iterator[Task], preparation: Preparation, workers: int
) -> Iterator[tuple[Task, Batch]]:
    """Prepares tasks in order, in this process for 0 workers.

    Raises:
        RuntimeError: if a worker dies.
    """
    if workers == 0:
        preparer = Preparer(preparation)
        for task in tasks:
            yield task, preparer(task.lines, task.images)
        return
    # Fresh processes: a forked onnxruntime or pyarrow may hold locks of threads that do not exist any more.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(preparation,))
    under_way: deque[tuple[Task, Future[Batch]]] = deque()
    batch_bytes = 0.0  # running mean
    try:
        for task in tasks:
            under_way.append((task, pool.submit(_work, task.lines, task.images)))
            allowed = min(4 * workers, int(WAITING_BYTES / batch_bytes) if batch_bytes else 4 * workers)
            while len(under_way) > max(workers, allowed):
                done, future = under_way.popleft()
                batch = future.result()
                batch_bytes += (len(batch.data) - batch_bytes) / 8
                yield done, batch
        while under_way:
            done, future = under_way.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a packing worker died (killed, or out of memory); go on with --resume, and fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_preparer: Preparer | None = None


def _start(preparation: Preparation) -> None:
    global _preparer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _preparer = Preparer(preparation)


def _end_with_parent() -> None:
    """A parent that was killed tells nobody: its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(lines: list[bytes], images: list[bytes | str | None]) -> Batch:
    assert _preparer is not None
    return _preparer(lines, images)
