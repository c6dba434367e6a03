"""Batches of a stream from loader processes, in order.

Loader processes keep no state of the stream: each request names its slots. If one dies or hangs, the next batch is an
error that names the process and the sample it was loading.
"""

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from uniemox_dist.core.errors import Fault, UserError

B = TypeVar("B")
L = TypeVar("L")
POLL_S = 5
"""Seconds between checks of a waiting rank that its loader processes are alive."""
PARENT_POLL_S = 0.5
"""Seconds between checks of a loader process that its training process is alive."""
TIMED_OUT = "DataLoader timed out"
"""How torch's error begins when no loader process has sent a batch in time."""
JOIN_S = 5.0
"""Longest wait for a killed process. A process that hangs in a read of a dead file system cannot be killed."""


class Slots(Protocol):
    """What a loader needs of a stream."""

    positions: Any
    worker: int | None

    def describe_slot(self, slot: int) -> str:
        """Names the shard and row of a slot."""
        ...

    def close(self) -> None:
        """Closes open files."""
        ...


@dataclass(frozen=True)
class WorkerError:
    """A UserError or Fault of a loader process. If it were raised there, it would arrive wrapped in a traceback."""

    user: bool
    """True for a UserError, False for a Fault."""
    text: str

    @classmethod
    def from_exception(cls, error: UserError | Fault) -> "WorkerError":
        """Makes the error transportable."""
        return cls(isinstance(error, UserError), str(error))

    def to_exception(self) -> UserError | Fault:
        """Returns the exception to raise in the training process."""
        return (UserError if self.user else Fault)(self.text)


class _Requests(Dataset[Any]):
    """`requests[r]` is the batch of a request, or an error."""

    def __init__(self, load: Callable[[Any], Any], stream: Slots) -> None:
        self.load, self.stream = load, stream

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.load(request)
        except (UserError, Fault) as error:
            return WorkerError.from_exception(error)
        finally:
            if self.stream.worker is not None:
                self.stream.positions[self.stream.worker, 0] = -1


