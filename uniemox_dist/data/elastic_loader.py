"""Loaders of an elastic stream for any training loop: with our loader processes, or for a torch DataLoader."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data._utils.pin_memory import pin_memory

from uniemox_dist.core.errors import LostPeer, UserError, describe_lost_contact, is_lost_contact
from uniemox_dist.data.adapters import MicroBatchSampler
from uniemox_dist.data.batch_loader import BatchLoader
from uniemox_dist.data.elastic_sources import check_number, check_whole
from uniemox_dist.data.stateful_loader import StatefulLoader
from uniemox_dist.data.stream import Stream
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import find_world, is_joined


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch on its way from a loader process."""

    content: Any
    """What `collate` made of the samples, or their list."""
    samples: int
    damaged: tuple[str, ...]
    """One line per sample that was replaced."""

    def pin_memory(self) -> "LoadedBatch":
        """Pins the tensors; the DataLoader's thread calls this."""
        return LoadedBatch(pin_memory(self.content), self.samples, self.damaged)


class _Load:
    """Makes a micro-batch of its slots. It does not refer to the loader, which so ends its processes as soon as the
    user drops it."""

    def __init__(self, stream: Stream[Any], collate: Callable[[list[Any]], Any] | None) -> None:
        self.stream, self.collate = stream, collate

    def __call__(self, slots: list[int]) -> LoadedBatch:
        damaged: list[str] = []
        samples = [self.stream.take(slot, self.stream.transform_sample, damaged) for slot in slots]
        return LoadedBatch(self.collate(samples) if self.collate else samples, len(slots), tuple(damaged))


class ElasticLoader(StatefulLoader):
    """This rank's micro-batches. Each iteration begins at the stream's position and ends with the pass.

    The position counts the micro-batches that were yielded, not those that loader processes have prepared. Loader
    processes live until `close`, or until the position is changed.
    """

    def __init__(
        self,
        stream: Stream[Any],
        micro_batch: int,
        *,
        workers: int,
        prefetch: int,
        collate: Callable[[list[Any]], Any] | None,
        pin_memory: bool,
        timeout_s: float,
    ) -> None:
        """Arguments are those of `ElasticShards.loader`."""
        check_whole("workers", workers, 0)
        check_whole("prefetch", prefetch, 1)
        check_number("timeout_s", timeout_s, 1)
        if collate is not None and not callable(collate):
            raise UserError(f"collate={collate!r}: is not a function of a list of samples")
        super().__init__(stream, micro_batch, MicroBatchSampler(stream, micro_batch))
        self._workers, self._prefetch, self._pin, self._timeout_s = workers, prefetch, pin_memory, timeout_s
        self._collate = collate
        self._batches: BatchLoader[LoadedBatch] | None = None
        self._next = -1
        """Number of the sample of this rank that begins the next micro-batch of `_batches`."""
        self._ranks_checked = False

    def __iter__(self) -> Iterator[Any]:
        stream = self.stream
        self._check_ranks()
        end = stream.pass_end(stream.position.number)
        while stream.position.number < end:
            batch = self._load_next()
            stream.note_damaged(batch.damaged, batch.samples)
            stream.advance(batch.samples)
            yield batch.content

    def close(self) -> None:
        """Ends the loader processes; the next iteration starts others."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __del__(self) -> None:
        if getattr(self, "_batches", None) is not None:
            self.close()

    def _load_next(self) -> LoadedBatch:
        number = self.stream.position.number
        if self._batches is not None and self._next != number:
            self.close()
        if self._batches is None:
            self._batches = self._start(number)
        try:
            batch = self._batches.next_batch()
        except BaseException:
            self.close()
            raise
        self._next = number + batch.samples
        return batch

    def _start(self, number: int) -> BatchLoader[LoadedBatch]:
        stream = self.stream
        return BatchLoader(
            stream,
            _Load(stream, self._collate),
            stream.plan.walk(number, stream.world.rank, stream.world.size, self.micro_batch),
            workers=self._workers,
            prefetch=self._prefetch,
            timeout_s=self._timeout_s,
            pin=self._pin,
        )

    def _check_ranks(self) -> None:
        """Checks once that all ranks read the same sequence from the same position, each as another rank. Collective
        if the program has initialised torch.distributed. Ranks of the program that hold parts of one model read as the
        same rank, equally many for each.

        Raises:
            UserError: on every rank, naming what differs.
        """
        world = self.stream.world
        self.stream.check_world()
        if self._ranks_checked or not is_joined():
            return
        self._ranks_checked = True
        try:
            everyone = collectives.gather_objects((world.rank, self.stream.state_dict()), find_world())
        except RuntimeError as error:
            if not is_lost_contact(str(error)):
                raise
            raise LostPeer(describe_lost_contact(str(error))) from None
        ranks = [rank for rank, _ in everyone]
        if len(everyone) == 1 or world.size == 1:
            return
        if len({ranks.count(rank) for rank in range(world.size)}) > 1 or len(ranks) % world.size:
            counts = ", ".join(f"{rank} ({ranks.count(rank)})" for rank in range(world.size))
            raise UserError(
                f"rank: {len(ranks)} processes read as ranks {counts} of world_size={world.size}, so some samples "
                "would be read more often than others; leave rank and world_size out, or give each rank to equally "
                "many processes"
            )
        for rank, state in everyone:
            for name, value in everyone[0][1].items():
                if state[name] != value:
                    raise UserError(
                        f"{name}: rank {ranks[0]} has {value} and rank {rank} has {state[name]}; open the stream alike "
                        "on all ranks, and load the same state"
                    )
