"""The micro-batches of one rank, step by step, from loader processes.

Loader processes keep no state of the stream: each request names its slots. If one dies or hangs, the step ends with an
error that names the process and the sample it was loading.
"""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from types import TracebackType

import torch
from torch.utils.data import DataLoader, Sampler

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.sources import count_kept_rows, count_shared_micro_batches
from uniemox_dist.data.worker_transport import (
    NO_BUFFER,
    POOLS,
    SharedMicroBatch,
    ViewBuffers,
    WorkerDataset,
    WorkerError,
)

POLL_S = 5
"""Seconds between checks of a waiting rank that its loader processes are alive."""
JOIN_S = 5.0
"""Longest wait for a killed process. A process that hangs in a read of a dead file system cannot be killed."""


class PlannedSampler(Sampler[tuple[list[int], int]]):
    """Yields the slots of one rank's micro-batches from a step on, without end, each with a buffer for its views."""

    def __init__(
        self,
        plan: Plan,
        *,
        first_step: int,
        rank: int,
        world_size: int,
        micro_batch: int,
        buffers: ViewBuffers | None = None,
    ) -> None:
        self.plan, self.first_step, self.buffers = plan, first_step, buffers
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        step = self.first_step
        while True:
            for slots in self.plan.micro_batches(step, self.rank, self.world_size, self.micro_batch):
                yield slots, NO_BUFFER if self.buffers is None else self.buffers.acquire()
            step += 1


class StepBatches:
    """The micro-batches of one rank, step by step. Its loader processes end when it is closed."""

    def __init__(
        self,
        dataset: PlannedDataset,
        config: Config,
        *,
        first_step: int,
        rank: int,
        world_size: int,
        pin: bool,
    ) -> None:
        """
        Args:
            first_step: 0-based number of the first step.
            pin: copy micro-batches to pinned memory, for asynchronous copies to a GPU.
        """
        batch, data = config.batch, config.data
        self.dataset, self.timeout_s = dataset, data.timeout_s
        self.grad_accum = batch.global_batch // (batch.micro_batch * world_size)
        workers = data.workers
        for reader in dataset.readers:
            reader.keep_rows = count_kept_rows(config, world_size)
        # Slot, time (ns) and pid of each loader process, in shared memory. Numpy sets a number faster than torch.
        self._positions = torch.full((max(1, workers), 3), -1, dtype=torch.int64).share_memory_().numpy()
        dataset.positions = self._positions
        positions, parent = self._positions, os.getpid()

        def start(worker: int) -> None:
            set_up_worker(parent)
            positions[worker, 2] = os.getpid()

        self._buffers: ViewBuffers | None = None
        if workers:
            views = dataset.views_per_sample * batch.micro_batch
            count = count_shared_micro_batches(config, world_size)
            self._buffers = ViewBuffers(count, views, dataset.settings.image_size)
            POOLS[id(self._buffers)] = self._buffers
        loader = DataLoader(
            WorkerDataset(dataset, self._buffers),
            batch_size=None,  # an item is a micro-batch already
            sampler=PlannedSampler(
                dataset.plan,
                first_step=first_step,
                rank=rank,
                world_size=world_size,
                micro_batch=batch.micro_batch,
                buffers=self._buffers,
            ),
            num_workers=workers,
            prefetch_factor=data.prefetch if workers else None,
            pin_memory=pin,
            timeout=min(POLL_S, data.timeout_s) if workers else 0,
            worker_init_fn=start,
            # A fork server would be one more process, and it would die of the signals that Slurm sends to all.
            multiprocessing_context="fork" if workers else None,
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[MicroBatch | SharedMicroBatch | WorkerError] | None = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # torch reports a dead loader process from a signal handler, which can interrupt any line of the step.
        fault = self._explain(error) if isinstance(error, RuntimeError) else None
        self.close()
        if fault is not None:
            raise fault from None

    def next_step(self) -> list[MicroBatch]:
        """Returns all micro-batches of the next step.

        Raises:
            Fault: if a loader process died or hangs (naming it and its sample), or the data cannot be read.
        """
        return [self._next() for _ in range(self.grad_accum)]

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
        self.dataset.close()

    def _next(self) -> MicroBatch:
        assert self._iterator is not None
        started = time.monotonic()
        while True:
            try:
                batch = next(self._iterator)
                break
            except RuntimeError as error:
                # The iterator can be asked again after torch's timeout; torch has checked for dead processes by then.
                if "timed out" in str(error) and time.monotonic() - started < self.timeout_s:
                    continue
                if (fault := self._explain(error)) is not None:
                    raise fault from None
                raise
        if isinstance(batch, WorkerError):
            raise batch.to_exception()
        return batch.unpack() if isinstance(batch, SharedMicroBatch) else batch

    def _explain(self, error: RuntimeError) -> Fault | None:
        """Turns torch's error about a loader process into a Fault that names process and sample; None for others."""
        text = str(error)
        if "DataLoader worker" not in text and "DataLoader timed out" not in text:
            return None
        dead = {process.pid: process.exitcode for process in self._processes if not process.is_alive()}
        now = time.monotonic_ns()
        lines = []
        for worker, (slot, since_ns, pid) in enumerate(self._positions.tolist()):
            where = "between two micro-batches" if slot < 0 else f"at {self.dataset.describe_slot(slot)}"
            if pid in dead:
                lines.append(f"loader process {worker} (pid {pid}) died{_describe_exit(dead[pid])} {where}")
            elif "timed out" in text and slot >= 0 and now - since_ns > self.timeout_s * 1e9 / 2:
                lines.append(
                    f"loader process {worker} (pid {pid}) has been stuck for {(now - since_ns) / 1e9:.0f} s {where}"
                )
        waited = f"; no micro-batch within data.timeout_s={self.timeout_s}" if "timed out" in text else ""
        return Fault(("; ".join(lines) or text.strip().splitlines()[0]) + waited)


def _describe_exit(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f" (exit code {exitcode})"
    name = signal.Signals(-exitcode).name
    return f" of {name}" + (" (possibly out of memory)" if name == "SIGKILL" else "")


def set_up_worker(parent: int) -> None:
    """Prepares a loader process; runs first in each. `parent` is the pid of the process that started it."""
    torch.set_num_threads(1)
    # A loader process must die with its training process: it shares the lock on the run's folder, which the next
    # attempt takes at once. Option 1 of prctl is PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Slurm signals every process of a step, but only the training process handles signals.
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
