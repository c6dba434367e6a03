"""Reading of shards: whether they are there, whether samples are what was packed, and how fast they come."""

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shards.storage import is_local
from uniemox_dist.data.reader import DamagedSample, ShardReader
from uniemox_dist.doctor.findings import Finding, Problem, Told, counted, judged, sized, sound, span
from uniemox_dist.runtime.errors import Fault
from uniemox_dist.runtime.world import World

WHAT = "shards"
PIECE = 4 << 20
MOST_BYTES = 64 << 20
"""Read in one go from one shard."""
SAMPLES = 64
"""Read one by one, from places all over the data set, as training reads."""
LONGEST_S = 2.0
"""Of each of the two."""
SLOW_SHARE = 0.25
"""A rank that reads slower than this share of the ranks' median is warned of."""
SLOW_BYTES_PER_S = 2e6


@dataclass(frozen=True)
class ReadFacts:
    """What one rank read of one data set."""

    path: str
    shards: int
    samples: int
    bytes: int
    """Of the whole data set."""
    in_a_row: int
    """Bytes read from the start of one shard."""
    in_a_row_s: float
    one_by_one: int
    """Samples read from places all over, hashes compared."""
    one_by_one_s: float
    dropped: bool
    """Whether the kernel was asked to forget what it had of those shards before."""

    @property
    def bytes_per_s(self) -> float:
        """In a row."""
        return self.in_a_row / max(self.in_a_row_s, 1e-9)

    @property
    def samples_per_s(self) -> float:
        """One by one, in one process."""
        return self.one_by_one / max(self.one_by_one_s, 1e-9)


def measure(field: str, path: str, world: World) -> ReadFacts:
    """Opens a data set, checks the sizes of this rank's part of the shards, and reads from some of them.

    Raises:
        UserError: if the folder, its manifest or a shard is missing, or a shard is cut.
        Fault: if something cannot be read, or is not what was packed.
    """
    reader = ShardReader.from_folder(path, field, share=(world.rank, world.size))
    try:
        return _read(reader, world)
    except DamagedSample as error:
        raise Fault(
            f"{field}={path}: {error}; copy the shard again, or see `uniemox shards verify`"
        ) from None
    finally:
        reader.close()


def _read(reader: ShardReader, world: World) -> ReadFacts:
    shards = reader.manifest.shards
    number = world.rank * len(shards) // world.size  # ranks begin at shards that are far apart
    entry = shards[number]
    dropped = _forget(reader, number)
    began = time.perf_counter()
    done = 0
    while done < min(entry.bytes, MOST_BYTES) and time.perf_counter() - began < LONGEST_S:
        done += len(reader.origin.read(entry, done, min(PIECE, entry.bytes - done), cached=False))
    in_a_row_s = time.perf_counter() - began

    draw = random.Random(world.rank)
    places = [(s, draw.randrange(shards[s].samples)) for s in draw.choices(range(len(shards)), k=SAMPLES)]
    for shard in {shard for shard, _ in places}:
        _forget(reader, shard)
    began = time.perf_counter()
    one_by_one = 0
    for shard, row in places:
        reader.read(shard, row)
        one_by_one += 1
        if time.perf_counter() - began > LONGEST_S:
            break
    seconds = time.perf_counter() - began
    manifest = reader.manifest
    sizes = (len(shards), manifest.samples, manifest.bytes)
    return ReadFacts(reader.url, *sizes, done, in_a_row_s, one_by_one, seconds, dropped)


def _forget(reader: ShardReader, shard: int) -> bool:
    """Asks the kernel to drop its copy of a tar: reading memory would say nothing about the disk. Another process that
    has the file mapped keeps it there."""
    if not is_local(reader.folder):
        return False
    handle = os.open(reader.folder / reader.manifest.shards[shard].name, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return True


def judge(told: Sequence[Told[ReadFacts]]) -> list[Finding]:
    """Fails where a rank cannot read; warns where one is much slower than the others, or all are slow."""
    median = statistics.median([facts.bytes_per_s for _, facts in sound(told)] or [0.0])

    def of_rank(_: Told[ReadFacts], facts: ReadFacts) -> Problem | None:
        slow = f"{facts.path}: {facts.bytes_per_s / 1e6:.3g} MB/s"
        if facts.bytes_per_s < SLOW_SHARE * median:
            remedy = "look at that host's mount, network and disk; or set data.cache_dir"
            return Problem("warn", f"{slow}, the ranks' median is {median / 1e6:.3g} MB/s", remedy)
        if facts.bytes_per_s < SLOW_BYTES_PER_S:
            remedy = "copy the shards to a faster disk, or set data.cache_dir to the node's own"
            return Problem("warn", slow, remedy)
        return None

    def all_well(all_facts: list[ReadFacts]) -> str:
        one = all_facts[0]
        rate = span((facts.bytes_per_s / 1e6 for facts in all_facts), "MB/s")
        samples = span((facts.samples_per_s for facts in all_facts), "samples/s")
        each = " a rank" if len(told) > 1 else ""
        size = f"{one.path}: {one.samples} samples in {counted(one.shards, 'shard')}, {sized(one.bytes)}"
        return f"{size}; {rate} in a row, {samples} one by one{each}"

    return judged(WHAT, told, of_rank, all_well)