class BatchLoader(Generic[B]):
    """Batches in the order of their requests. Its loader processes end when it is closed."""

    def __init__(
        self,
        stream: Slots,
        load: Callable[[Any], B],
        requests: Iterable[Any],
        *,
        workers: int,
        prefetch: int,
        timeout_s: float,
        pin: bool = False,
        timeout_name: str = "timeout_s",
    ) -> None:
        """
        Args:
            load: makes the batch of a request, in a loader process.
            requests: without end; read ahead by `workers` × `prefetch`.
            pin: copy batches to pinned memory, for asynchronous copies to a GPU.
            timeout_name: what errors call `timeout_s`.
        """
        self.stream, self.timeout_s, self.timeout_name = stream, timeout_s, timeout_name
        # Slot, time (ns) and pid of each loader process, in shared memory. Numpy sets a number faster than torch.
        self._positions = torch.full((max(1, workers), 3), -1, dtype=torch.int64).share_memory_().numpy()
        positions, set_up = self._positions, worker_setup()

        def start(worker: int) -> None:
            set_up(worker)
            stream.positions, stream.worker = positions, worker
            positions[worker, 2] = os.getpid()

        loader = DataLoader(
            _Requests(load, stream),
            batch_size=None,  # an item is a batch already
            sampler=requests,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=pin,
            timeout=min(POLL_S, timeout_s) if workers else 0,
            worker_init_fn=start,
            # A fork server would be one more process, and it would die of the signals that Slurm sends to all.
            multiprocessing_context="fork" if workers else None,
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[B | WorkerError] | None = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]
        _living.add(self)
        if workers:
            _iterators.add(self._iterator)

    def __enter__(self: L) -> L:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # torch reports a dead loader process from a signal handler, which can interrupt any line of the step.
        fault = self.explain(error) if isinstance(error, RuntimeError) else None
        self.close()
        if fault is not None:
            raise fault from None

    def next_batch(self) -> B:
        """Returns the next batch.

        Raises:
            Fault: if a loader process died or hangs (naming it and its sample), or the data cannot be read.
        """
        assert self._iterator is not None
        started = time.monotonic()
        while True:
            try:
                batch = next(self._iterator)
                break
            except RuntimeError as error:
                # The iterator can be asked again after torch's timeout; torch has checked for dead processes by then.
                if str(error).startswith(TIMED_OUT) and time.monotonic() - started < self.timeout_s:
                    continue
                if (fault := self.explain(error)) is not None:
                    raise fault from None
                raise
        if isinstance(batch, WorkerError):
            raise batch.to_exception()
        return batch

    def close(self) -> None:
        """Kills the loader processes. They ignore SIGTERM, which Python would send, and would wait forever."""
        alive = [process for process in self._processes if process.is_alive()]
        if alive and self._iterator is not None:
            # Otherwise torch's signal handler, which watches the registered pids, would report their end as a fault.
            torch._C._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False  # type: ignore[attr-defined]
        # After an error inside the iterator, its traceback still references it, and its processes keep running.
        self._iterator = None
        for process in alive:
            process.kill()
        for process in alive:
            process.join(JOIN_S)
            if process.is_alive():
                # Python would wait for this process at exit, possibly forever.
                multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        self._processes = []
        self.stream.close()

    def forget(self) -> None:
        """Drops the loader in a process that its own has forked, without touching the loader processes."""
        self._iterator, self._processes = None, []

    def explain(self, error: RuntimeError) -> Fault | None:
        """Turns torch's error about a loader process into a Fault that names process and sample; None for others."""
        text = str(error)
        is_timeout = text.startswith(TIMED_OUT)
        # Errors of `load` begin with "Caught", and have the traceback from the loader process.
        if text.startswith("Caught ") or not (is_timeout or "DataLoader worker" in text):
            return None
        dead = {process.pid: process.exitcode for process in self._processes if not process.is_alive()}
        now = time.monotonic_ns()
        lines = []
        for worker, (slot, since_ns, pid) in enumerate(self._positions.tolist()):
            where = "between two micro-batches" if slot < 0 else f"at {self.stream.describe_slot(slot)}"
            if pid in dead:
                lines.append(f"loader process {worker} (pid {pid}) died{_describe_exit(dead[pid])} {where}")
            elif is_timeout and slot >= 0 and now - since_ns > self.timeout_s * 1e9 / 2:
                lines.append(
                    f"loader process {worker} (pid {pid}) has been stuck for {(now - since_ns) / 1e9:.0f} s {where}"
                )
        if is_timeout and not lines:
            lines = [
                "no loader process is busy; a traceback above states the cause, such as a micro-batch that cannot be "
                "pickled"
            ]
        waited = f"; no micro-batch within {self.timeout_name}={self.timeout_s:g}" if is_timeout else ""
        return Fault(("; ".join(lines) or text.strip().splitlines()[0]) + waited)


_living: "WeakSet[BatchLoader[Any]]" = WeakSet()
_iterators: "WeakSet[Any]" = WeakSet()
"""torch's iterators with loader processes. The traceback of an error can keep one after its loader was closed."""


@atexit.register
def _close_all() -> None:
    # Python would wait for loader processes that ignore its SIGTERM. This runs before that, because multiprocessing was
    # imported earlier.
    for loader in list(_living):
        loader.close()


def _forget_in_child() -> None:
    # A forked process inherits the loaders of its parent, and torch would try to end their processes from there.
    # Iterators first: torch would end the processes of one that is dropped without this mark.
    for iterator in list(_iterators):
        iterator._shutdown = True
    for loader in list(_living):
        loader.forget()


os.register_at_fork(after_in_child=_forget_in_child)


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f" (exit code {exitcode})"
    name = signal.Signals(-exitcode).name
    return f" of {name}" + (" (possibly out of memory)" if name == "SIGKILL" else "")


def worker_setup() -> Callable[[int], None]:
    """Returns what each loader process must run first. Call it in the thread that starts the processes."""
    parent, by_main_thread = os.getpid(), threading.current_thread() is threading.main_thread()
    return lambda _: _set_up_worker(parent, by_main_thread)


def _set_up_worker(parent: int, by_main_thread: bool) -> None:
    torch.set_num_threads(1)
    # A loader process must die with its training process: it shares the lock on the run's folder, which the next
    # attempt takes at once.
    if by_main_thread:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # option 1 is PR_SET_PDEATHSIG
    else:  # the kernel would send that signal when the thread ends that started this process
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)
    # Slurm signals every process of a step, but only the training process handles signals.
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)


def _end_with(parent: int) -> None:
    """Ends this process when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
