"""Reading of shards: whether they exist, whether samples are intact, and how fast they are read."""

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from shards.format.manifest import Manifest, read_manifest
from shards.storage import file_sizes, is_local, parse_place
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.formatting import counted, format_range
from uniemox_dist.core.formatting import size as format_size
from uniemox_dist.data.reader import DamagedSample, ShardReader
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings, select_with_facts

WHAT = "shards"
PIECE = 4 << 20
MOST_BYTES = 64 << 20
"""Largest number of bytes read sequentially from one shard."""
SAMPLES = 64
"""Number of samples read one by one from random positions in the data set, as training reads."""
LONGEST_S = 2.0
"""Time limit for sequential and for random reads, each."""
SLOW_SHARE = 0.25
"""A rank that reads slower than this share of the ranks' median gives a warning."""
SLOW_BYTES_PER_S = 2e6
SHORTEST_S = 0.1
"""A shorter read gives no warning: its rate depends on what else the host does at that moment."""
MOST_NAMED = 3
"""Number of missing or truncated shards that a rank names."""


@dataclass(frozen=True)
class ReadFacts:
    """The results of one rank that read from one data set."""

    path: str
    shards: int
    samples: int
    bytes: int
    """Size of the whole data set."""
    in_a_row: int
    """Bytes read sequentially from one shard."""
    in_a_row_s: float
    one_by_one: int
    """Samples read from random positions, with their hashes checked."""
    one_by_one_s: float
    dropped: bool
    """True if the kernel was asked to drop these shards from its cache before reading."""

    @property
    def bytes_per_s(self) -> float:
        """Rate of sequential reads."""
        return self.in_a_row / max(self.in_a_row_s, 1e-9)

    @property
    def samples_per_s(self) -> float:
        """Rate of random reads, one by one in one process."""
        return self.one_by_one / max(self.one_by_one_s, 1e-9)


def measure(field: str, path: str, world: World) -> ReadFacts:
    """Opens a data set, checks the sizes of this rank's part of the shards, and reads from some of them.

    Raises:
        UserError: if the folder or its manifest is missing, or shards are missing or truncated; names the first ones.
        Fault: if a sample cannot be read, or differs from the packed one.
    """
    manifest = read_manifest(path, field)
    _compare_sizes(field, path, manifest, world)
    reader = ShardReader(path, manifest, field=field)
    try:
        facts, bad = _read(reader, world)
    finally:
        reader.close()
    if bad:
        raise Fault(f"{field}={path}: {_first(bad)}; copy the shard again, or see `uniemox shards verify`")
    return facts


def _compare_sizes(field: str, path: str, manifest: Manifest, world: World) -> None:
    shards = manifest.shards[world.rank :: world.size]
    sizes = file_sizes(parse_place(path, field), [shard.name for shard in shards])
    bad = [
        f"shard {shard.name} "
        + ("is missing" if size is None else f"has {size} bytes instead of {shard.bytes}")
        for shard, size in zip(shards, sizes, strict=True)
        if size != shard.bytes
    ]
    if bad:
        again = "copy it again" if len(bad) == 1 else "copy them again"
        raise UserError(f"{field}={path}: {_first(bad)}; {again} or pack again")


def _first(bad: Sequence[str]) -> str:
    more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return ", ".join(bad[:MOST_NAMED]) + more


def _read(reader: ShardReader, world: World) -> tuple[ReadFacts, list[str]]:
    """Reads samples; returns the results, and one damaged sample of each shard that has any."""
    shards = reader.manifest.shards
    number = world.rank * len(shards) // world.size  # ranks start at distant shards
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
    bad: dict[int, str] = {}
    for shard, row in places:
        try:
            reader.read(shard, row)
        except DamagedSample as error:
            bad.setdefault(shard, str(error))
        one_by_one += 1
        if time.perf_counter() - began > LONGEST_S:
            break
    seconds = time.perf_counter() - began
    manifest = reader.manifest
    sizes = (len(shards), manifest.samples, manifest.bytes)
    facts = ReadFacts(reader.url, *sizes, done, in_a_row_s, one_by_one, seconds, dropped)
    return facts, [bad[shard] for shard in sorted(bad)]


def _forget(reader: ShardReader, shard: int) -> bool:
    """Asks the kernel to drop a tar from its cache, because reading from memory would not measure the disk. The kernel
    keeps the file if another process has it mapped."""
    if not is_local(reader.folder):
        return False
    handle = os.open(reader.folder / reader.manifest.shards[shard].name, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return True


def judge(gathered: Sequence[RankFacts[ReadFacts]]) -> list[Finding]:
    """Fails if a rank cannot read; warns if one is much slower than the others, or all are slow."""
    median = statistics.median([facts.bytes_per_s for _, facts in select_with_facts(gathered)] or [0.0])

    def of_rank(_: RankFacts[ReadFacts], facts: ReadFacts) -> Problem | None:
        if facts.in_a_row_s < SHORTEST_S:
            return None
        slow = f"{facts.path}: {facts.bytes_per_s / 1e6:.3g} MB/s"
        if facts.bytes_per_s < SLOW_SHARE * median:
            remedy = "check that host's mount, network and disk; or set data.cache_dir"
            return Problem("warn", f"{slow}, the ranks' median is {median / 1e6:.3g} MB/s", remedy)
        if facts.bytes_per_s < SLOW_BYTES_PER_S:
            remedy = "copy the shards to a faster disk, or set data.cache_dir to the node's own"
            return Problem("warn", slow, remedy)
        return None

    def all_well(all_facts: list[ReadFacts]) -> str:
        one = all_facts[0]
        rate = format_range((facts.bytes_per_s / 1e6 for facts in all_facts), "MB/s")
        samples = format_range((facts.samples_per_s for facts in all_facts), "samples/s")
        each = " per rank" if len(gathered) > 1 else ""
        size = (
            f"{one.path}: {one.samples} samples in {counted(one.shards, 'shard')}, {format_size(one.bytes)}"
        )
        return f"{size}; {rate} sequential, {samples} random{each}"

    return make_findings(WHAT, gathered, of_rank, all_well)
