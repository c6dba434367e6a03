"""Worker processes that prepare batches of records. Results come back in order, and a bounded number at a time.

Pictures are passed through shared memory, one slot per running task; the pool's own pipes would take as long as the
work itself.
"""

import mmap
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection

from shards.pack.prepare import Batch, Item, Preparation, Preparer, Ready
from shards.pictures.formats import BadPicture
from uniemox_dist.core.errors import Fault

WAITING_BYTES = 96 << 20
"""Limit for results that wait for an earlier one: keeps the workers busy and the parent small."""

PIECES = 512  # per write; Linux allows 1024
ONE_WRITE = 1 << 30  # bytes; a single write is limited to 2 GiB


@dataclass(frozen=True)
class Task:
    """Some records in the order of packing."""

    numbers: list[int]
    lines: list[bytes]
    images: list[bytes | str | BadPicture | None]
    """Pictures that only the parent can read, or why it cannot; None for those that the worker reads."""


class Slot:
    """Memory shared by parent and worker: an anonymous file, which disappears with the parent."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("uniemox-pack")
        self._map: mmap.mmap | None = None
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"

    def write(self, parts: Sequence[bytes]) -> None:
        """Replaces the content."""
        _write_all(self._fd, parts)

    def read(self, length: int) -> memoryview:
        """The first bytes of the content, valid until the slot is used again."""
        if self._map is None or len(self._map) < length:
            # A little larger, so that the mapping can be reused for the next batch.
            size = max(1, length + length // 4)
            if os.fstat(self._fd).st_size < size:
                os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size, prot=mmap.PROT_READ)
        return memoryview(self._map)[:length]

    def close(self) -> None:
        """Frees the memory once no view of it exists."""
        self._map = None
        os.close(self._fd)


class Workers:
    """Worker processes, started at once so that they are ready when the source is listed. 0: this process works."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots: list[Slot] = []
        self._pool: ProcessPoolExecutor | None = None
        if count:
            # Spawned, because a forked onnxruntime or pyarrow may hold locks of threads that no longer exist.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_start)
            for _ in range(count):  # the pool starts a process for each task that finds no idle one
                self._pool.submit(os.getpid)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for slot in self._slots:
            slot.close()

    def prepare(self, tasks: Iterator[Task], preparation: Preparation) -> Iterator[tuple[Task, Batch]]:
        """Prepares tasks; yields the results in the order of the tasks.

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
                "a packing worker died (killed, or out of memory); continue with --resume and fewer --workers"
            ) from None

    def _in_order(
        self, tasks: Iterator[Task], preparation: Preparation, pool: ProcessPoolExecutor
    ) -> Iterator[tuple[Task, Batch]]:
        running: deque[tuple[Task, Slot, Future[list[Item]]]] = deque()
        idle: list[Slot] = []
        batch_bytes = 0.0  # running mean

        def first() -> tuple[Task, Batch]:
            nonlocal batch_bytes
            task, slot, future = running.popleft()
            items = future.result()
            batch = Batch(slot.read(sum(item.length for item in items if isinstance(item, Ready))), items)
            idle.append(slot)
            batch_bytes += (len(batch.data) - batch_bytes) / 8
            return task, batch

        for task in tasks:
            slot = idle.pop() if idle else self._new_slot()
            inline = [image for image in task.images if isinstance(image, bytes)]
            slot.write(inline)
            images = [len(image) if isinstance(image, bytes) else image for image in task.images]
            running.append((task, slot, pool.submit(_work, preparation, slot.path, task.lines, images)))
            allowed = min(4 * self.count, int(WAITING_BYTES / batch_bytes) if batch_bytes else self.count)
            while len(running) > max(self.count, allowed):
                yield first()
        while running:
            yield first()

    def _new_slot(self) -> Slot:
        self._slots.append(Slot())
        return self._slots[-1]


_preparers: dict[Preparation, Preparer] = {}
_slots: dict[str, int] = {}


def _start() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes; the parent handles it
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends a worker whose parent was killed; it would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(
    preparation: Preparation, path: str, lines: list[bytes], images: list[int | str | BadPicture | None]
) -> list[Item]:
    """Runs in a worker. A number in `images` is the length of a picture in the slot, in order; the prepared tar members
    replace these pictures in the slot."""
    if preparation not in _preparers:
        _preparers[preparation] = Preparer(preparation)
    if path not in _slots:
        _slots[path] = os.open(path, os.O_RDWR)
    slot, offset = _slots[path], 0
    given: list[bytes | str | BadPicture | None] = []
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
        if written < total:  # a write may be partial; write the rest piece by piece
            written = 0
            for piece in pieces:
                view = memoryview(piece)
                while view:
                    done = os.pwrite(fd, view, offset + written)
                    view, written = view[done:], written + done
        offset += total
