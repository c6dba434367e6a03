"""An elastic stream inside loaders of other libraries."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, Sampler, get_worker_info

from uniemox_dist.data.stream import Stream


class MicroBatchSampler(Sampler[list[int]]):
    """The slots of this rank's micro-batches from the stream's position to the end of the epoch: a batch sampler for
    `torch.utils.data.DataLoader(stream, batch_sampler=…)`."""

    def __init__(self, stream: Stream[Any], micro_batch: int) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        stream.count_micro_batches(micro_batch)
        self.stream, self.micro_batch = stream, micro_batch

    def __len__(self) -> int:
        return self.stream.count_left(self.micro_batch)

    def __iter__(self) -> Iterator[list[int]]:
        stream, world = self.stream, self.stream.world
        walk = stream.plan.walk(stream.position.number, world.rank, world.size, self.micro_batch)
        return islice(walk, len(self))


class ElasticSource(IterableDataset[Any]):
    """The samples of this rank from the stream's position to the end of the epoch, one by one: the first stage of a
    `webdataset.DataPipeline`, or the data set of a DataLoader.

    In loader processes each yields whole micro-batches in turn, so that a loader which makes batches of `micro_batch`
    samples in each process has them in the stream's order, with any number of processes.
    """

    def __init__(self, stream: Stream[Any], micro_batch: int) -> None:
        """Raises UserError as `Stream.count_micro_batches`."""
        self.batches = MicroBatchSampler(stream, micro_batch)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, every = (worker.id, worker.num_workers) if worker else (0, 1)
        for slots in islice(self.batches, first, None, every):
            yield from map(self.batches.stream.__getitem__, slots)


class TrackedLoader:
    """A loader of another library over a stream, whose batches it counts: each iteration is the rest of the epoch, and
    the state is that of the stream after the batches that were yielded."""

    def __init__(self, stream: Stream[Any], loader: Iterable[Any], micro_batch: int) -> None:
        """`loader` yields micro-batches of `micro_batch` samples from a MicroBatchSampler or an ElasticSource of the
        stream. Raises UserError as `Stream.count_micro_batches`."""
        self.batches, self.loader = MicroBatchSampler(stream, micro_batch), loader

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for slots, batch in zip(self.batches, self.loader):
            self.batches.stream.advance(len(slots))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The stream's state."""
        return self.batches.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads the stream's state."""
        self.batches.stream.load_state_dict(state)
