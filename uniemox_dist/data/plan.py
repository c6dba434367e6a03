"""The order of samples: which sample belongs to which slot. Pure: no files, no clock, no rank hidden inside.

Slot u = step * G + i is the i-th sample of a step's global batch. Stream u mod S owns it, and a stream
belongs to one source for ever. Per epoch of a source its shards are shuffled, the concatenation is cut into
as many ranges as the source has streams, and each stream walks its range, permuting within windows. So what
a slot holds depends on (shard sizes, weights, S, G, seed, window) alone: not on ranks, workers, micro-batches
or restarts. A rank owns S/W neighbouring streams.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uniemox_dist.core.errors import UserError
from uniemox_dist.data.rng import largest_remainder, permutation

_SHARD_ORDER, _WINDOW, _STREAM_OWNERS = 1, 2, 9


@dataclass(frozen=True)
class Place:
    """Where a slot's sample lies."""

    source: int
    epoch: int
    shard: int
    """Position in the source's manifest."""
    row: int
    """Row of the shard's index."""


class SourcePlan:
    """The endless sequence of draws from one source.

    Shapes: M shards, C columns (an epoch's ranges, as many as the source has streams). Draws go round the columns,
    over the ends of epochs too, so that from epoch to epoch a stream may walk another column.
    """

    def __init__(
        self, shard_samples: Sequence[int], streams: int, seed: int, number: int, window: int
    ) -> None:
        self.counts_M = np.asarray(shard_samples, np.int64)
        self.samples = int(self.counts_M.sum())
        self.streams, self.window, self._key = streams, window, (seed, number)
        self._base, self._longer = divmod(self.samples, streams)
        # Caches, not state: a method's answer never depends on what was asked before. A column keeps its latest
        # window alone, so that memory grows with the streams that a process walks, not with how far it walks.
        self._windows: dict[int, tuple[int, int, memoryview]] = {}
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shards as shuffled (M) and the first row of each in their concatenation, with the end (M+1)."""
        order_M = permutation(len(self.counts_M), *self._key, epoch, _SHARD_ORDER)
        return order_M, np.concatenate([[0], np.cumsum(self.counts_M[order_M])])

    def ranges(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """First row and end (C each), in the epoch's concatenation, of what each of the source's streams draws."""
        column_C = (np.arange(self.streams) - epoch * self.samples) % self.streams
        first_C = column_C * self._base + np.minimum(column_C, self._longer)
        return first_C, first_C + self._base + (column_C < self._longer)

    def draw(self, number: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of the number-th draw; consecutive draws go round the source's streams."""
        epoch, position = divmod(number, self.samples)
        turn, column = divmod(position, self.streams)
        window, inside = divmod(turn, self.window)
        row = column * self._base + min(column, self._longer) + window * self.window
        row += self._permuted(epoch, column, window)[inside]
        order_M, ends = self._shuffled(epoch)
        i = bisect_right(ends, row) - 1
        return epoch, order_M[i], row - ends[i]

    def _permuted(self, epoch: int, column: int, window: int) -> memoryview:
        latest = self._windows.get(column)
        if latest is None or latest[:2] != (epoch, window):
            length = self._base + (column < self._longer) - window * self.window
            rows = permutation(min(self.window, length), *self._key, epoch, _WINDOW, column, window)
            small = rows.astype(np.min_scalar_type(self.window))
            self._windows[column] = latest = epoch, window, small.data
        return latest[2]

    def _shuffle(self, epoch: int) -> tuple[memoryview, memoryview]:
        # Memory views, since numpy takes longer to look up one number than Python does.
        order_M, ends = self.shard_order(epoch)
        return order_M.data, ends.data


class Plan:
    """The order of samples of a run.

    Raises:
        UserError: if streams do not divide the global batch, or a source gets no stream.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[int]],
        weights: Sequence[float],
        *,
        streams: int,
        global_batch: int,
        seed: int,
        window: int,
    ) -> None:
        if global_batch % streams:
            raise UserError(f"batch.global_batch={global_batch} is not a multiple of batch.streams={streams}")
        shares = largest_remainder(weights, streams)
        if (shares < 1).any():
            poor = int(np.argmin(shares))
            raise UserError(
                f"data.sources.{poor}: its {100 * weights[poor] / sum(weights):.2g} % of the slots give none of "
                f"batch.streams={streams}; raise its weight or repeat, or batch.streams"
            )
        self.streams, self.global_batch = streams, global_batch
        owners = np.repeat(np.arange(len(shares)), shares)
        self.owner_S = owners[permutation(streams, seed, _STREAM_OWNERS)]
        # nth_S: how many earlier streams belong to the same source.
        self.nth_S = np.empty(streams, np.int64)
        for source, share in enumerate(shares):
            self.nth_S[self.owner_S == source] = np.arange(share)
        self._streams = list(zip(self.owner_S.tolist(), self.nth_S.tolist()))
        self.sources = [
            SourcePlan(counts, int(shares[i]), seed, i, window) for i, counts in enumerate(sources)
        ]

    def place(self, slot: int) -> Place:
        """The sample of a slot."""
        turn, stream = divmod(slot, self.streams)
        number, nth = self._streams[stream]
        source = self.sources[number]
        return Place(number, *source.draw(turn * source.streams + nth))

    @property
    def shares(self) -> tuple[int, ...]:
        """Streams of each source; they add up to `streams`."""
        return tuple(source.streams for source in self.sources)

    def source_samples(self, step: int) -> list[int]:
        """Samples of each source in the steps before `step`, repeats included."""
        return [step * (self.global_batch // self.streams) * share for share in self.shares]

    def rank_slots(self, step: int, rank: int, world_size: int) -> list[int]:
        """The slots of one rank in one step, rising; over all ranks they are the global batch, once each."""
        own = self.streams // world_size
        first = step * self.global_batch
        return [
            first + turn * self.streams + stream
            for turn in range(self.global_batch // self.streams)
            for stream in range(rank * own, (rank + 1) * own)
        ]

    def micro_batches(self, step: int, rank: int, world_size: int, micro_batch: int) -> list[list[int]]:
        """A rank's slots of one step, cut into micro-batches."""
        slots = self.rank_slots(step, rank, world_size)
        return [slots[i : i + micro_batch] for i in range(0, len(slots), micro_batch)]
