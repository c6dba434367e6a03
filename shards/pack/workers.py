"""Processes that prepare batches of records; results come back in order, and never too many at once.

Pictures travel through shared memory, one slot for each task under way: through the pool's own pipes they would take
as long as the work itself.
"""

import mmap
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection

from shards.pack.prepare import Batch, Item, Preparation, Preparer
from uniemox_dist.core.errors import Fault

WAITING_BYTES = 96 << 20
"""Of results that wait for an earlier one: workers stay busy, and the parent stays small."""

PIECES = 512  # of one write: half of what Linux allows
ONE_WRITE = 1 << 30  # bytes; one write moves 2 GiB at most


@dataclass(frozen=True)
class Task:
    """Some records in the order of packing."""

    numbers: list[int]
    lines: list[bytes]
    images: list[bytes | str | None]
    """Pictures that only the parent can fetch; None where the worker does."""


class Slot:
    """Memory that parent and workers share: a file without a name, which is gone when the parent is."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("uniemox-pack")
        self._map: mmap.mmap | None = None
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def put(self, parts: Sequence[bytes]) -> None:
        """Replaces the content."""
        _write_all(self._fd, parts)

    def take(self, length: int) -> memoryview:
        """The first bytes of the content, valid until the slot is used again."""
        if self._map is None or len(self._map) < length:
            # A little more than asked for: a mapping that stays needs no copy and no new pages for the next batch.
            size = max(1, length + length // 4)
            if os.fstat(self._fd).st_size < size:
                os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size, prot=mmap.PROT_READ)
        return memoryview(self._map)[:length]

    def close(self) -> None:
        """Gives the memory back, once nobody looks at it any more."""
        self._map = None
        os.close(self._fd)


class Workers:
    """Some processes, started at once, so that they are ready when the source is listed. 0: this process works."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots: list[Slot] = []
        self._pool: ProcessPoolExecutor | None = None
        if count:
            # Fresh processes: a forked onnxruntime or pyarrow may hold locks of threads that do not exist any more.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start)
            for _ in range(count):  # the pool starts a process for each task that finds none idle
                self._pool.submit(os.getpid)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for slot in self._slots:
            slot.close()

    def prepare(self, tasks: Iterator[Task], preparation: Preparation) -> Iterator[tuple[Task, Batch]]:
        """Prepares tasks, in order.

        Raises:
            Fault: if a worker dies.
        """
        if self._pool is None:
            preparer = Preparer(preparation)
            for task in tasks:
                parts, items = preparer(task.lines, task.images)
                yield task, Batch(b"".join(parts), items)
            return
        try:
            yield from self._in_order(tasks, preparation, self._pool)
        except BrokenProcessPool:
            raise Fault(
                "a packing worker died (killed, or out of memory); go on with --resume, and fewer --workers"
            ) from None

    def _in_order(
        self, tasks: Iterator[Task], preparation: Preparation, pool: ProcessPoolExecutor
    ) -> Iterator[tuple[Task, Batch]]:
        under_way: deque[tuple[Task, Slot, Future[list[Item]]]] = deque()
        idle: list[Slot] = []
        batch_bytes = 0.0  # running mean

        def first() -> tuple[Task, Batch]:
            nonlocal batch_bytes
            task, slot, future = under_way.popleft()
            items = future.result()
            batch = Batch(slot.take(sum(item.length for item in items)), items)
            idle.append(slot)
            batch_bytes += (len(batch.data) - batch_bytes) / 8
            return task, batch

        for task in tasks:
            slot = idle.pop() if idle else self._new_slot()
            inline = [image for image in task.images if isinstance(image, bytes)]
            slot.put(inline)
            images = [len(image) if isinstance(image, bytes) else image for image in task.images]
            under_way.append((task, slot, pool.submit(_work, preparation, slot.path, task.lines, images)))
            allowed = min(4 * self.count, int(WAITING_BYTES / batch_bytes) if batch_bytes else self.count)
            while len(under_way) > max(self.count, allowed):
                yield first()
        while under_way:
            yield first()

    def _new_slot(self) -> Slot:
        self._slots.append(Slot())
        return self._slots[-1]


_preparers: dict[Preparation, Preparer] = {}
_slots: dict[str, int] = {}


def _start() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed tells nobody: its workers would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(
    preparation: Preparation, path: str, lines: list[bytes], images: list[int | str | None]
) -> list[Item]:
    """Runs in a worker. Whole numbers in `images` are lengths of pictures that lie in the slot, in order; the tar
    members take their place there."""
    if preparation not in _preparers:
        _preparers[preparation] = Preparer(preparation)
    if path not in _slots:
        _slots[path] = os.open(path, os.O_RDWR)
    slot, offset = _slots[path], 0
    given: list[bytes | str | None] = []
    for image in images:
        if isinstance(image, int):
            given.append(os.pread(slot, image, offset))
            offset += image
        else:
            given.append(image)
    parts, items = _preparers[preparation](lines, given)
    _write_all(slot, parts)
    return items


def _write_all(fd: int, parts: Sequence[bytes]) -> None:
    offset = 0
    for start in range(0, len(parts), PIECES):
        pieces = parts[start : start + PIECES]
        total, written = sum(map(len, pieces)), 0
        if total < ONE_WRITE:
            written = os.pwritev(fd, pieces, offset)
        if written < total:  # a write may take a part only; what is missing goes piece by piece
            written = 0
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    done = os.pwrite(fd, view, offset + written)
                    view, written = view[done:], written + done
        offset += total
