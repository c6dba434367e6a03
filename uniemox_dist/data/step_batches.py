"""The micro-batches of one rank, step by step, from loader processes.

Loader processes hold no state of the stream: what they are asked for names its slots.
"""

import multiprocessing
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import MicroBatch, PlannedDataset
from uniemox_dist.data.plan import Plan
from uniemox_dist.runtime.errors import UserError


class PlannedSampler(Sampler[list[int]]):
    """The micro-batches of one rank from a step on, without end."""

    def __init__(self, plan: Plan, *, first_step: int, rank: int, world_size: int, micro_batch: int) -> None:
        self.plan, self.first_step = plan, first_step
        self.rank, self.world_size, self.micro_batch = rank, world_size, micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        step = self.first_step
        while True:
            yield from self.plan.micro_batches(step, self.rank, self.world_size, self.micro_batch)
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
        batch = config.batch
        self.grad_accum = batch.global_batch // (batch.micro_batch * world_size)
        workers = config.data.workers
        loader = DataLoader(
            dataset,
            batch_size=None,  # an item is a micro-batch already
            sampler=PlannedSampler(
                dataset.plan,
                first_step=first_step,
                rank=rank,
                world_size=world_size,
                micro_batch=batch.micro_batch,
            ),
            num_workers=workers,
            prefetch_factor=config.data.prefetch if workers else None,
            pin_memory=pin,
            worker_init_fn=_start_worker,
            # A fork server would be a further process, one that dies of the signals that Slurm sends to all.
            multiprocessing_context="fork" if workers else None,
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[MicroBatch] | None = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def __enter__(self) -> "StepBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_step(self) -> list[MicroBatch]:
        """All micro-batches of the next step."""
        assert self._iterator is not None
        try:
            return [next(self._iterator) for _ in range(self.grad_accum)]
        except UserError as error:
            # From a loader process it arrives wrapped in that process's whole traceback.
            raise UserError(str(error).strip().splitlines()[-1].rpartition("UserError: ")[2]) from None

    def close(self) -> None:
        """Ends the loader processes: they ignore SIGTERM, with which Python would end them, and wait on."""
        self._iterator = None
        # After an error inside the iterator its traceback still holds it, and its processes run on.
        if left := [process for process in self._processes if process.is_alive()]:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end a fault
            for process in left:
                process.kill()
                process.join()
        self._processes = []


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Slurm signals every process of a step; only the training process acts on it.
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
