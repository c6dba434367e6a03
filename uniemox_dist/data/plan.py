"""The order of samples: which sample belongs to which slot. Pure functions without files, clock or rank.

Slot u = step * G + i is the i-th sample of a step's global batch. It belongs to stream u mod S, and a stream belongs to
one source for the whole run. In each epoch of a source its shards are shuffled, and their concatenation is cut into as
many ranges as the source has streams. Each stream walks through one range and permutes samples within windows. So the
sample of a slot depends on shard sizes, weights, S, G, seed and window only, and not on ranks, workers, micro-batches
or restarts. A rank owns S/W neighbouring streams.

Symbols: S streams, G global batch, W world size.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uniemox_dist.config.data_sections import check_streams
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.rng import largest_remainder, permutation

_SHARD_ORDER, _WINDOW, _STREAM_OWNERS = 1, 2, 9


@dataclass(frozen=True)
class Place:
    """Location of a slot's sample."""

    source: int
    epoch: int
    shard: int
    """Position in the source's manifest."""
    row: int
    """Row of the shard's index."""


class SourcePlan:
    """The endless sequence of samples drawn from one source.

    Shapes: M shards, C columns (the ranges of an epoch, one for each of the source's streams). Consecutive draws take
    the columns in turn, across the ends of epochs too, so a stream may walk through another column in the next epoch.
    """

    def __init__(
        self, shard_samples: Sequence[int], streams: int, seed: int, number: int, window: int
    ) -> None:
        self.counts_M = np.asarray(shard_samples, np.int64)
        self.samples = int(self.counts_M.sum())
        self.streams, self.window, self._key = streams, window, (seed, number)
        self._base, self._longer = divmod(self.samples, streams)
        # Caches, not state: results never depend on earlier calls. A column keeps its latest window only, so memory
        # grows with the number of streams that a process walks, not with the number of steps.
        self._windows: dict[int, tuple[int, int, memoryview]] = {}
        self._shuffled = lru_cache(maxsize=2)(self._shuffle)

    def shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns an epoch's shards in shuffled order (M), and first rows in the concatenation and its end (M+1)."""
        order_M = permutation(len(self.counts_M), *self._key, epoch, _SHARD_ORDER)
        return order_M, np.concatenate([[0], np.cumsum(self.counts_M[order_M])])

    def ranges(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns first row and end (C each) of the range of each of the source's streams in an epoch."""
        column_C = (np.arange(self.streams) - epoch * self.samples) % self.streams
        first_C = column_C * self._base + np.minimum(column_C, self._longer)
        return first_C, first_C + self._base + (column_C < self._longer)

    def draw(self, number: int) -> tuple[int, int, int]:
        """Returns (epoch, shard, row) of the number-th draw; consecutive draws take the source's streams in turn."""
        epoch, position = divmod(number, self.samples)
        turn, column = divmod(position, self.streams)
        window, inside = divmod(turn, self.window)
        row = column * self._base + min(column, self._longer) + window * self.window
        row += self._permute(epoch, column, window)[inside]
        order_M, ends = self._shuffled(epoch)
        i = bisect_right(ends, row) - 1
        return epoch, order_M[i], row - ends[i]

    def _permute(self, epoch: int, column: int, window: int) -> memoryview:
        latest = self._windows.get(column)
        if latest is None or latest[:2] != (epoch, window):
            length = self._base + (column < self._longer) - window * self.window
            rows = permutation(min(self.window, length), *self._key, epoch, _WINDOW, column, window)
            small = rows.astype(np.min_scalar_type(self.window))
            self._windows[column] = latest = epoch, window, small.data
        return latest[2]

    def _shuffle(self, epoch: int) -> tuple[memoryview, memoryview]:
        # Memory views, because numpy is slower at looking up a single number.
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
        prefix: str = "batch.",
        source: str = "data.sources.{}",
    ) -> None:
        """`prefix` and `source` are what errors call the settings of batches and a source."""
        check_streams(global_batch, streams, 1, prefix)
        shares = largest_remainder(weights, streams)
        if (shares < 1).any():
            smallest = int(np.argmin(shares))
            raise UserError(
                f"{source.format(smallest)}: a share of {100 * weights[smallest] / sum(weights):.2g} % gives it none "
                f"of {prefix}streams={streams}; raise its weight or repeat, or {prefix}streams"
            )
        self.streams, self.global_batch = streams, global_batch
        owners = np.repeat(np.arange(len(shares)), shares)
        self.owner_S = owners[permutation(streams, seed, _STREAM_OWNERS)]
        # nth_S: number of earlier streams of the same source.
        self.nth_S = np.empty(streams, np.int64)
        for number, share in enumerate(shares):
            self.nth_S[self.owner_S == number] = np.arange(share)
        self._streams = list(zip(self.owner_S.tolist(), self.nth_S.tolist()))
        self.sources = [
            SourcePlan(counts, int(shares[i]), seed, i, window) for i, counts in enumerate(sources)
        ]

    def locate(self, slot: int) -> Place:
        """Returns the location of a slot's sample."""
        turn, stream = divmod(slot, self.streams)
        number, nth = self._streams[stream]
        source = self.sources[number]
        return Place(number, *source.draw(turn * source.streams + nth))

    @property
    def shares(self) -> tuple[int, ...]:
        """Number of streams of each source; they add up to `streams`."""
        return tuple(source.streams for source in self.sources)

    def source_samples(self, step: int) -> list[int]:
        """Returns how many samples of each source the steps before `step` use, repeats included."""
        return [step * (self.global_batch // self.streams) * share for share in self.shares]

    def rank_slot(self, number: int, rank: int, world_size: int) -> int:
        """Returns the slot of the number-th sample of a rank. All ranks together have each slot once."""
        turn, stream = divmod(number, self.streams // world_size)
        return turn * self.streams + rank * (self.streams // world_size) + stream

    def rank_slots(self, step: int, rank: int, world_size: int) -> list[int]:
        """Returns the slots of one rank in one step, ascending. All ranks together have each slot of the step once."""
        own = self.global_batch // world_size
        return [self.rank_slot(number, rank, world_size) for number in range(step * own, (step + 1) * own)]

    def walk(self, first: int, rank: int, world_size: int, micro_batch: int) -> Iterator[list[int]]:
        """Yields the slots of a rank's micro-batches without end, from its sample number `first` on. None of them
        crosses the end of a step."""
        own = self.global_batch // world_size
        while True:
            end = min(first + micro_batch, (first // own + 1) * own)
            yield [self.rank_slot(number, rank, world_size) for number in range(first, end)]
            first = end
