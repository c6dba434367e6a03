"""The order of samples: which sample belongs to which slot. Pure: no files, no clock, no rank hidden inside.

Slot u = step * G + i is the i-th sample of a step's global batch. Stream u mod S owns it, and a stream
belongs to one source for ever. Per epoch of a source its shards are shuffled, the concatenation is cut into
as many ranges as the source has streams, and each stream walks its range, permuting within windows. So what
a slot holds depends on (shard sizes, weights, S, G, seed, window) alone: not on ranks, workers, micro-batches
or restarts. A rank owns S/W neighbouring streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from uniemox_dist.data.draws import largest_remainder, permutation
from uniemox_dist.runtime.errors import UserError

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
    """The endless sequence of draws from one source."""

    def __init__(
        self, shard_samples: Sequence[int], streams: int, seed: int, number: int, window: int
    ) -> None:
        self.counts_M = np.asarray(shard_samples, np.int64)
        self.samples = int(self.counts_M.sum())
        self.streams, self.window, self._key = streams, window, (seed, number)
        # Caches, not state: a method's answer never depends on what was asked before.
        self._window = lru_cache(maxsize=2 * streams)(self._permute_window)
        self._epoch = lru_cache(maxsize=2)(self._shuffle_shards)

    def _permute_window(self, epoch: int, column: int, window: int, length: int) -> np.ndarray:
        return permutation(length, *self._key, epoch, _WINDOW, column, window)

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order_M = permutation(len(self.counts_M), *self._key, epoch, _SHARD_ORDER)
        return order_M, np.concatenate([[0], np.cumsum(self.counts_M[order_M])])

    def draw(self, number: int) -> tuple[int, int, int]:
        """(epoch, shard, row) of the number-th draw; consecutive draws go round the source's streams."""
        epoch, position = divmod(number, self.samples)
        step, column = divmod(position, self.streams)
        base, longer = divmod(self.samples, self.streams)
        start = column * base + min(column, longer)
        length = base + (column < longer)
        window, inside = divmod(step, self.window)
        width = min(self.window, length - window * self.window)
        row = start + window * self.window + int(self._window(epoch, column, window, width)[inside])
        order_M, ends = self._epoch(epoch)
        i = int(np.searchsorted(ends, row, "right")) - 1
        return epoch, int(order_M[i]), row - int(ends[i])


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
                f"data.sources.{poor}.weight={weights[poor]} gives no stream of {streams}; raise it"
            )
        self.streams, self.global_batch = streams, global_batch
        owners = np.repeat(np.arange(len(shares)), shares)
        self.owner_S = owners[permutation(streams, seed, _STREAM_OWNERS)]
        # nth_S: how many earlier streams belong to the same source.
        self.nth_S = np.array([int((self.owner_S[:s] == self.owner_S[s]).sum()) for s in range(streams)])
        self.sources = [
            SourcePlan(counts, int(shares[i]), seed, i, window) for i, counts in enumerate(sources)
        ]

    def place(self, slot: int) -> Place:
        """The sample of a slot."""
        turn, stream = divmod(slot, self.streams)
        number = int(self.owner_S[stream])
        source = self.sources[number]
        return Place(number, *source.draw(turn * source.streams + int(self.nth_S[stream])))

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
