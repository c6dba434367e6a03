"""A stream of samples: which sample belongs to which slot, how a slot is read, and how far the ranks have read.

Symbols: S streams, G global batch, W world size.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from shards.format.index import ROW_GROUP
from shards.format.manifest import Manifest, combined_identity
from uniemox_dist.config.data_sections import count_micro_batches
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import hide_secrets
from uniemox_dist.data.indexed_reader import DIFFER
from uniemox_dist.data.origin import ShardOrigin
from uniemox_dist.data.plan import Place, Plan
from uniemox_dist.data.reader import DamagedSample, ShardReader
from uniemox_dist.data.stream_position import STATE_VERSION, StreamPosition, check_state
from uniemox_dist.distributed.world import World, check_found

T = TypeVar("T")
RawT = TypeVar("RawT")
R_co = TypeVar("R_co", covariant=True)
log = logging.getLogger("uniemox")

MAX_REPLACEMENTS = 8
"""Consecutive damaged samples on one stream after which loading fails."""
MIN_DAMAGED = 8
"""Number of damaged samples that any reading may have, even if it has read few samples."""


class Reader(Protocol[R_co]):
    """Random access to the samples of one data set, by shard and row."""

    url: str
    manifest: Manifest
    origin: ShardOrigin
    keep_rows: int

    @property
    def counts(self) -> Sequence[int]:
        """Number of samples of each shard."""
        ...

    @property
    def samples(self) -> int:
        """Number of samples."""
        ...

    def read(self, shard: int, row: int) -> R_co:
        """Reads a sample.

        Raises:
            DamagedSample: if its bytes are not those that were indexed.
            Fault: if they cannot be read.
        """
        ...

    def close(self) -> None:
        """Closes open files; the next read opens them again."""
        ...


@dataclass(frozen=True)
class Source(Generic[RawT]):
    """One data set of a mix."""

    data: str | Path | Reader[RawT]
    """A folder, a URL, a tar or a brace pattern of tars; or an open reader."""
    weight: float | None = None
    """Share of the samples, relative to the other sources; 1 if neither this nor `repeat` is given."""
    repeat: float | None = None
    """How often each sample comes in an epoch of the mix; for all sources or for none."""
    index: str | Path | None = None
    """Folder of the index, if it is not beside the tars."""


class Stream(Generic[RawT]):
    """The samples of one or several data sets, as an endless sequence of global batches that ranks share."""

    PREFIX, STRICT, SOURCE = "", "strict", "data[{}]"
    """What errors call the settings: the first comes before the names of those of batches."""

    def __init__(
        self,
        sources: Sequence[Source[RawT]],
        readers: Sequence[Reader[RawT]],
        world: World,
        *,
        global_batch: int,
        streams: int,
        seed: int,
        window: int,
        strict: bool,
        max_bad_share: float,
        transform: Callable[[Any], Any] | None,
    ) -> None:
        """Arguments are those of `ElasticShards`; `readers` are those of the sources."""
        self.sources, self.readers, self.world = sources, readers, world
        self.global_batch, self.streams, self.seed, self.window = global_batch, streams, seed, window
        self.strict, self.max_bad_share, self.transform = strict, max_bad_share, transform
        self.is_world_found = False
        """Whether nobody gave rank and world size, so that they must be those of torch.distributed."""
        self.position = StreamPosition(streams, world.size)
        self.samples_read = 0
        """Samples that this process's loaders have yielded."""
        self.damaged = 0
        """Damaged ones among those, which were replaced."""
        self.positions: np.ndarray | None = None
        """In shared memory: for each loader process its current slot and since when (ns)."""
        self.worker: int | None = None
        """Number of this loader process."""

    def __getstate__(self) -> dict[str, Any]:
        # The plan is made again; the memory of loader processes is not shared by a pickle.
        own = {name: value for name, value in self.__dict__.items() if name != "plan"}
        return {**own, "positions": None, "worker": None}

    @property
    def weights(self) -> list[float]:
        """The share of each source, relative to the others."""
        return [
            source.repeat * reader.samples if source.repeat is not None else source.weight or 1.0
            for source, reader in zip(self.sources, self.readers)
        ]

    @cached_property
    def plan(self) -> Plan:
        """The order of samples.

        Raises:
            UserError: if the streams do not divide the global batch, or a source gets no stream.
        """
        return Plan(
            [reader.counts for reader in self.readers],
            self.weights,
            streams=self.streams,
            global_batch=self.global_batch,
            seed=self.seed,
            window=self.window,
            prefix=self.PREFIX,
            source=self.SOURCE,
        )

    @property
    def samples(self) -> int:
        """Number of samples of all sources."""
        return sum(reader.samples for reader in self.readers)

    @property
    def bytes(self) -> int:
        """Size of all tars."""
        return sum(reader.manifest.bytes for reader in self.readers)

    @property
    def identity(self) -> str:
        """Hash of all manifests, recorded in checkpoints."""
        return combined_identity([reader.manifest.identity for reader in self.readers])

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch: the sum over repeats of a mix by repeats, or all samples."""
        by_repeats = any(source.repeat is not None for source in self.sources)
        return round(sum(self.weights)) if by_repeats else self.samples

    def __getitem__(self, slot: int) -> Any:
        """Reads the sample of a slot, replacing damaged ones. This makes the stream a map-style data set."""
        if not isinstance(slot, Integral) or slot < 0:
            raise UserError(f"slot={slot!r}: is not a whole number of at least 0")
        damaged: list[str] = []
        sample = self.take(int(slot), self.transform_sample, damaged)  # numpy's integers are short
        for line in damaged:
            log.warning("replaced a damaged sample: %s", line)
        return sample

    def __iter__(self) -> Any:
        """Raises UserError: without it Python would read the slots of all ranks, one by one, without end."""
        raise UserError("ElasticShards: cannot be iterated itself; use micro_batches(…) or loader(…)")

    def take(self, slot: int, use: Callable[[RawT, Place], T], damaged: list[str]) -> T:
        """Reads the sample of a slot and returns what `use` makes of it.

        A damaged sample, or one for which `use` raises DamagedSample, is replaced by the sample of the slot one turn of
        the streams later, and so on. This rule needs neither state nor communication between ranks. `damaged` gets a
        line for each.

        Raises:
            Fault: if samples cannot be read, or too many in a row are damaged.
        """
        if self.worker is not None and self.positions is not None:
            self.positions[self.worker, 0], self.positions[self.worker, 1] = slot, time.monotonic_ns()
        for attempt in range(MAX_REPLACEMENTS):
            place = self.plan.locate(slot + attempt * self.streams)
            try:
                return use(self.readers[place.source].read(place.shard, place.row), place)
            except DamagedSample as error:
                damaged.append(f"slot {slot}: {error}")
                if self.strict:
                    raise Fault(f"{self.STRICT}: a damaged sample: {damaged[-1]}") from None
        row = damaged[-MAX_REPLACEMENTS:]
        raise Fault("too many damaged samples in a row: " + "; ".join(row) + _ask_about_tars(row))

    def transform_sample(self, raw: RawT, _: Place) -> Any:
        """Applies `decode` and `transform` to a sample."""
        return raw if self.transform is None else self.transform(raw)

    def describe_slot(self, slot: int) -> str:
        """Names the shard and row of a slot, for error messages."""
        place = self.plan.locate(slot)
        reader = self.readers[place.source]
        return f"slot {slot}: {hide_secrets(reader.url)}/{reader.manifest.shards[place.shard].name}, row {place.row}"

    def advance(self, samples: int) -> None:
        """Reports that this rank has used further samples. `micro_batches` and `loader` do it themselves."""
        self.position.number += samples

    def state_dict(self) -> dict[str, Any]:
        """Returns the position and what identifies the sequence of samples, as values of JSON; equal on all ranks."""
        return self.state_after(self.position.number)

    def state_after(self, number: int) -> dict[str, Any]:
        """Returns the state after each rank has used `number` samples."""
        return {
            "version": STATE_VERSION,
            "samples": number * self.world.size,
            "world_size": self.world.size,
            **self._sequence(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the position of a state, which may come from another number of ranks.

        Raises:
            UserError: if the state is of other data or another order, naming what differs.
        """
        self.check_state(state)
        self.position.load(state["samples"], state["world_size"])

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises UserError if a state is not one of this sequence of samples, naming what differs."""
        check_state(state, self._sequence())

    def check_world(self) -> None:
        """Checks that the program has not joined other ranks since the stream was opened.

        Raises:
            UserError: if it has, unless it gave rank and world size itself.
        """
        if self.is_world_found:
            check_found(self.world)

    def count_micro_batches(self, micro_batch: int) -> int:
        """Returns the number of micro-batches of a rank in a step.

        Raises:
            UserError: if micro-batch, ranks, streams and global batch do not divide each other.
        """
        if type(micro_batch) is not int or micro_batch < 1:
            raise UserError(f"micro_batch={micro_batch!r}: is not a whole number of at least 1")
        return count_micro_batches(self.global_batch, micro_batch, self.streams, self.world.size, self.PREFIX)

    @property
    def pass_samples(self) -> int:
        """Samples of a rank in one pass over a loader: as many whole steps as an epoch needs. All passes are equally
        long, as trainers expect that ask for a length once. So a pass begins up to one step later in its epoch than the
        one before; nothing is left out or padded."""
        return -(-self.epoch_samples // self.global_batch) * (self.global_batch // self.world.size)

    def pass_end(self, number: int) -> int:
        """Returns the number of samples that a rank has used at the end of the pass to which its sample `number`
        belongs."""
        return (number // self.pass_samples + 1) * self.pass_samples

    def begin_pass(self, number: int) -> None:
        """Goes forward to the beginning of a pass, counted from 0; does nothing in that pass or a later one."""
        if self.position.number < number * self.pass_samples:
            self.position.number = number * self.pass_samples

    def count_left(self, micro_batch: int, number: int | None = None) -> int:
        """Returns the number of micro-batches of a rank from its sample `number`, or its position, to the end of the
        pass."""
        own = self.global_batch // self.world.size
        number = self.position.number if number is None else number
        end, step_end = self.pass_end(number), -(-number // own) * own  # of the step that is under way
        return -(-(step_end - number) // micro_batch) + (end - step_end) // own * -(-own // micro_batch)

    def set_kept_rows(self) -> None:
        """Makes each reader keep the index rows of all streams of this rank."""
        for reader in self.readers:
            reader.keep_rows = count_kept_rows(self.streams // self.world.size, self.window)

    def note_damaged(self, lines: Sequence[str], samples: int) -> None:
        """Counts the samples of a micro-batch, and reports the damaged ones among them.

        Raises:
            Fault: if more are damaged than `max_bad_share` allows.
        """
        self.samples_read += samples
        self.damaged += len(lines)
        for line in lines:
            log.warning("replaced a damaged sample: %s", line)
        read = self.samples_read + self.damaged
        if lines and self.damaged > max(MIN_DAMAGED, self.max_bad_share * read):
            raise Fault(
                f"{self.damaged} of {read} samples are damaged, more than "
                f"max_bad_share={self.max_bad_share:g}; the last: {lines[-1]}{_ask_about_tars(lines)}"
            )

    def close(self) -> None:
        """Closes the files that this process has open."""
        for reader in self.readers:
            reader.close()

    def _sequence(self) -> dict[str, Any]:
        """What determines the sequence of samples, besides the position."""
        return {
            "data": self.identity,
            "seed": self.seed,
            "streams": self.streams,
            "global_batch": self.global_batch,
            "window": self.window,
            "shares": list(self.plan.shares),
        }


def count_kept_rows(streams: int, window: int) -> int:
    """Returns how many index rows a process keeps that reads some streams: each reads one window, which overlaps at
    most two more row groups."""
    return max(ShardReader.KEEP_ROWS, streams * (window + 2 * ROW_GROUP))


def _ask_about_tars(damaged: Sequence[str]) -> str:
    """What errors add if all these samples have other bytes than the index states."""
    if len(damaged) > 1 and all(line.endswith(DIFFER) for line in damaged):
        return ". Were the tars replaced since they were indexed? Then index them again"
    return ""
