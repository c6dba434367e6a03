"""The micro-batches of one rank, step by step, from loader processes.

Loader processes hold no state of the stream: what they are asked for names its slots. One that dies or is stuck ends
the step with an error that names it and the sample that it was working on.
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
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.data.buffers import NONE, ViewBuffers
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.sources import kept_rows, shared_micro_batches
from uniemox_dist.data.worker_transport import LENDERS, Failure, LoadedDataset, Sent

LOOK_S = 5
"""How often a rank that waits for a micro-batch looks whether its loader processes live."""
JOIN_S = 5.0
"""How long a killed process is waited for: one that hangs in a read of a dead file system cannot even be killed."""


class PlannedSampler(Sampler[tuple[list[int], int]]):
    """The micro-batches of one rank from a step on, without end, each with the buffer that its views go into."""

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
                yield slots, NONE if self.buffers is None else self.buffers.take()
            step += 1


class StepBatches:
    """The micro-batches of one rank, step by step, from loader processes that end when this is closed."""

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
        batch, data = config.batch, config.data
        self.dataset, self.timeout_s = dataset, data.timeout_s
        self.grad_accum = batch.global_batch // (batch.micro_batch * world_size)
        workers = data.workers
        for reader in dataset.readers:
            reader.keep_rows = kept_rows(config, world_size)
        # Slot, time and process of each loader process; in memory that they share with this one.
        self._at = torch.full((max(1, workers), 3), -1, dtype=torch.int64).share_memory_()
        dataset.at = self._at
        at, parent = self._at, os.getpid()

        def start(worker: int) -> None:
            start_worker(parent)
            at[worker, 2] = os.getpid()

        self._buffers: ViewBuffers | None = None
        if workers:
            views = dataset.views * batch.micro_batch
            count = shared_micro_batches(config, world_size)
            self._buffers = ViewBuffers(count, views, dataset.settings.image_size)
            LENDERS[id(self._buffers)] = self._buffers
        loader = DataLoader(
            LoadedDataset(dataset, self._buffers),
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
            timeout=min(LOOK_S, data.timeout_s) if workers else 0,
            worker_init_fn=start,
            # A fork server would be a further process, one that dies of the signals that Slurm sends to all.
            multiprocessing_context="fork" if workers else None,
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[MicroBatch | Sent | Failure] | None = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # torch reports a dead loader process from a signal handler: in whatever line the step was then.
        fault = self._explained(error) if isinstance(error, RuntimeError) else None
        self.close()
        if fault is not None:
            raise fault from None

    def next_step(self) -> list[MicroBatch]:
        """All micro-batches of the next step.

        Raises:
            Fault: if a loader process died or is stuck, naming it and its sample; or if the data cannot be read.
        """
        return [self._next() for _ in range(self.grad_accum)]

    def close(self) -> None:
        """Ends the loader processes: they ignore SIGTERM, with which Python would end them, and wait on."""
        left = [process for process in self._processes if process.is_alive()]
        if left and self._iterator is not None:
            # Otherwise torch would call their end a fault: its signal handler watches what was named to it.
            torch._C._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False  # type: ignore[attr-defined]
        # After an error inside the iterator its traceback still holds it, and its processes run on.
        self._iterator = None
        for process in left:
            process.kill()
        for process in left:
            process.join(JOIN_S)
            if process.is_alive():
                # At its end Python would wait for this process, and so for ever.
                multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]
        self._processes = []
        self.dataset.close()

    def _next(self) -> MicroBatch:
        assert self._iterator is not None
        began = time.monotonic()
        while True:
            try:
                found = next(self._iterator)
                break
            except RuntimeError as error:
                # torch gives up after its timeout and can be asked again; by then it has looked for dead processes.
                if "timed out" in str(error) and time.monotonic() - began < self.timeout_s:
                    continue
                if (fault := self._explained(error)) is not None:
                    raise fault from None
                raise
        if isinstance(found, Failure):
            raise (UserError if found.user else Fault)(found.text)
        return found.received() if isinstance(found, Sent) else found

    def _explained(self, error: RuntimeError) -> Fault | None:
        """Which loader process an error of torch's is about, and its sample; None if it is about none."""
        text = str(error)
        if "DataLoader worker" not in text and "DataLoader timed out" not in text:
            return None
        dead = {process.pid: process.exitcode for process in self._processes if not process.is_alive()}
        now = time.monotonic_ns()
        lines = []
        for worker, (slot, since_ns, pid) in enumerate(self._at.tolist()):
            at = "between two micro-batches" if slot < 0 else f"at {self.dataset.name(slot)}"
            if pid in dead:
                lines.append(f"loader process {worker} (pid {pid}) died{_how(dead[pid])} {at}")
            elif "timed out" in text and slot >= 0 and now - since_ns > self.timeout_s * 1e9 / 2:
                lines.append(
                    f"loader process {worker} (pid {pid}) has been stuck for {(now - since_ns) / 1e9:.0f} s {at}"
                )
        waited = f"; no micro-batch within data.timeout_s={self.timeout_s}" if "timed out" in text else ""
        return Fault(("; ".join(lines) or text.strip().splitlines()[0]) + waited)


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f" (exit code {exitcode})"
    name = signal.Signals(-exitcode).name
    return f" of {name}" + (" (killed, perhaps for its memory)" if name == "SIGKILL" else "")


def start_worker(parent: int) -> None:
    """What each loader process does first; `parent` is the process that started it."""
    torch.set_num_threads(1)
    # A killed training process takes its loader processes with it: they share its lock on the run's folder, which
    # the next attempt wants at once. (prctl's option 1 is PR_SET_PDEATHSIG.)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Slurm signals every process of a step; only the training process acts on it.
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)
