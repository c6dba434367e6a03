"""An elastic stream inside loaders of other libraries."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, Sampler, get_worker_info

from uniemox_dist.data.stateful_loader import StatefulLoader
from uniemox_dist.data.stream import Stream


class MicroBatchSampler(Sampler[list[int]]):
    """The slots of this rank's micro-batches from the stream's position to the end of the pass: a batch sampler for
    `torch.utils.data.DataLoader(stream, batch_sampler=…)`."""

    def __init__(self, stream: Stream[Any], micro_batch: int) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        stream.count_micro_batches(micro_batch)
        self.stream, self.micro_batch = stream, micro_batch

    def __len__(self) -> int:
        """Micro-batches of a whole pass."""
        return self.stream.pass_samples // self.micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        stream, world = self.stream, self.stream.world
        stream.check_world()
        walk = stream.plan.walk(stream.position.number, world.rank, world.size, self.micro_batch)
        return islice(walk, stream.count_left(self.micro_batch))

    def set_epoch(self, epoch: int) -> None:
        """Goes forward to the beginning of pass `epoch`, if the position is in an earlier one. Trainers call this, and
        some load no state of a loader if the checkpoint was written at the end of an epoch."""
        self.stream.begin_pass(epoch)


class ElasticSource(IterableDataset[Any]):
    """The samples of this rank from the stream's position to the end of the pass, one by one: the first stage of a
    `webdataset.DataPipeline`, or the data set of a DataLoader.

    In loader processes each yields whole micro-batches in turn, so that a loader which makes batches of `micro_batch`
    samples in each process has them in the stream's order, with any number of processes.
    """

    def __init__(self, stream: Stream[Any], micro_batch: int) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        stream.count_micro_batches(micro_batch)
        self.stream, self.micro_batch = stream, micro_batch
        self._next: int | None = None
        """Where this loader process would begin its next epoch; None before its first, and in other processes."""

    def __iter__(self) -> Iterator[Any]:
        worker, stream, world = get_worker_info(), self.stream, self.stream.world
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        stream.check_world()
        number = stream.position.number  # of a loader process: as it was when the process was started
        if self._next is not None:
            number = self._next if stream.position.begin is None else stream.position.begin
        if worker is not None:
            self._next = stream.pass_end(number)
        walk = stream.plan.walk(number, world.rank, world.size, self.micro_batch)
        for slots in islice(walk, first, stream.count_left(self.micro_batch, number), every):
            yield from map(stream.__getitem__, slots)


class TrackedLoader(StatefulLoader):
    """A loader of another library over a stream, whose batches it counts: each iteration is the rest of the pass, and
    the state is that of the stream after the batches that were yielded."""

    def __init__(self, stream: Stream[Any], loader: Iterable[Any], micro_batch: int) -> None:
        """`loader` yields micro-batches of `micro_batch` samples from a MicroBatchSampler or an ElasticSource of the
        stream. Raises UserError as `Stream.count_micro_batches`."""
        super().__init__(stream, micro_batch, MicroBatchSampler(stream, micro_batch))
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        self.stream.position.mark()
        for slots, batch in zip(self.sampler, self.loader):
            self.stream.advance(len(slots))
            yield batch
